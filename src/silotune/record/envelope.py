"""A signed folder: an in-toto statement over the SHA-256 of its files, in a DSSE envelope that stands beside them."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.errors import AuditError, RunFolderError, SignatureError
from silotune.record.checkpoints import file_sha256
from silotune.record.files import explained, write_json
from silotune.record.plain_json import canonical
from silotune.record.signatures import SigningKey, raw_public

ENVELOPE = "statement.dsse.json"
"""Place of the envelope in the folder that it vouches for."""
_PAYLOAD, _STATEMENT = "application/vnd.in-toto+json", "https://in-toto.io/Statement/v1"
_LARGEST = 1 << 26
_MOST_NAMED = 8


def sign_folder(folder: Path, key: SigningKey, *, kind: str, about: Mapping[str, Any]) -> None:
    """Writes the envelope over all files that are in a folder now.

    Args:
        folder: Holds the files; nobody else may write to it.
        key: Signs.
        kind: URI that says what is in the folder, the statement's ``predicateType``.
        about: The statement's predicate.
    """
    subject = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(_digests(folder).items())]
    payload = canonical({"_type": _STATEMENT, "subject": subject, "predicateType": kind, "predicate": about})
    signature = base64.b64encode(key.private.sign(_encoded(payload))).decode()
    document = {
        "payloadType": _PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key.public, "sig": signature}],
    }
    write_json(folder / ENVELOPE, document)


def verify_folder(folder: Path, *, kind: str, signer: str | None = None) -> tuple[str, dict[str, str]]:
    """Verifies the envelope in a folder, and that the folder holds the files that it lists and no others.

    Args:
        folder: As ``sign_folder`` left it.
        kind: As it was signed.
        signer: The public key that must have signed; any key's signature counts when None.

    Returns:
        The public key that signed, and each file with its SHA-256.

    Raises:
        RunFolderError: There is no such folder, or no envelope in it.
        AuditError: Nothing of it fits: the signature, the key, or a file, which is named.
    """
    with explained(folder):
        if not folder.is_dir() or not (folder / ENVELOPE).is_file():
            raise RunFolderError(f"{str(folder)!r} is not a signed folder: it holds no {ENVELOPE}")
        if (folder / ENVELOPE).stat().st_size > _LARGEST:
            raise AuditError(f"{ENVELOPE} is larger than {_LARGEST} bytes: it was changed")
        content = (folder / ENVELOPE).read_bytes()
    key, listed = _opened(content, kind)
    if signer is not None and key != signer:
        raise AuditError(f"{ENVELOPE} is signed by {key}, not by the key that was given")
    there = _digests(folder)
    faults = {
        "changed": [name for name in listed.keys() & there.keys() if listed[name] != there[name]],
        "missing": list(listed.keys() - there.keys()),
        "not part of it": list(there.keys() - listed.keys()),
    }
    said = "; ".join(f"{which}: {_named(names)}" for which, names in faults.items() if names)
    if said:
        raise AuditError(f"the folder is not what was signed; {said}")
    return key, listed


def _opened(content: bytes, kind: str) -> tuple[str, dict[str, str]]:
    """The signer and the listed files of an envelope whose signature fits; nothing of it is trusted before."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        outer = _object(content)
        payload = base64.b64decode(outer["payload"], validate=True)
        (signature,) = outer["signatures"]
        key = str(signature["keyid"])
        public = Ed25519PublicKey.from_public_bytes(raw_public(key))
        public.verify(base64.b64decode(signature["sig"], validate=True), _encoded(payload))
        statement = _object(payload)
        if (outer["payloadType"], statement["_type"], statement["predicateType"]) != (_PAYLOAD, _STATEMENT, kind):
            raise AuditError(f"{ENVELOPE} is a statement about something else")
        listed = {str(each["name"]): str(each["digest"]["sha256"]) for each in statement["subject"]}
    except InvalidSignature:
        raise AuditError(f"{ENVELOPE}: the signature does not fit what it is to sign") from None
    except (KeyError, TypeError, ValueError, RecursionError, SignatureError):
        raise AuditError(f"{ENVELOPE} is not an envelope as it was written: it was changed") from None
    return key, listed


def _object(content: bytes) -> dict[str, Any]:
    read = json.loads(content)
    if not isinstance(read, dict):
        raise ValueError("not an object")
    return read


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)


def _digests(folder: Path) -> dict[str, str]:
    """Place in the folder -> SHA-256, for everything but the envelope; a link or a pipe has none and is an error."""
    found = {}
    with explained(folder):
        for root, folders, names in os.walk(folder):
            for path in (Path(root) / name for name in (*folders, *names)):
                name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise AuditError(f"{ascii(name)} is no plain file: a signed folder holds nothing else")
                if path.is_file() and name != ENVELOPE:
                    found[name] = file_sha256(path)
    return found


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(ascii, sorted(names)[:_MOST_NAMED])) + more
