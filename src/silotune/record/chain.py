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
from silotune.record.audit import CLOSED, COORDINATOR, COUNTERSIGNED, OF_RUN, START, Head
from silotune.record.canonical import canonical_json
from silotune.record.files import explained, read_json
from silotune.record.signatures import verify

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "index": int, "time": (int, float), "actor": str, "event": str, "fields": dict, "previous": str, "key": str,
    "signature": str,
}  # fmt: skip
_BESIDE_ROUNDS = ("evaluate", "countersign")
"""Kinds of requests that belong to no round's aggregation."""
_GOES_ON = ("started", "resumed", "shortfall")
"""Events whose round is the one after which the run goes on."""


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
        keys: Public keys that signed, by actor.
        countersigned: Site -> entries that the site countersigned.
    """

    entries: tuple[Entry, ...]
    is_closed: bool
    keys: Mapping[str, tuple[str, ...]]
    countersigned: Mapping[str, int] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self.entries[-1].hash if self.entries else START


def read_chain(path: Path) -> list[Entry]:
    """The entries of a chain's file, each with its hash; nothing is verified but their form.

    Raises:
        AuditError: A line is no entry; it is named by its number from 0.
    """
    with explained(path):
        if not path.is_file():
            raise AuditError(f"there is no audit trail {str(path)!r}: the run was made with record.audit = false")
        lines = path.read_bytes().split(b"\n")
    if lines.pop():
        raise AuditError(f"entry {len(lines)} is torn: it has no end of line")
    return [_entry(index, line) for index, line in enumerate(lines)]


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
    check_rounds(entries)
    countersigned = _check_countersigned(path, entries, known)
    is_closed = bool(entries) and entries[-1].event == CLOSED
    if not is_closed and not is_open_allowed:
        raise AuditError(f"entry {len(entries)} is missing: the trail was cut off, or its run has not ended")
    return Verified(tuple(entries), is_closed, known, countersigned)


def check_witness(coordinator: Sequence[Entry], site: Sequence[Entry]) -> int:
    """Compares a coordinator's chain with the heads of its run that a site saw and kept in its own.

    Returns:
        Heads that were compared.

    Raises:
        AuditError: The coordinator's chain is not the one whose heads the site saw: it was cut off or written anew;
            or the site saw heads of other runs alone.
    """
    known = {name: coordinator[0].fields.get(name) for name in OF_RUN} if coordinator else {}
    seen = [entry for entry in site if entry.fields.get("head")]
    own = [entry for entry in seen if all(entry.fields.get(name) == value for name, value in known.items())]
    if seen and not own:
        raise AuditError(f"site {site[0].actor!r} saw no head of this run: it took no part, or this is another run")
    heads = [Head.parse(entry.fields["head"]) for entry in own]
    for head in heads:
        _check_head(head, coordinator, who=f"site {site[0].actor!r}")
    return len(heads)


def _entry(index: int, line: bytes) -> Entry:
    try:
        read = json.loads(line)
        is_canonical = canonical_json(read) == line
    except (ValueError, RecursionError):  # no JSON, no UTF-8, NaN
        read, is_canonical = None, False
    if not isinstance(read, dict) or read.keys() != _FIELDS.keys():
        raise AuditError(f"entry {index} is not one: it does not have the fields of an entry")
    for name, kind in _FIELDS.items():
        if not isinstance(read[name], kind):
            raise AuditError(f"entry {index} is not one: its {name!r} is of the wrong type")
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
        if entry.index != index:
            raise AuditError(f"entry {index} calls itself {entry.index}: one was removed, inserted or moved")
        if entry.key not in known.get(entry.actor, ()):
            raise AuditError(f"entry {index} is signed with a key that is not {entry.actor!r}'s")
        previous = entry.hash


def _check_signatures(entries: Sequence[Entry]) -> None:
    """The last signature of each key, which covers every line before it; all of them where one does not fit."""
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
            raise AuditError(f"entry {entry.index}: the reply is signed with a key that is not {client!r}'s")
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


def _check_head(head: Head, entries: Sequence[Entry], *, who: str) -> None:
    if head.entries > len(entries):
        raise AuditError(f"entry {len(entries)} is missing: {who} saw {head.entries} entries; the trail was cut off")
    if head.entries and entries[head.entries - 1].hash != head.hash:
        raise AuditError(f"entry {head.entries - 1} is not the one that {who} saw: the trail was written anew")


def _check_countersigned(path: Path, entries: Sequence[Entry], known: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Heads of the finished chain that sites signed."""
    place = path.with_name(COUNTERSIGNED)
    if not place.is_file():
        return {}
    found: dict[str, int] = {}
    for item in read_json(place):
        try:
            client, key, said, signature = (item[name] for name in ("client", "key", "statement", "signature"))
            head = Head.parse(said["head"])
        except (KeyError, TypeError, AttributeError):
            raise AuditError(f"{COUNTERSIGNED} is not what was written: it was changed") from None
        if key not in known.get(client, (key,)) or not verify(key, "reply", canonical_json(said), signature):
            raise AuditError(f"the countersignature of {client!r} does not fit")
        _check_head(head, entries, who=f"site {client!r}")
        found[client] = head.entries
    return found


def check_rounds(entries: Iterable[Entry]) -> None:
    """That rounds follow one another, every request has one answer, and what was aggregated is what came in.

    Raises:
        AuditError: A step is missing or stands twice; the message names the entry where it shows.
    """
    last = 0
    asked: set[tuple[str, int]] = set()  # an answer may come in a later round than its request
    answered: list[str] = []
    is_plain = True
    for entry in (entry for entry in entries if entry.actor == COORDINATOR):
        number, client = entry.fields.get("round"), str(entry.fields.get("client", ""))
        if entry.event in _GOES_ON:
            last, answered = int(number or 0), []
            asked = {item for item in asked if entry.event == "shortfall" or item[1] <= last}
        elif entry.event == "request" and entry.fields.get("kind") not in _BESIDE_ROUNDS:
            if number != last + 1:
                raise AuditError(f"entry {entry.index}: a request of round {number} follows round {last}")
            asked.add((client, number))
            is_plain = entry.fields.get("kind") == "train"  # else only a protected sum was seen, of nobody's own update
        elif entry.event == "reply" and entry.fields.get("kind") == "train":
            if (client, number) not in asked:
                raise AuditError(f"entry {entry.index}: {client!r} answers, but was not asked in round {number}")
            answered.append(client)
        elif entry.event == "failure" and client in answered:
            answered.remove(client)  # it came, and could not be used
        elif entry.event == "aggregation":
            if number != last + 1 or (is_plain and entry.fields.get("clients") != answered):
                raise AuditError(f"entry {entry.index}: round {number} aggregates other updates than came in")
            last, answered, is_plain = int(number), [], True


def updates_of(entries: Iterable[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Each aggregation that counts, with the replies it is made of; rounds that a resume did again come once."""
    rounds: dict[int, tuple[Entry, list[Entry]]] = {}
    replies: list[Entry] = []
    for entry in entries:
        if entry.event == "failure":
            replies = [reply for reply in replies if reply.fields.get("client") != entry.fields.get("client")]
        elif entry.event in ("resumed", "shortfall"):
            rounds = {number: kept for number, kept in rounds.items() if number <= entry.fields["round"]}
            replies = []
        elif entry.event == "reply" and entry.fields.get("kind") == "train":
            replies.append(entry)
        elif entry.event == "aggregation":
            rounds[entry.fields["round"]] = (entry, replies)
            replies = []
    yield from (rounds[number] for number in sorted(rounds))
