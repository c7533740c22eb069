"""The audit trail: a chain of entries, each with the SHA-256 of the one before it and its author's Ed25519 signature.

An entry is one line of canonical JSON: ``index``, ``time`` (seconds since 1970), ``actor``, ``event``, ``fields``,
``previous``, ``key`` and ``signature`` (of all the others). ``previous`` is the hash of the whole line before,
signature included. Tensors stand in ``fields`` by their digest. ``record.chain`` reads and verifies what is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.errors import AuditError
from silotune.record.files import append_line, explained, mend
from silotune.record.plain_json import canonical
from silotune.record.signatures import SigningKey, verify

FILE, KEY_FILE, PUBLIC_FILE, COUNTERSIGNED = "audit.jsonl", "audit.key", "audit.pub", "countersigned.json"
START = "0" * 64
"""What the first entry has for ``previous``."""
COORDINATOR = "coordinator"
"""The actor of a coordinator's chain; a site's is its name."""
CLOSED = "closed"
"""The event that ends a chain: without it, entries may be missing at the end."""
OF_RUN = ("run", "config_sha256")
"""Fields that say which run an entry is of: of a coordinator's first, and of each of a site's."""
LONGEST_NAME = 200
_FLUSH_AT = 256


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain: how many entries it has, the hash of the last, and the author's signature of both."""

    entries: int
    hash: str
    signature: str

    def text(self) -> str:
        """The head as it travels in a request."""
        return f"{self.entries}:{self.hash}:{self.signature}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """The inverse of ``text``.

        Raises:
            AuditError: It is not a head.
        """
        entries, _, rest = text.partition(":")
        digest, _, signature = rest.partition(":")
        if not (entries.isascii() and entries.isdigit() and len(entries) < 16 and len(digest) == 64 and signature):
            raise AuditError("the head of an audit trail that came with a request cannot be read")
        return cls(int(entries), digest, signature)

    def is_signed_by(self, *keys: str) -> bool:
        """True when one of these public keys signed it."""
        return any(verify(key, "head", _head_message(self.entries, self.hash), self.signature) for key in keys)


def _head_message(entries: int, digest: str) -> bytes:
    return f"{entries}:{digest}".encode()


class Trail:
    """A chain that is being written, by one author; call ``flush`` where entries must be on the disk.

    Args:
        path: The chain's file; an existing one is continued, behind its last whole line.
        key: The author's key.
        actor: Who the author is: ``COORDINATOR`` or a site's name.

    Raises:
        AuditError: The last line of an existing chain is not an entry.
    """

    def __init__(self, path: Path, key: SigningKey, *, actor: str) -> None:
        self._path, self._key, self._actor = path, key, actor
        self._waiting: list[bytes] = []
        self._entries, self._hash, self._last_event = _end_of(path)

    @property
    def entries(self) -> int:
        """Entries so far, those that wait for ``flush`` counted in."""
        return self._entries

    @property
    def is_closed(self) -> bool:
        """True when the chain was ended."""
        return self._last_event == CLOSED

    def add(self, event: str, fields: Mapping[str, Any]) -> None:
        """Adds an entry. Verification fails on any entry after the one that closes the chain."""
        unsigned = {
            "index": self._entries,
            "time": round(time.time(), 6),
            "actor": self._actor,
            "event": event,
            "fields": fields,
            "previous": self._hash,
            "key": self._key.public,
        }
        line = canonical({**unsigned, "signature": self._key.sign("audit", canonical(unsigned))})
        self._waiting.append(line + b"\n")
        self._entries, self._hash, self._last_event = self._entries + 1, hashlib.sha256(line).hexdigest(), event
        if len(self._waiting) >= _FLUSH_AT:
            self.flush()

    def head(self) -> Head:
        """The signed end of the chain as it is now."""
        signature = self._key.sign("head", _head_message(self._entries, self._hash))
        return Head(self._entries, self._hash, signature)

    def flush(self) -> None:
        """Writes the waiting entries and flushes them to the disk; those that find no room wait for the next flush.

        Raises:
            RunFolderError: The disk is full or the file may not be written.
        """
        if self._waiting:
            append_line(self._path, b"".join(self._waiting))
            self._waiting.clear()


def _end_of(path: Path) -> tuple[int, str, str]:
    """Entries, last hash and last event of the chain at ``path``; a torn last line is cut, and the log says so."""
    if note := mend(path):
        logging.getLogger("silotune").warning("%s", note)
    with explained(path):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    if not lines:
        return 0, START, ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        entry = json.loads(lines[-1])
        if entry["index"] == len(lines) - 1:
            return len(lines), hashlib.sha256(lines[-1]).hexdigest(), str(entry["event"])
    raise AuditError(f"{str(path)!r} does not end with entry {len(lines) - 1}: see 'silotune audit verify'")
