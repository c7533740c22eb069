"""What a run folder says of its run so far, for pages that show it while it goes on; nothing in the folder is trusted.

Rows are folded as they come, into the few numbers that are shown, so that a run of a thousand rounds takes as long to
bring up to date as one of ten. A value of the wrong type counts as one that is not known.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError
from silotune.record.audit import CLOSED
from silotune.record.chain import has_ended
from silotune.record.follow import Document, Rows, is_held, last_lines
from silotune.record.printable import one_line
from silotune.report.runs import KINDS

MOST_CLIENTS, MOST_PARTS = 2000, 300
_LONGEST_WORD = 200
_AUDIT_BYTES = 1 << 17
_RATE_ROUNDS = 10
_SUM = "(sum)"
_SENT = ("bytes_up", "bytes_down")
_SHOWN_METRICS = ("accuracy", "perplexity", "preference_accuracy")


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number; None where there is none."""
    value = row.get(key)
    if type(value) is not float and type(value) is not int:  # True is no number
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(row: Mapping[str, Any], key: str) -> int | None:
    """A count, or a round; None where there is none."""
    value = number(row, key)
    return int(value) if value is not None and 0 <= value < 1e15 else None


def word(value: Any) -> str:
    """A name or a short text, safe to show; empty where there is none."""
    text = value if isinstance(value, str) else "" if value is None or isinstance(value, (dict, list)) else str(value)
    return _shown(text if len(text) <= _LONGEST_WORD else text[: _LONGEST_WORD - 1] + "…")


_shown = lru_cache(maxsize=4096)(one_line)
"""The names of a run's institutions come in every row."""


def inner(value: Any, *keys: str) -> dict[str, Any]:
    """The mapping below these keys; an empty one where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def words(value: Any) -> list[str]:
    """A list of names; empty where there is none."""
    return [word(each) for each in value[:MOST_CLIENTS]] if isinstance(value, list) else []


@dataclass(frozen=True, slots=True)
class Failure:
    """A client that gave no usable reply in a round."""

    round: int
    client: str
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Round:
    """One row of ``metrics.jsonl``: what is shown of it; None is what is not known."""

    number: int
    figure: float | None
    loss: float | None
    seconds: float | None
    bytes_up: float | None
    bytes_down: float | None
    joules: float | None
    epsilon: float | None
    asked: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(slots=True)
class Client:
    """What one institution did in a part."""

    losses: dict[int, float] = field(default_factory=dict)
    examples: int | None = None
    last: int | None = None
    joules: float = 0.0
    epsilon: float | None = None


@dataclass(slots=True)
class Part:
    """One mode of a run, or one isolated institution: its rows and what they come to."""

    path: Path
    mode: str
    client: str = ""
    kind: str = ""
    rounds: dict[int, Round] = field(default_factory=dict)
    clients: dict[str, Client] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    _metrics: Rows = field(init=False)
    _clients: Rows = field(init=False)
    result: Document = field(init=False)

    def __post_init__(self) -> None:
        self._metrics, self._clients = Rows(self.path / "metrics.jsonl"), Rows(self.path / "clients.jsonl")
        self.result = Document(self.path / "result.json")

    @property
    def faults(self) -> list[str]:
        """Lines about what cannot be read."""
        where = f"{self.mode}/{self.client}" if self.client else self.mode
        found = [*self._metrics.faults, *self._clients.faults, *filter(None, [self.result.fault])]
        return [f"{where}: {fault}" for fault in found]

    @property
    def last(self) -> Round | None:
        """The newest round."""
        return self.rounds[max(self.rounds)] if self.rounds else None

    @property
    def scored(self) -> list[tuple[int, float]]:
        """Round and main figure of each round that was scored."""
        return [(each.number, each.figure) for each in self._in_order() if each.figure is not None]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Round and mean training loss."""
        return [(each.number, each.loss) for each in self._in_order() if each.loss is not None]

    @property
    def is_done(self) -> bool:
        """Whether the part has its result."""
        return bool(self.result.value)

    def total(self, name: str) -> float | None:
        """A cost of all rounds together; None where no round knows it.

        Only institutions that learn together send adapters: what else is sent, such as pooled text, the result says.
        """
        if name in _SENT and self.mode != "federated":
            return number(self.result.value, name)
        known = [value for each in self.rounds.values() if (value := getattr(each, name)) is not None]
        if name == "joules" and any(client.joules for client in self.clients.values()):
            known += [client.joules for client in self.clients.values()]
        return sum(known) if known else None

    def seconds_a_round(self) -> float | None:
        """Of the newest rounds, round 0 left out, which only scores."""
        newest = [each.seconds for each in self._in_order()[-_RATE_ROUNDS:] if each.number and each.seconds is not None]
        return sum(newest) / len(newest) if newest else None

    def _in_order(self) -> list[Round]:
        return [self.rounds[key] for key in sorted(self.rounds)]

    def refresh(self) -> bool:
        """Folds what is new; tells whether there was any."""
        changed = self.result.refresh()
        anew, rows = self._metrics.new_rows()
        if anew:
            self.rounds.clear()
            self.failures.clear()
        for row in rows:
            self._take_round(row)
        is_other, more = self._clients.new_rows()
        if is_other:
            self.clients.clear()
        for row in more:
            self._take_client(row)
        return bool(changed or anew or rows or is_other or more)

    def _take_round(self, row: Mapping[str, Any]) -> None:
        place = whole(row, "round")
        if place is None:
            return
        self.kind = next((kind for kind in _SHOWN_METRICS if number(row, kind) is not None), self.kind)
        spent = [number(row, name) for name in ("train_seconds", "evaluate_seconds")]
        joules = [number(inner(row, "cost", name), "joules") for name in ("coordinator", "evaluation")]
        failed = row["failures"][:MOST_CLIENTS] if isinstance(row.get("failures"), list) else []
        told = [
            Failure(
                place, word(each.get("client")), word(each.get("rule") or each.get("stage")), word(each.get("reason"))
            )
            for each in failed
            if isinstance(each, dict)
        ]
        if place in self.rounds:
            self.failures = [failure for failure in self.failures if failure.round != place]
        self.failures.extend(told)
        self.rounds[place] = Round(
            place,
            number(row, self.kind) if self.kind else None,
            number(row, "train_loss"),
            _added(spent),
            number(row, "bytes_up"),
            number(row, "bytes_down"),
            _added(joules),
            number(row, "epsilon"),
            tuple(words(row.get("clients"))),
            tuple(failure.client for failure in told),
        )

    def _take_client(self, row: Mapping[str, Any]) -> None:
        place, name = whole(row, "round"), word(row.get("client"))
        if place is None or not name or (name not in self.clients and len(self.clients) >= MOST_CLIENTS):
            return
        client = self.clients.setdefault(name, Client())
        client.last = place
        client.examples = whole(row, "num_examples") if name != _SUM else None
        client.joules += number(row, "joules") or 0.0
        client.epsilon = number(row, "epsilon")
        loss = number(row, "loss")
        if loss is not None:
            client.losses[place] = loss


def _added(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


@dataclass(slots=True)
class Trail:
    """The newest entries of an audit trail, as they come; they are shown, not verified."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    _seen: tuple[int, int] = (0, 0)

    def refresh(self) -> bool:
        """Reads the end of the file where it has changed."""
        try:
            about = self.path.lstat()
        except OSError:
            now = (0, 0)
        else:
            now = (about.st_ino, about.st_size)
        if now == self._seen:
            return False
        self._seen = now
        rows = Rows(self.path)
        found = [rows.parsed(line) for line in last_lines(self.path, most_bytes=_AUDIT_BYTES)]
        self.entries = [row for row in found if isinstance(row.get("event"), str)]
        return True

    @property
    def number(self) -> int:
        """Entries in all, as the newest one says."""
        return (whole(self.entries[-1], "index") or 0) + 1 if self.entries else 0

    @property
    def is_closed(self) -> bool:
        """Whether the newest entry says that it is the last."""
        return bool(self.entries) and self.entries[-1]["event"] == CLOSED

    def present(self) -> tuple[int | None, str, list[str], list[str]]:
        """The round that goes on, the kind of the newest request in it, who was asked, and who has answered."""
        asked: dict[str, None] = {}
        done: dict[str, None] = {}
        kind, place = "", None
        for entry in self.entries:
            fields = inner(entry, "fields")
            name = word(fields.get("client"))
            if entry["event"] == "request":
                if (whole(fields, "round"), word(fields.get("kind"))) != (place, kind):
                    place, kind = whole(fields, "round"), word(fields.get("kind"))
                    asked, done = {}, {}
                asked[name] = None
            elif entry["event"] in ("reply", "refusal", "failure") and word(fields.get("kind") or kind) == kind:
                done[name] = None
            elif entry["event"] in ("aggregation", "shortfall", "result", CLOSED):
                place, kind, asked, done = None, "", {}, {}
        return place, kind, list(asked), list(done)


@dataclass(slots=True)
class WatchedRun:
    """A run folder, followed.

    Attributes:
        path: The folder.
        version: Goes up whenever something that is shown has changed.
        state: ``finished``, ``running``, ``stopped``, or ``unknown`` where the system does not say whether it runs.
    """

    path: Path
    version: int = 0
    state: str = "unknown"
    parts: dict[str, Part] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    started: float | None = None
    sessions: int = 0
    heard: float | None = None
    modes: list[str] = field(default_factory=list)
    planned: dict[str, int] = field(default_factory=dict)
    present: str = ""
    trail: Trail = field(init=False)
    _events: Rows = field(init=False)
    _documents: dict[str, Document] = field(init=False)
    _unreadable: str = ""

    def __post_init__(self) -> None:
        names = ("config", "versions", "partition", "privacy", "summary")
        self._documents = {name: Document(self.path / f"{name}.json") for name in names}
        self._events = Rows(self.path / "events.jsonl")
        self.trail = Trail(self.path / "federated" / "audit.jsonl")

    def document(self, name: str) -> dict[str, Any]:
        """What ``config``, ``versions``, ``partition``, ``privacy`` or ``summary`` holds; empty while there is none."""
        return self._documents[name].value

    @property
    def faults(self) -> list[str]:
        """Lines about what cannot be read."""
        told = [document.fault for document in self._documents.values() if document.fault]
        parts = [fault for part in self.parts.values() for fault in part.faults]
        return [*filter(None, [self._unreadable]), *told, *self._events.faults, *parts]

    @property
    def federated(self) -> Part | None:
        """The part in which institutions learn together."""
        return self.parts.get("federated")

    @property
    def shown(self) -> Part | None:
        """The part whose round and curve stand for the run: that which goes on, else the federated one."""
        if self.state != "finished" and self.present in self.parts:
            return self.parts[self.present]
        return self.federated or next(iter(self.parts.values()), None)

    def rounds_of(self, part: Part) -> int | None:
        """Rounds that a part is to have."""
        return self.planned.get(_key(part.mode, part.client)) or whole(
            inner(self.document("config"), "federation"), "rounds"
        )

    def seconds_left(self) -> float | None:
        """Of the part that goes on, at the pace of its newest rounds; None where it is not known."""
        part = self.shown
        if self.state != "running" or part is None or part.last is None:
            return None
        pace, rounds = part.seconds_a_round(), self.rounds_of(part)
        return None if pace is None or rounds is None else max(0.0, pace * (rounds - part.last.number))

    def total(self, name: str) -> float | None:
        """A cost of all parts together so far."""
        return _added([part.total(name) for part in self.parts.values()])

    def refresh(self) -> bool:
        """Reads what is new; tells whether anything that is shown has changed."""
        changed = False
        for document in self._documents.values():
            changed |= document.refresh()
        unreadable = ""
        try:
            changed |= self._refresh_events()
            self._find_parts()
            for part in self.parts.values():
                changed |= part.refresh()
            changed |= self.trail.refresh()
        except RunFolderError as error:
            unreadable = word(str(error))
        state = self._state()
        changed |= (state, unreadable) != (self.state, self._unreadable)
        self.state, self._unreadable = state, unreadable
        self.version += changed
        return changed

    def _state(self) -> str:
        with contextlib.suppress(RunFolderError):
            if has_ended(self.path):
                return "finished"
        held = is_held(self.path / ".lock")
        return "unknown" if held is None else "running" if held else "stopped"

    def _find_parts(self) -> None:
        for mode in self.modes or ("federated", "centralized"):
            if mode == "isolated":
                place = self.path / mode
                found = sorted(each.name for each in place.iterdir() if _is_own(each)) if _is_own(place) else []
                for name in found[:MOST_PARTS]:
                    self.parts.setdefault(_key(mode, name), Part(place / name, mode, word(name)))
            elif mode not in self.parts and _is_own(self.path / mode):
                self.parts[mode] = Part(self.path / mode, mode)

    def _refresh_events(self) -> bool:
        anew, lines = self._events.new_lines()
        if anew:
            self.notes.clear()
            self.sessions, self.started = 0, None
        for place, line in enumerate(lines, start=1):
            if line.startswith(_FREQUENT) and place < len(lines):
                self._events.number += 1
            else:
                self._take_event(self._events.parsed(line))
        return bool(anew or lines)

    def _take_event(self, row: Mapping[str, Any]) -> None:
        event = row.get("event")
        self.heard = number(row, "time") if "time" in row else self.heard
        if event == "run_started":
            self.sessions += 1
            self.started = self.started if self.started is not None else number(row, "time")
            self.modes = [mode for mode in words(row.get("modes")) if mode in _MODES]
        elif event == "note" and len(self.notes) < MOST_CLIENTS:
            self.notes[word_of_note(row.get("text"))] = None
        elif event == "mode_started":
            key = _key(word(row.get("mode")), word(row.get("client")))
            self.present = key
            rounds = whole(row, "rounds")
            if rounds is not None and len(self.planned) < MOST_PARTS:
                self.planned[key] = rounds


_MODES = ("federated", "isolated", "centralized")
_FREQUENT = (b'{"event": "client_finished"', b'{"event": "round_finished"', b'{"event": "sum_opened"')
"""Events of each round, which the rows of the parts say, too: they are counted and not read, but for the newest one."""


def _is_own(place: Path) -> bool:
    """Whether it is a folder of the run, and no link to another place."""
    return place.is_dir() and not place.is_symlink()


def _key(mode: str, client: str) -> str:
    return f"{mode}/{client}" if mode == "isolated" else mode


def word_of_note(value: Any) -> str:
    """A note of a run, which may be longer than a name."""
    return one_line(value[:2000]) if isinstance(value, str) else ""


def kind_title(part: Part) -> str:
    """What a part's main figure is called."""
    return KINDS[part.kind].title if part.kind else "figure"


def kind_text(part: Part, value: float | None) -> str:
    """A part's main figure for people."""
    return KINDS[part.kind].text(value) if part.kind else "-"
