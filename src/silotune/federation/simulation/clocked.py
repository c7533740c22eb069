"""Puts a simulated clock over the clients of this process: replies come in the order in which they would arrive.

Synchronous rounds end when enough clients have replied or at the deadline; what comes later is discarded, and recorded.
With a buffer, clients work all the time: a round is over when the buffer is full, and clients
that are still at work keep
training the model that they
were given (FedBuff, Nguyen et al. 2022). The work itself is done when a client starts; its reply is held back until
its simulated arrival, and checkpoints store it with the client's state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from silotune.federation.simulation.attack import Simulated
from silotune.federation.simulation.pace import Pace
from silotune.settings.links import ClockSection
from silotune.structs import Failure, Reply, Request, SiteState, Tensors

PENDING = "pending"


@dataclass(frozen=True)
class _Pending:
    """A reply or failure on its way: when it arrives, and its place in the order in which work was started."""

    seconds: float
    place: int
    outcome: Reply | Failure


class Clocked:
    """Clients in this process, under a simulated clock.

    Args:
        inner: The clients.
        paces: How fast each of them is.
        settings: The ``[federation.clock]`` section.
        wanted: Number of replies that end a synchronous round (later ones are discarded), or, with a buffer, the
            number of clients that work at the same time.
        now: Simulated seconds since the run began.
    """

    def __init__(
        self,
        inner: Simulated,
        paces: Mapping[str, Pace],
        *,
        settings: ClockSection,
        wanted: int,
        now: float = 0.0,
    ) -> None:
        self._inner = inner
        self._paces = paces
        self._settings = settings
        self._wanted = wanted
        self._now = now
        self._started = 0
        self._at_work: dict[str, _Pending] = {}

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""
        return self._inner.clients()

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields replies and failures as they arrive; ``simulated_seconds`` says when.

        With a buffer, requests are offers: they are taken in their order as clients are free, those at work are passed
        over, and replies may answer requests of earlier rounds.
        """
        train = all(request.kind == "train" for request in requests.values())
        if not train:
            return self._inner.exchange(requests, timeout_seconds=timeout_seconds)
        return self._synchronous(requests) if self._settings.buffer is None else self._buffered(requests)

    def states(self) -> dict[str, SiteState]:
        """What every client keeps between rounds, its reply on the way included."""
        states = self._inner.states()
        for name, pending in self._at_work.items():
            states[name] = _with_pending(states.get(name, SiteState()), pending)
        return states

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept, and puts replies on their way again."""
        parted = {name: _without_pending(state) for name, state in states.items()}
        self._inner.restore({name: state for name, (state, _) in parted.items()})
        self._at_work = {name: pending for name, (_, pending) in parted.items() if pending is not None}
        self._started = 1 + max((pending.place for pending in self._at_work.values()), default=-1)

    def _synchronous(self, requests: Mapping[str, Request]) -> Iterator[Reply | Failure]:
        start, usable = self._now, 0
        limit = start + (self._settings.deadline_seconds or math.inf)
        for pending in sorted(self._begun(requests, start), key=lambda item: (item.seconds, item.place)):
            outcome = pending.outcome
            if usable == self._wanted:
                yield _discarded(outcome, "late", f"{usable} clients had replied already")
            elif pending.seconds > limit:
                self._now = limit
                reason = f"its reply takes {pending.seconds - start:.6g} simulated seconds"
                yield replace(_discarded(outcome, "deadline", reason), simulated_seconds=limit)
            else:
                self._now = pending.seconds
                usable += isinstance(outcome, Reply)
                yield replace(outcome, simulated_seconds=pending.seconds)

    def _buffered(self, requests: Mapping[str, Request]) -> Iterator[Reply | Failure]:
        offers = iter([request for name, request in requests.items() if name not in self._at_work])
        usable = 0
        while usable < (self._settings.buffer or 1):
            free = self._wanted - len(self._at_work)
            starting = {request.client: request for _, request in zip(range(free), offers, strict=False)}
            for pending in self._begun(starting, self._now):
                self._at_work[pending.outcome.client] = pending
            if not self._at_work:
                return
            name, first = min(self._at_work.items(), key=lambda item: (item[1].seconds, item[1].place))
            del self._at_work[name]
            self._now = first.seconds
            usable += isinstance(first.outcome, Reply)
            yield replace(first.outcome, simulated_seconds=first.seconds)

    def _begun(self, requests: Mapping[str, Request], start: float) -> Iterator[_Pending]:
        """The outcomes of requests sent at ``start``, with the time at which each arrives."""
        for outcome in self._inner.exchange(requests, timeout_seconds=math.inf):
            pace = self._paces[outcome.client]
            if isinstance(outcome, Reply):
                steps = outcome.body.get("steps", 0)
                seconds = pace.replied(start, outcome.bytes_down, outcome.bytes_up, steps)
            else:
                seconds = pace.received(start, outcome.bytes_down)
            yield _Pending(seconds, self._started, outcome)
            self._started += 1


def _discarded(outcome: Reply | Failure, stage: str, reason: str) -> Failure:
    if isinstance(outcome, Failure):
        return outcome
    return Failure(outcome.client, outcome.round_number, stage, reason, outcome.bytes_down, outcome.bytes_up)


def _with_pending(state: SiteState, pending: _Pending) -> SiteState:
    outcome = pending.outcome
    about: dict[str, Any] = {"seconds": pending.seconds, "place": pending.place}
    tensors: Tensors = {}
    if isinstance(outcome, Reply):
        about["reply"] = [outcome.kind, outcome.round_number, dict(outcome.body), outcome.bytes_down, outcome.bytes_up]
        about["names"] = list(outcome.tensors)
        tensors = outcome.tensors
    else:
        about["failure"] = [outcome.round_number, outcome.stage, outcome.reason, outcome.bytes_down, outcome.bytes_up]
    return replace(state, pending=tensors, data={**state.data, PENDING: {**about, "client": outcome.client}})


def _without_pending(state: SiteState) -> tuple[SiteState, _Pending | None]:
    if PENDING not in state.data:
        return state, None
    about = state.data[PENDING]
    left = replace(state, pending={}, data={key: value for key, value in state.data.items() if key != PENDING})
    outcome: Reply | Failure
    if "reply" in about:
        kind, number, body, down, up = about["reply"]
        tensors = {name: state.pending[name] for name in about["names"]}
        outcome = Reply(kind, number, about["client"], tensors, body, down, up)
    else:
        number, stage, reason, down, up = about["failure"]
        outcome = Failure(about["client"], number, stage, reason, down, up)
    return left, _Pending(about["seconds"], about["place"], outcome)
