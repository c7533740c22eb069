"""All that a coordinator does: rounds of requests, aggregation, scoring, records and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from silotune.errors import FederationError, MessageError, ProtectionError
from silotune.federation import witness
from silotune.federation.links import address
from silotune.federation.messages import TrainReport, read_report
from silotune.federation.sampling import offered_clients, sample_clients
from silotune.federation.secure import Asking, Collector
from silotune.federation.stopping import why_stop
from silotune.federation.witness import Audit
from silotune.methods.algorithms import Method
from silotune.record.cost import Meter
from silotune.record.runs import RunFolder
from silotune.sections import BudgetSection, DownloadSection
from silotune.seeds import derive
from silotune.structs import (
    ClientUpdate,
    Failure,
    Observer,
    Reply,
    Request,
    RoundRecord,
    ServerState,
    SiteState,
    Spent,
    Tensors,
)
from silotune.tensors import all_finite, check_alike, scale

_COUNTERSIGN_SECONDS = 60.0


class Transport(Protocol):
    """Carries requests to clients and replies back; it knows nothing of what they say."""

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, as they arrive."""

    def states(self) -> dict[str, SiteState]:
        """What clients keep between rounds, where this process holds it."""


@dataclass(frozen=True)
class Plan:
    """What a run of rounds is to do.

    Attributes:
        rounds: In all, those done before a resume counted in.
        method: Aggregation, server step and correction.
        body: Of every ``train`` request.
        seed: The run's seed.
        clients_per_round: Sampled each round; None for all.
        timeout_seconds: Bound on the wait for a reply.
        min_replies: A round with fewer usable replies ends the run with an error.
        score: Metrics of the global model on the gold-standard set.
        select: Selection metric of the global model, the higher the better; None where nothing is selected.
        every: Rounds between two scorings; the first state and the last round are always scored.
        patience: Rounds without a better selection metric before the run stops; None for never.
        target: Selection metric at which the run stops, turned as ``select`` turns it; None for never.
        budget: What the rounds may spend.
        checkpoint_every: Rounds between checkpoints; the last is always written.
        download: How the tensors of requests are compressed.
        staleness_exponent: An update that is s rounds late is scaled by (1 + s)^-exponent; None: none may be late.
        meter: Counts what this process spends.
        audit: The trail to keep, and the keys of clients; None for no trail.
        protected: Asks for updates in another way, of which only the sum is seen; None to ask each client for its own.
    """

    rounds: int
    method: Method
    body: Mapping[str, Any]
    seed: int
    clients_per_round: int | None = None
    timeout_seconds: float = 3600.0
    min_replies: int = 1
    score: Callable[[Tensors], Mapping[str, Any]] | None = None
    select: Callable[[Tensors], float] | None = None
    every: int = 1
    patience: int | None = None
    target: float | None = None
    budget: BudgetSection = BudgetSection()
    checkpoint_every: int = 1
    download: DownloadSection = field(default_factory=DownloadSection)
    staleness_exponent: float | None = None
    meter: Meter = field(default_factory=Meter)
    audit: Audit | None = None
    protected: Collector | None = None


@dataclass
class _Round:
    """What comes in during one round; each update is handed on and forgotten. ``seconds`` is the simulated clock's."""

    number: int
    clients: tuple[str, ...]
    expected: Tensors
    audit: Audit | None = None
    staleness_exponent: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float | None = None

    def updates(self, replies: Iterator[Reply | Failure], notify: Observer) -> Iterator[ClientUpdate]:
        for reply in replies:
            if isinstance(reply, Failure):
                self.fail(reply, notify)
                continue
            try:
                report = self._checked(reply)
            except MessageError as error:
                sizes = (reply.bytes_down, reply.bytes_up)
                failure = Failure(self._known(reply.client), self.number, "reply", str(error), *sizes)
                witness.fails(self.audit, failure)
                self.fail(failure, notify)
                continue
            row = {"round": self.number, "client": reply.client, **report.model_dump()}
            staleness = self.number - reply.round_number
            if reply.simulated_seconds is not None:
                row["simulated_seconds"] = self.seconds = reply.simulated_seconds
            if self.staleness_exponent is not None:
                row["staleness"] = staleness
            self.rows.append({**row, "bytes_up": reply.bytes_up, "bytes_down": reply.bytes_down})
            notify("client_finished", row)
            factor = (1 + staleness) ** -(self.staleness_exponent or 0.0)
            delta = reply.tensors if factor == 1 else scale(reply.tensors, factor)
            yield ClientUpdate(reply.client, delta, report.num_examples, report.loss, report.steps)
            del reply, delta  # or they would live on until the next one is there

    def _checked(self, reply: Reply) -> TrainReport:
        """The report of a reply that answers this round's request, once."""
        is_late = self.staleness_exponent is not None and 1 <= reply.round_number < self.number
        answers = reply.kind == "train" and (reply.round_number == self.number or is_late)
        if not answers or reply.client not in self.clients:
            raise MessageError(f"a reply answers no request of round {self.number}")
        if any(row["client"] == reply.client for row in self.rows):
            raise MessageError(f"{reply.client!r} replied twice in round {self.number}")
        check_alike(self.expected, reply.tensors)
        if not all_finite(reply.tensors):
            raise MessageError(f"the update of {reply.client!r} holds values that are not finite")
        return read_report(reply)

    def _known(self, client: str) -> str:
        return client if client in self.clients else "unknown"

    def fail(self, failure: Failure, notify: Observer) -> None:
        """A client gave no usable reply."""
        self.failures.append(failure)
        if failure.simulated_seconds is not None:
            self.seconds = failure.simulated_seconds
        notify("client_failed", {"client": failure.client, "round": self.number, "reason": failure.reason})

    def usable(self) -> int:
        """Clients whose update is in the aggregate; a protected sum has one row for several."""
        return sum(int(row.get("clients_in_sum", 1)) for row in self.rows)

    def total(self, name: str) -> int:
        return sum(int(row[name]) for row in self.rows)

    def bytes_down(self) -> int:
        """Requests to clients that failed were sent, too."""
        return self.total("bytes_down") + sum(failure.bytes_down for failure in self.failures)

    def bytes_up(self) -> int:
        return self.total("bytes_up") + sum(failure.bytes_up for failure in self.failures)

    def taking_part(self) -> tuple[str, ...]:
        """Who was asked; of asynchronous rounds, which offer work to all, who replied or failed."""
        if self.staleness_exponent is None:
            return self.clients
        return tuple([*(row["client"] for row in self.rows), *(failure.client for failure in self.failures)])

    def joules(self) -> float | None:
        """Of the clients; None where one does not know."""
        known = [row["joules"] for row in self.rows]
        return None if None in known else sum(known)

    def mean_loss(self) -> float | None:
        known = [row for row in self.rows if row["loss"] is not None]
        weight = sum(int(row["num_examples"]) for row in known)
        return sum(row["loss"] * row["num_examples"] for row in known) / weight if weight else None


def run_rounds(
    plan: Plan,
    transport: Transport,
    state: ServerState,
    run: RunFolder,
    *,
    notify: Observer = lambda event, fields: None,
) -> ServerState:
    """Runs the rounds that are still to do, recording each; a checkpoint is written after each.

    Args:
        plan: What to do.
        transport: How to reach the clients.
        state: Where to begin: round 0, or what a checkpoint held.
        run: Folder of this run of rounds; its lock is held by the caller.
        notify: Told of every event.

    Raises:
        FederationError: A round had fewer usable replies than ``plan.min_replies``.
    """
    for name in ("metrics", "clients"):
        run.keep_rounds(name, state.round_number if state.round_number else -1)
    if state.round_number == 0:
        state = _begin(plan, state, run, notify)
    witness.begins(plan.audit, state, plan.body)
    while state.round_number < plan.rounds and not state.stopped:
        try:
            state = _one_round(plan, transport, state, run, notify)
        finally:
            witness.flush(plan.audit)
        if state.round_number % plan.checkpoint_every == 0 or state.round_number == plan.rounds or state.stopped:
            run.save_checkpoint(state, transport.states())
    return state


def exchange(plan: Plan, transport: Transport, requests: Mapping[str, Request]) -> Iterator[Reply | Failure]:
    """Sends requests and yields what comes back; both enter the audit trail, where one is kept."""
    sent = witness.outgoing(plan.audit, requests)
    replies = transport.exchange(sent, timeout_seconds=plan.timeout_seconds)
    return witness.incoming(plan.audit, replies, sent)


def countersign(plan: Plan, transport: Transport, round_number: int) -> tuple[str, ...]:
    """Asks every site with a key to sign the end of the closed audit trail; gives those that did, within a minute."""
    if plan.audit is None or not plan.audit.keys:
        return ()
    requests = witness.countersign_requests(plan.audit, round_number)
    replies = transport.exchange(requests, timeout_seconds=min(plan.timeout_seconds, _COUNTERSIGN_SECONDS))
    return witness.keep_countersignatures(plan.audit, replies, requests)


def _begin(plan: Plan, state: ServerState, run: RunFolder, notify: Observer) -> ServerState:
    """Scores the model before round 1."""
    begun = plan.meter.coordinator()
    metrics, seconds = _scored(plan, state.weights)
    if metrics:
        cost = _cost(plan, begun, begun, plan.meter.coordinator())
        record = RoundRecord(0, metrics, (), (), None, 0.0, seconds, 0, 0, cost)
        _write(record, plan, run, notify)
    if plan.select is not None:
        best = plan.select(state.weights)
        state = replace(state, best_metric=best, best_weights=state.weights)
    return replace(state, seconds=state.seconds + seconds)


def _one_round(plan: Plan, transport: Transport, state: ServerState, run: RunFolder, notify: Observer) -> ServerState:
    began, begun = time.perf_counter(), plan.meter.coordinator()
    number = state.round_number + 1
    pick = sample_clients if plan.staleness_exponent is None else offered_clients
    clients = pick(transport.clients(), plan.clients_per_round, seed=plan.seed, round_number=number)
    sent = plan.method.sent(state.weights, state.memory)
    incoming = _Round(number, clients, sent, plan.audit, plan.staleness_exponent)

    def send(requests: Mapping[str, Request]) -> Iterator[Reply | Failure]:
        return exchange(plan, transport, requests)

    asking = Asking(number, clients, sent, sent, plan.body, send, incoming, notify)
    held: Tensors = {}
    if plan.protected is not None:
        updates = plan.protected(asking)
    else:
        asked = {name: Request("train", number, name, sent, plan.body) for name in clients}
        rounding = derive(plan.seed, "compress", round_number=number)
        requests, held = address(asked, plan.download, held=state.held, holders=state.holders, seed=rounding)
        updates = incoming.updates(send(requests), notify)
    delta = _aggregated(plan, incoming, updates)
    share = incoming.usable() / len(transport.clients())
    weights, memory = plan.method.step(state.weights, delta, state.memory, share)
    witness.aggregates(plan.audit, number, [row["client"] for row in incoming.rows], weights, share=share)
    train_seconds, trained = time.perf_counter() - began, plan.meter.coordinator()
    due = number % plan.every == 0 or number == plan.rounds
    metrics, evaluate_seconds = _scored(plan, weights) if due else ({}, 0.0)
    witness.scores(plan.audit, number, metrics)
    record = RoundRecord(
        number,
        metrics,
        incoming.taking_part(),
        tuple(incoming.failures),
        incoming.mean_loss(),
        train_seconds,
        evaluate_seconds,
        incoming.bytes_up(),
        incoming.bytes_down(),
        _cost(plan, begun, trained, plan.meter.coordinator()),
        incoming.seconds,
    )
    run.append("clients", *incoming.rows)
    _write(record, plan, run, notify)
    after = replace(
        state,
        round_number=number,
        weights=weights,
        memory=memory,
        held=held,
        holders=tuple(row["client"] for row in incoming.rows) if held else (),
        bytes_up=state.bytes_up + record.bytes_up,
        bytes_down=state.bytes_down + record.bytes_down,
        simulated_seconds=state.simulated_seconds if incoming.seconds is None else incoming.seconds,
        joules=(Spent(0.0, state.joules) + Spent(0.0, incoming.joules()) + (trained - begun)).joules,
    )
    after = _selected(plan, after)
    if not after.stopped:
        after = replace(after, stopped=why_stop(state, after, target=plan.target, budget=plan.budget))
    return replace(after, seconds=state.seconds + time.perf_counter() - began)


def _aggregated(plan: Plan, incoming: _Round, updates: Iterator[ClientUpdate]) -> Tensors:
    try:
        delta = plan.method.aggregate(updates)
    except FederationError as error:
        kind = ProtectionError if isinstance(error, ProtectionError) else FederationError
        raise kind("; ".join(filter(None, [str(error), _why(incoming)]))) from error
    if incoming.usable() < plan.min_replies:
        raise FederationError(
            f"{incoming.usable()} usable replies of {len(incoming.clients)}, "
            f"federation.min_replies = {plan.min_replies}; {_why(incoming)}"
        )
    return delta


def _why(incoming: _Round) -> str:
    if not incoming.failures:
        return ""
    first = incoming.failures[0]
    more = f" (and {len(incoming.failures) - 1} more)" if len(incoming.failures) > 1 else ""
    return f"client {first.client!r} failed in round {first.round_number} at {first.stage}: {first.reason}{more}"


def _scored(plan: Plan, weights: Tensors) -> tuple[Mapping[str, Any], float]:
    began = time.perf_counter()
    metrics = plan.score(weights) if plan.score is not None else {}
    return metrics, time.perf_counter() - began


def _cost(plan: Plan, begun: Spent, trained: Spent, scored: Spent) -> dict[str, Any]:
    """What this process spent on a round beside its clients' training, and the memory it held so far."""
    return {
        "coordinator": trained - begun,
        "evaluation": scored - trained,
        "energy_source": plan.meter.gauge.source(),
        "peak_memory_bytes": plan.meter.memory.now_bytes(),
        "gpu_peak_memory_bytes": plan.meter.memory.gpu_bytes(),
    }


def _selected(plan: Plan, state: ServerState) -> ServerState:
    """Keeps the best round so far, and stops the run when patience has run out."""
    if plan.select is None:
        return state
    metric = plan.select(state.weights)
    if state.best_metric is None or metric > state.best_metric:
        return replace(state, best_round=state.round_number, best_metric=metric, best_weights=state.weights)
    waited = state.round_number - state.best_round
    if plan.patience is not None and waited >= plan.patience:
        return replace(state, stopped=f"no better selection metric for {waited} rounds")
    return state


def _failure_row(failure: Failure) -> dict[str, str]:
    row = {"client": failure.client, "stage": failure.stage, "reason": failure.reason}
    return {**row, "rule": failure.rule} if failure.rule else row


def _write(record: RoundRecord, plan: Plan, run: RunFolder, notify: Observer) -> None:
    row = {
        "round": record.round_number,
        **record.metrics,
        "train_loss": record.train_loss,
        "train_seconds": record.train_seconds,
        "evaluate_seconds": record.evaluate_seconds,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        **({} if record.simulated_seconds is None else {"simulated_seconds": record.simulated_seconds}),
        "cost": dict(record.cost),
        "clients": list(record.clients),
        "failures": [_failure_row(item) for item in record.failures],
    }
    run.append("metrics", row)
    notify(
        "round_finished",
        {
            "round": record.round_number,
            "rounds": plan.rounds,
            "metrics": record.metrics,
            "train_loss": record.train_loss,
            "seconds": record.train_seconds + record.evaluate_seconds,
        },
    )
