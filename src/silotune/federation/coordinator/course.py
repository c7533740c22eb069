"""Checks the course of a run in a coordinator's trail: its rounds follow one another and no step is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from silotune.errors import AuditError, MessageError
from silotune.federation.kinds import Kind, kind_named
from silotune.record.audit import CLOSED, COORDINATOR
from silotune.record.chain import Entry, Verified, verify_chain

_OF_EVENT: Mapping[str, Mapping[str, type]] = {
    "started": {"round": int, "weights": str},
    "resumed": {"round": int, "weights": str},
    "request": {"kind": str, "round": int, "client": str},
    "reply": {"kind": str, "round": int, "client": str},
    "refusal": {"round": int, "client": str},
    "failure": {"round": int, "client": str},
    "shortfall": {"round": int, "tried": int},
    "aggregation": {"round": int, "clients": list, "weights": str},
    "checkpoint": {"round": int, "sha256": str},
    "result": {"round": int, "weights": str, "adapter": str, "result": str},
    CLOSED: {"round": int, "manifest": str, "files": int, "trail": str},
}
"""Event of a coordinator -> its fields and their types. A signature does not vouch for them: whoever has the key
could have signed anything."""


def verify_trail(
    path: Path, *, keys: Mapping[str, Sequence[str]] | None = None, is_open_allowed: bool = False
) -> Verified:
    """Verifies a chain, as ``verify_chain`` does, and the course of the run that it tells.

    Raises:
        AuditError: Something is wrong; the message names the first bad entry.
    """
    found = verify_chain(path, keys=keys, is_open_allowed=is_open_allowed)
    check_rounds(found.entries)
    return found


class Step(Protocol):
    """The properties of an entry of a trail that the checks read."""

    @property
    def index(self) -> int: ...
    @property
    def actor(self) -> str: ...
    @property
    def event(self) -> str: ...
    @property
    def fields(self) -> Mapping[str, Any]: ...


@dataclass
class _Course:
    """What a coordinator's entries say of its rounds, up to one of them.

    Attributes:
        last: The round after which the run goes on.
        weights: Round -> digest of the global model after it; the last one of a round that was done again.
        asked: Clients that were asked, with the round; an answer may come in a later round than its request.
        answered: Clients whose updates wait to be aggregated.
        is_plain: Whether clients were asked for their own updates; else only a protected sum was seen.
        has_result: Whether the model that the run ends with was named, and no round came after that.
    """

    last: int = 0
    weights: dict[int, str] = field(default_factory=dict)
    asked: set[tuple[str, int]] = field(default_factory=set)
    answered: list[str] = field(default_factory=list)
    is_plain: bool = True
    has_result: bool = False

    def started(self, entry: Step) -> None:
        if self.weights or entry.fields["round"] != 0:
            raise AuditError(f"entry {entry.index}: a run starts once, before round 1")
        self.weights[0] = entry.fields["weights"]

    def resumed(self, entry: Step) -> None:
        number = entry.fields["round"]
        if self.weights.get(number) != entry.fields["weights"]:
            raise AuditError(
                f"entry {entry.index}: the run goes on from another model than it had after round {number}"
            )
        self.weights = {known: weights for known, weights in self.weights.items() if known <= number}
        self.asked = {item for item in self.asked if item[1] <= number}
        self.last, self.answered, self.has_result = number, [], False

    def shortfall(self, entry: Step) -> None:
        number, tried = entry.fields["round"], entry.fields["tried"]
        if tried != self.last + 1 or number not in (self.last, tried):
            raise AuditError(f"entry {entry.index}: round {tried} falls short after round {self.last}")
        self.weights[number] = self.weights[self.last]  # a round that is passed over changes nothing
        self.last, self.answered = number, []

    def request(self, entry: Step) -> None:
        number, kind = entry.fields["round"], _kind_of(entry)
        if not kind.sends_update and not kind.is_protected:
            return  # it belongs to no round's aggregation
        if number != self.last + 1:
            raise AuditError(f"entry {entry.index}: a request of round {number} follows round {self.last}")
        self.asked.add((entry.fields["client"], number))
        self.is_plain = not kind.is_protected

    def reply(self, entry: Step) -> None:
        client, number = entry.fields["client"], entry.fields["round"]
        if not _is_update(entry):
            return
        if (client, number) not in self.asked:
            raise AuditError(f"entry {entry.index}: {client!r} answers, but was not asked in round {number}")
        self.answered.append(client)

    def failure(self, entry: Step) -> None:
        if entry.fields["client"] in self.answered:
            self.answered.remove(entry.fields["client"])  # it came, and could not be used

    def aggregation(self, entry: Step) -> None:
        number = entry.fields["round"]
        if number != self.last + 1 or (self.is_plain and entry.fields["clients"] != self.answered):
            raise AuditError(f"entry {entry.index}: round {number} aggregates other updates than came in")
        self.weights[number] = entry.fields["weights"]
        self.last, self.answered, self.is_plain, self.has_result = number, [], True, False

    def checkpoint(self, entry: Step) -> None:
        if entry.fields["round"] != self.last:
            raise AuditError(f"entry {entry.index}: a checkpoint of round {entry.fields['round']} in round {self.last}")

    def result(self, entry: Step) -> None:
        number = entry.fields["round"]
        if self.weights.get(number) != entry.fields["weights"]:
            raise AuditError(f"entry {entry.index}: the result is another model than the run had after round {number}")
        self.has_result = True

    def closed(self, entry: Step) -> None:
        if not self.has_result:
            raise AuditError(f"entry {entry.index}: the trail was closed before its run had a result")


_STEPS: Mapping[str, Callable[[_Course, Step], None]] = {
    "started": _Course.started,
    "resumed": _Course.resumed,
    "shortfall": _Course.shortfall,
    "request": _Course.request,
    "reply": _Course.reply,
    "failure": _Course.failure,
    "aggregation": _Course.aggregation,
    "checkpoint": _Course.checkpoint,
    "result": _Course.result,
    CLOSED: _Course.closed,
}
"""Event of a coordinator -> the method that checks its entry against the course so far, and adds it to the course."""


def _kind_of(entry: Step) -> Kind:
    try:
        return kind_named(entry.fields["kind"])
    except MessageError as error:
        raise AuditError(f"entry {entry.index}: {error}") from None


def _is_update(entry: Step) -> bool:
    """Whether a reply holds a client's own update."""
    kind = _kind_of(entry)
    return kind.sends_update and not kind.is_protected


def check_rounds(entries: Iterable[Step]) -> Mapping[int, str]:
    """Checks that rounds follow one another, every reply was asked for, and each round aggregates what came in.

    It also checks that a run goes on from a model that it had, ends with one that it had, and that nothing follows its
    end.

    Returns:
        Round -> digest of the global model after it, of a coordinator's rounds that count; round 0 is the start.

    Raises:
        AuditError: A step is missing or stands twice; the message names the entry where it shows.
    """
    course, before = _Course(), ""
    for entry in (entry for entry in entries if entry.actor == COORDINATOR):
        _check_fields(entry)
        if before == CLOSED:
            raise AuditError(f"entry {entry.index} follows the one that closed the trail")
        if not before and entry.event != "started":
            raise AuditError(f"entry {entry.index}: a coordinator's trail begins with 'started', not {entry.event!r}")
        if entry.event in _STEPS:
            _STEPS[entry.event](course, entry)
        before = entry.event
    return course.weights


def _check_fields(entry: Step) -> None:
    for name, kind in _OF_EVENT.get(entry.event, {}).items():
        if not isinstance(entry.fields.get(name), kind):
            raise AuditError(
                f"entry {entry.index} is not one of {entry.event!r}: its {name!r} is missing or of another type"
            )


def updates_of(entries: Iterable[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Gives each aggregation that counts, with its replies; where a round was done again, its last try counts."""
    rounds: dict[int, tuple[Entry, list[Entry]]] = {}
    replies: list[Entry] = []
    for entry in entries:
        if entry.event == "failure":
            replies = [reply for reply in replies if reply.fields.get("client") != entry.fields.get("client")]
        elif entry.event in ("resumed", "shortfall"):
            rounds = {number: kept for number, kept in rounds.items() if number <= entry.fields["round"]}
            replies = []
        elif entry.event == "reply" and _is_update(entry):
            replies.append(entry)
        elif entry.event == "aggregation":
            rounds[entry.fields["round"]] = (entry, replies)
            replies = []
    yield from (rounds[number] for number in sorted(rounds))
