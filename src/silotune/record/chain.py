"""Reads and verifies an audit trail: order, hashes, signatures, what sites countersigned, and that no step is missing.

Everything here works offline, from the chain's file and public keys alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.errors import AuditError
from silotune.record.audit import CLOSED, COORDINATOR, COUNTERSIGNED, FILE, OF_RUN, START, Head
from silotune.record.files import explained
from silotune.record.plain_json import canonical_json
from silotune.record.signatures import verify

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "index": int, "time": (int, float), "actor": str, "event": str, "fields": dict, "previous": str, "key": str,
    "signature": str,
}  # fmt: skip
_LONGEST_END = 8192
"""Bytes that the entry which ends a chain takes at most; it has four fields."""
_LATEST = 253402300800
"""Seconds since 1970 of the year 10000, which no calendar shows."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, and the hash of its line."""

    index: int
    time: float
    actor: str
    event: str
    fields: Mapping[str, Any]
    previous: str
    key: str
    signature: str
    hash: str


@dataclass(frozen=True)
class Verified:
    """What a verified chain says.

    Attributes:
        entries: All of them.
        is_closed: The chain was ended by its author, so none is missing at its end.
        keys: Public keys that signed, by signer: the author, and the sites that signed replies or the end.
        countersigned: Site -> number of entries that the site countersigned, which is all of them.
        uncountersigned: Sites that were asked to sign the end of a chain that is closed, or signed replies in it, and
            have not signed its end.
    """

    entries: tuple[Entry, ...]
    is_closed: bool
    keys: Mapping[str, tuple[str, ...]]
    countersigned: Mapping[str, int] = field(default_factory=dict)
    uncountersigned: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self.entries[-1].hash if self.entries else START


def read_chain(path: Path, *, first: int | None = None) -> list[Entry]:
    """The entries of a chain's file, each with its hash; nothing is verified but their form.

    Args:
        path: The file.
        first: Read only so many entries and ignore the rest: a torn line that a kill left is cut when the chain goes
            on.

    Raises:
        AuditError: A line is no entry; it is named by its number from 0.
    """
    with explained(path):
        if not path.is_file():
            raise AuditError(f"there is no audit trail {str(path)!r}: the run was made with record.audit = false")
        lines = path.read_bytes().split(b"\n")
    if first is None and lines[-1]:
        raise AuditError(f"entry {len(lines) - 1} is torn: it has no end of line")
    return [_entry(index, line) for index, line in enumerate(lines[: len(lines) - 1 if first is None else first])]


def is_closed(path: Path) -> bool:
    """Whether the last whole line of a chain's file says that it was ended; False where there is none."""
    with explained(path):
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST_END))
            lines = file.read().split(b"\n")[:-1]
    try:
        return bool(lines) and json.loads(lines[-1])["event"] == CLOSED
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def has_ended(run: Path) -> bool:
    """Whether nothing is written into a run folder any more: it has its summary, and its trail, if any, is closed."""
    trail = run / "federated" / FILE
    return (run / "summary.json").is_file() and (not trail.exists() or is_closed(trail))


def verify_chain(
    path: Path, *, keys: Mapping[str, Sequence[str]] | None = None, is_open_allowed: bool = False
) -> Verified:
    """Verifies a chain.

    Args:
        path: The chain's file; ``countersigned.json`` beside it is read where it is there.
        keys: Actor -> the public keys it may sign with. None takes the first key that each actor signs with, so
            that only a change of keys shows: compare the keys in the result with what you know.
        is_open_allowed: Accept a chain that was not closed, such as that of a run that goes on.

    Raises:
        AuditError: Something is wrong; the message names the first bad entry.
    """
    entries = read_chain(path)
    known = {actor: tuple(own) for actor, own in keys.items()} if keys is not None else _first_keys(entries)
    _check_links(entries, known)
    _check_signatures(entries)
    _check_replies(entries, known)
    ended = bool(entries) and (entries[-1].event, entries[-1].actor) == (CLOSED, COORDINATOR)
    if not ended and not is_open_allowed:
        raise AuditError(f"entry {len(entries)} is missing: the trail was cut off, or its run has not ended")
    own = {**sites_of(entries), **_first_keys(entries), **known}
    countersigned = _check_countersigned(path.with_name(COUNTERSIGNED), entries, own)
    unsigned = tuple(sorted((_signers(entries) | _with_keys(entries).keys()) - set(countersigned))) if ended else ()
    signed = _signed(entries, known, countersigned)
    return Verified(tuple(entries), ended, signed, dict.fromkeys(countersigned, len(entries)), unsigned)


def check_own(entries: Sequence[Entry], key: str) -> None:
    """Checks that a chain which its author continues is in order and, as far as the key shows, the author's own.

    Raises:
        AuditError: Something is wrong; the message names the first bad entry.
    """
    _check_links(entries, {COORDINATOR: (key,)})
    _check_signatures(entries)


def check_witness(coordinator: Sequence[Entry], site: Sequence[Entry], *, has_countersigned: bool = False) -> int:
    """Compares a coordinator's chain with the heads of its run that a site saw and kept in its own.

    Args:
        coordinator: Its chain.
        site: The site's own.
        has_countersigned: The site has signed the end of the coordinator's chain, so it saw that, too.

    Returns:
        Heads that were compared.

    Raises:
        AuditError: The coordinator's chain is not the one whose heads the site saw: it was cut off or written anew;
            or the site's does not hold what the site signed, or heads of other runs alone.
    """
    if not site:
        raise AuditError("a site's trail without any entry says nothing of this run")
    name = site[0].actor
    if name not in sites_of(coordinator):
        raise AuditError(f"this is the trail of {name!r}, which is not a site of this run")
    known = {name: coordinator[0].fields.get(name) for name in OF_RUN} if coordinator else {}
    seen = [entry for entry in site if entry.fields.get("head")]
    own = [entry for entry in seen if all(entry.fields.get(name) == value for name, value in known.items())]
    if not own:
        raise AuditError(f"site {name!r} saw no head of this run: it took no part, or this is another run")
    heads = [Head.parse(str(entry.fields["head"])) for entry in own]
    for head in heads:
        _check_head(head, coordinator, who=f"site {name!r}")
    signed = {head.entries for head in _heads_signed_by(name, coordinator)}
    signed |= {len(coordinator)} if has_countersigned else set()
    if lacking := sorted(signed - {head.entries for head in heads}):
        raise AuditError(
            f"the trail of {name!r} lacks the head of {lacking[0]} entries, which {name!r} has signed: it was cut off"
        )
    return len(heads)


def sites_of(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """Every site that a coordinator's chain names, with its keys as far as the chain says them."""
    asked = [entry for entry in entries if (entry.event, entry.actor) == ("request", COORDINATOR)]
    return {**{str(entry.fields.get("client")): () for entry in asked}, **_with_keys(entries)}


def _with_keys(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """The sites whose replies had to be signed, and their keys, as the entry of the result says."""
    last = next((entry for entry in reversed(entries) if (entry.event, entry.actor) == ("result", COORDINATOR)), None)
    said = last.fields.get("sites", {}) if last is not None else {}
    if not isinstance(said, Mapping) or not all(isinstance(own, list) for own in said.values()):
        raise AuditError("the entry of the result does not say which sites have keys")
    return {str(name): tuple(map(str, own)) for name, own in said.items()}


def _heads_signed_by(name: str, entries: Iterable[Entry]) -> Iterator[Head]:
    """The heads that a site's signed replies in a coordinator's chain cover."""
    for entry in entries:
        said = entry.fields.get("statement") if entry.event == "reply" else None
        if entry.fields.get("client") == name and isinstance(said, Mapping) and said.get("head"):
            yield Head.parse(str(said["head"]))


def _signed(
    entries: Iterable[Entry], known: Mapping[str, Sequence[str]], countersigned: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Who signed, with which keys: entries, replies whose signatures were checked, and the end."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        found.setdefault(entry.actor, {})[entry.key] = None
        client = str(entry.fields.get("client"))
        if entry.event == "reply" and entry.actor == COORDINATOR and client in known:
            found.setdefault(client, {})[str(entry.fields.get("key"))] = None
    for client, key in countersigned.items():
        found.setdefault(client, {})[key] = None
    return {who: tuple(own) for who, own in found.items()}


def _entry(index: int, line: bytes) -> Entry:
    try:
        read = json.loads(line)
        is_canonical = canonical_json(read) == line
    except (ValueError, RecursionError):  # no JSON, no UTF-8, NaN
        read, is_canonical = None, False
    if not isinstance(read, dict) or read.keys() != _FIELDS.keys():
        raise AuditError(f"entry {index} is not valid: it does not have the fields of an entry")
    for name, kind in _FIELDS.items():
        if not isinstance(read[name], kind):
            raise AuditError(f"entry {index} is not valid: its {name!r} is of the wrong type")
    if not 0 <= read["time"] < _LATEST:
        raise AuditError(f"entry {index} is not valid: its time is not a time")
    if not is_canonical:
        raise AuditError(f"entry {index} is not written canonically: it was changed")
    return Entry(**read, hash=hashlib.sha256(line).hexdigest())


def _first_keys(entries: Iterable[Entry]) -> dict[str, tuple[str, ...]]:
    keys: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        keys.setdefault(entry.actor, (entry.key,))
        signed = entry.fields
        if entry.event == "reply" and entry.actor == COORDINATOR and signed.get("signature"):
            keys.setdefault(str(signed.get("client")), (str(signed.get("key")),))
    return keys


def _check_links(entries: Sequence[Entry], known: Mapping[str, Sequence[str]]) -> None:
    previous = START
    for index, entry in enumerate(entries):
        if entry.previous != previous:
            if index and entry.index == index and not _is_signed(entries[index - 1]):
                raise AuditError(f"entry {index - 1} was changed: its signature does not fit")
            raise AuditError(f"entry {index} does not follow the one before it: one was removed, inserted or moved")
        if entry.actor != entries[0].actor:
            raise AuditError(f"entry {index} is by {entry.actor!r}, but the trail is that of {entries[0].actor!r}")
        if entry.index != index:
            raise AuditError(f"entry {index} calls itself {entry.index}: one was removed, inserted or moved")
        if entry.key not in known.get(entry.actor, ()):
            raise AuditError(f"entry {index} is signed with none of the keys known for {entry.actor!r}")
        previous = entry.hash


def _check_signatures(entries: Sequence[Entry]) -> None:
    """Checks the last signature of each key, which covers every line before it; names the first entry that fails."""
    last = {entry.key: entry for entry in entries}
    if not all(map(_is_signed, last.values())):
        bad = next(entry for entry in entries if not _is_signed(entry))
        raise AuditError(f"entry {bad.index} was changed: its signature does not fit")


def _is_signed(entry: Entry) -> bool:
    unsigned = {name: getattr(entry, name) for name in _FIELDS if name != "signature"}
    return verify(entry.key, "audit", canonical_json(unsigned), entry.signature)


def _check_replies(entries: Sequence[Entry], known: Mapping[str, Sequence[str]]) -> None:
    """The sites' own signatures within the coordinator's chain, what they are of, and the heads that they cover."""
    requests: dict[str, Any] = {}
    for entry in entries:
        fields, client = entry.fields, str(entry.fields.get("client"))
        if entry.event == "request":
            requests[client] = fields.get("request")
        if entry.event != "reply" or entry.actor != COORDINATOR or client not in known:
            continue
        said = fields.get("statement")
        if not fields.get("signature") or not isinstance(said, Mapping):
            raise AuditError(f"entry {entry.index}: the reply of {client!r} is not signed")
        if fields.get("key") not in known[client]:
            raise AuditError(f"entry {entry.index}: the reply is signed with none of the keys known for {client!r}")
        if not verify(str(fields["key"]), "reply", canonical_json(dict(said)), str(fields["signature"])):
            raise AuditError(f"entry {entry.index}: the signature of {client!r} does not fit its reply")
        shown = {name: fields.get(name) for name in ("kind", "round", "client", "tensors")}
        report = canonical_json(fields["report"]) if "report" in fields else None
        body = fields.get("body") if report is None else hashlib.sha256(report).hexdigest()
        shown |= {"body": body, "request": requests.get(client)}
        if {name: value for name, value in said.items() if name != "head"} != shown:
            raise AuditError(
                f"entry {entry.index}: what {client!r} signed is another reply, or answers another request"
            )
        if said.get("head"):
            _check_head(Head.parse(str(said["head"])), entries[: entry.index], who=f"entry {entry.index}")


def _signers(entries: Iterable[Entry]) -> set[str]:
    """Sites whose signed replies a coordinator's chain holds: they have keys, and could have signed its end."""
    replies = [entry.fields for entry in entries if entry.event == "reply" and entry.actor == COORDINATOR]
    return {str(fields["client"]) for fields in replies if fields.get("signature")}


def _check_head(head: Head, entries: Sequence[Entry], *, who: str) -> None:
    if head.entries > len(entries):
        raise AuditError(f"entry {len(entries)} is missing: {who} saw {head.entries} entries; the trail was cut off")
    if head.entries and entries[head.entries - 1].hash != head.hash:
        raise AuditError(f"entry {head.entries - 1} is not the one that {who} saw: the trail was written anew")


def _check_countersigned(place: Path, entries: Sequence[Entry], known: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Sites that signed the last entry's head, each once, with the key; nobody else may have signed there."""
    found: dict[str, str] = {}
    if place.is_symlink():
        raise AuditError(f"{COUNTERSIGNED} is a link, and links are not followed: put the file itself there")
    if not place.is_file():
        return found
    sites = sites_of(entries)
    for item in _countersignatures(place):
        try:
            client, key, said, signature = (item[name] for name in ("client", "key", "statement", "signature"))
            head, is_signed = Head.parse(said["head"]), verify(key, "reply", canonical_json(said), signature)
            is_known = key in (known.get(client) or (key,))
            is_site = client in sites
        except (KeyError, TypeError, AttributeError, ValueError, AuditError):
            raise _not_countersigned() from None
        if not is_site or client in found:
            raise AuditError(
                f"{COUNTERSIGNED}: {client!r} {'stands in it twice' if is_site else 'is not a site of this run'}"
            )
        if not is_known or not is_signed or said.get("client") != client or said.get("kind") != "countersign":
            raise AuditError(f"{COUNTERSIGNED}: the countersignature of {client!r} does not fit")
        _check_head(head, entries, who=f"site {client!r}")
        if head.entries != len(entries):
            raise AuditError(
                f"{COUNTERSIGNED}: {client!r} signed the head of {head.entries} entries, not that of all {len(entries)}"
            )
        found[client] = key
    return found


def _countersignatures(place: Path) -> list[Any]:
    """The rows of the file with countersignatures, which is written canonically, like an entry."""
    with explained(place):
        content = place.read_bytes()
    try:
        read = json.loads(content)
        is_canonical = canonical_json(read) + b"\n" == content
    except (ValueError, RecursionError):
        read, is_canonical = None, False
    if not isinstance(read, list) or not is_canonical:
        raise _not_countersigned()
    return read


def _not_countersigned() -> AuditError:
    return AuditError(f"{COUNTERSIGNED} is not what was written: it was changed")
