"""All that a coordinator does: rounds of requests, aggregation, scoring, records and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from silotune.errors import BudgetError, FederationError, ProtectionError
from silotune.federation.coordinator import audit as audit_trail
from silotune.federation.coordinator.audit import Audit
from silotune.federation.coordinator.decisions import (
    SHORTFALLS,
    TooFewRepliesError,
    again_without_liars,
    note_of_still,
    offered_clients,
    sample_clients,
    why_stop,
)
from silotune.federation.coordinator.exchange import Asking, Collector, lasting
from silotune.federation.coordinator.privacy import CentralPrivacy, begin_round, refuse_overspending, with_epsilon
from silotune.federation.coordinator.replies import Incoming
from silotune.federation.coordinator.settlement import Reported, Settlement
from silotune.federation.kinds import TRAIN
from silotune.federation.wire.links import address
from silotune.federation.wire.run_setup import RunSettings
from silotune.federation.wire.transport import Transport
from silotune.lora import cut
from silotune.methods.algorithms import Method, advance
from silotune.methods.products import Products
from silotune.methods.schedule import outgoing, returned
from silotune.record.cost import Meter
from silotune.record.runs import RunFolder
from silotune.seeds import derive
from silotune.settings.links import DownloadSection
from silotune.settings.sections import BudgetSection
from silotune.structs import (
    ClientUpdate,
    Failure,
    Observer,
    Reply,
    Request,
    RoundRecord,
    ServerState,
    Spent,
    Tensors,
)
from silotune.tensors import same_bits


class ComputesPart(Protocol):
    """A compute server that trains a part of the model together with the clients, as the coordinator sees it."""

    def begin(self, number: int, weights: Tensors, clients: Sequence[str]) -> None:
        """A round begins, or begins again, from the global model's tensors."""
        ...

    def completed(self, update: ClientUpdate) -> ClientUpdate:
        """A client's update with what the server's part has moved for it alone, if anything."""
        ...

    def end(self) -> Tensors:
        """The server's tensors after the round; empty where they are in the updates."""
        ...

    def figures(self) -> Mapping[str, Any]:
        """Messages, bytes and errors of the round by crossing."""
        ...

    def bytes_up(self) -> int:
        """Bytes that clients sent to this server in the round."""
        ...

    def bytes_down(self) -> int:
        """Bytes that it sent to them."""
        ...


@dataclass(frozen=True)
class Plan:
    """What a run of rounds is to do.

    Attributes:
        rounds: In all, those done before a resume counted in.
        method: Aggregation, server step and correction.
        body: The order in every ``train`` request.
        settings: The run's settings that the clients act by.
        seed: The run's seed.
        clients_per_round: Sampled each round; None for all.
        ranks: LoRA rank by client; those not named have the adapter's.
        timeout_seconds: Bound on the wait for a reply.
        min_replies: Fewest usable replies of a round.
        below_minimum: What a round with fewer does: ``stop`` the run, ``wait`` and try again, or ``skip``.
        score: Metrics of the global model on the gold-standard set.
        select: Selection metric of the global model, the higher the better; None where nothing is selected.
        every: Rounds between two scorings; the first state and the last round are always scored.
        select_every: Rounds between two looks at the selection metric; the last round always has one.
        patience: Rounds without a better selection metric before the run stops; None for never.
        target: Selection metric at which the run stops, with the sign that ``select`` gives it; None for never.
        budget: What the rounds may spend.
        checkpoint_every: Rounds between checkpoints; the last is always written.
        download: How the tensors of requests are compressed.
        staleness_exponent: An update that is s rounds late is scaled by (1 + s)^-exponent; None: none may be late.
        meter: Counts what this process spends.
        privacy: Noise on the mean update; None for none, or where the sites add it.
        reported: What bounds an epsilon that a client reports; None where no client may report one.
        audit: The trail to keep, and the keys of clients; None for no trail.
        protected: Collects updates so that only their sum is seen; None to ask each client for its own.
        compute: Trains a part of the model with the clients; None where they train all of it.
    """

    rounds: int
    method: Method
    body: Mapping[str, Any]
    seed: int
    settings: RunSettings = RunSettings()
    clients_per_round: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    timeout_seconds: float = 3600.0
    min_replies: int = 1
    below_minimum: str = "stop"
    score: Callable[[Tensors], Mapping[str, Any]] | None = None
    select: Callable[[Tensors], float] | None = None
    every: int = 1
    select_every: int = 1
    patience: int | None = None
    target: float | None = None
    budget: BudgetSection = BudgetSection()
    checkpoint_every: int = 1
    download: DownloadSection = field(default_factory=DownloadSection)
    staleness_exponent: float | None = None
    meter: Meter = field(default_factory=Meter)
    privacy: CentralPrivacy | None = None
    reported: Reported | None = None
    audit: Audit | None = None
    protected: Collector | None = None
    compute: ComputesPart | None = None


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

    A run whose privacy budget is spent ends before its last round, as a stopped one.

    Raises:
        FederationError: A round had fewer usable replies than ``plan.min_replies``.
        BudgetError: The budget does not allow the first round.
    """
    for name in ("metrics", "clients"):
        run.keep_rounds(name, state.round_number if state.round_number else -1)
    if state.round_number == 0:
        state = _begin(plan, state, run, notify)
    audit_trail.begins(plan.audit, state, plan.body)
    tries = 0
    while state.round_number < plan.rounds and not state.stopped:
        try:
            state = _one_round(plan, transport, state, run, notify)
            tries = 0
        except BudgetError as error:
            if state.round_number == 0:
                raise
            state = replace(state, stopped=str(error))
        except TooFewRepliesError as error:
            tries += 1
            excluded = {**state.excluded, **error.incoming.excluded}
            state = replace(state, held={}, holders=(), excluded=excluded)  # some hold this try's model: send it whole
            rule = again_without_liars if error.incoming.excluded else SHORTFALLS[plan.below_minimum]
            skips = rule(error, state.round_number + 1, tries, notify)
            audit_trail.falls_short(plan.audit, state.round_number + 1, skipped=skips)
            if skips:
                state = _skipped(plan, state, run, notify, incoming=error.incoming)
        finally:
            audit_trail.flush(plan.audit)
        if state.stopped and not _due(plan, state.round_number, plan.select_every):
            state = _compared(plan, state)
        if _due(plan, state.round_number, plan.checkpoint_every) or state.stopped or state.excluded:
            vouch = partial(audit_trail.saves, plan.audit, state.round_number)
            run.save_checkpoint(state, transport.states(), announce=vouch)
    return state


def exchange(
    plan: Plan, transport: Transport, requests: Mapping[str, Request], *, shapes: Mapping[str, Tensors] | None = None
) -> Iterator[Reply | Failure]:
    """Sends requests and yields what is believed of what comes back; both enter the audit trail, where one is kept.

    ``shapes`` has tensors of the shapes that the clients' updates must have.
    """
    sent = audit_trail.outgoing(plan.audit, requests)
    oldest = None if plan.staleness_exponent is None else 1
    settlement = Settlement(sent, plan.settings, plan.audit, shapes or {}, oldest, plan.reported)
    return settlement.settled(transport.exchange(sent, timeout_seconds=plan.timeout_seconds))


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
    kept, clients = begin_round(plan.privacy, transport.clients(), state.privacy, number=number, run=run)
    if clients is None:
        pick = sample_clients if plan.staleness_exponent is None else offered_clients
        clients = pick(transport.clients(), plan.clients_per_round, seed=plan.seed, round_number=number)
    parts = plan.method.schedule(number)
    down = outgoing(plan.method.sent(state.weights, state.memory), parts)
    expected = {name: returned(cut(down, plan.ranks.get(name)), parts) for name in clients}
    incoming = Incoming(number, clients, plan.staleness_exponent, plan.audit)
    if plan.compute is not None:
        plan.compute.begin(number, state.weights, clients)

    shape = returned(down, parts)
    send = partial(exchange, plan, transport, shapes=expected if plan.protected is None else {})
    asking = Asking(number, clients, down, shape, plan.body, send, incoming, notify, state.excluded)
    products = Products(state.weights, parts, weigh=plan.method.weigh, keep=plan.method.fold is not None)
    updates, held = _asked(plan, state, asking, incoming, products)
    delta, kept = _aggregated(plan, incoming, updates, kept, shape)
    if plan.privacy is not None:
        kept = plan.privacy.settled(kept, incoming.rows, run)
    share = incoming.usable() / len(transport.clients())
    seed = derive(plan.seed, "adapter-init", round_number=number)
    weights, memory, error = advance(plan.method, state, delta, products=products, share=share, seed=seed)
    if plan.compute is not None:
        weights |= plan.compute.end()
    audit_trail.aggregates(plan.audit, number, [row["client"] for row in incoming.rows], weights, share=share)
    train_seconds, trained = time.perf_counter() - began, plan.meter.coordinator()
    metrics, evaluate_seconds = _scored(plan, weights) if _due(plan, number, plan.every) else ({}, 0.0)
    audit_trail.scores(plan.audit, number, metrics)
    record = RoundRecord(
        number,
        metrics,
        incoming.taking_part(),
        tuple(incoming.failures),
        incoming.mean_loss(),
        train_seconds,
        evaluate_seconds,
        incoming.bytes_up() + (plan.compute.bytes_up() if plan.compute else 0),
        incoming.bytes_down() + (plan.compute.bytes_down() if plan.compute else 0),
        _cost(plan, begun, trained, plan.meter.coordinator()),
        kept.get("epsilon"),
        error,
        incoming.seconds,
        plan.compute.figures() if plan.compute else {},
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
        joules=(Spent(0.0, state.joules) + Spent(0.0, incoming.joules()) + (trained - begun)).joules,
        simulated_seconds=state.simulated_seconds if incoming.seconds is None else incoming.seconds,
        privacy=kept,
        excluded=lasting(state.excluded),
    )
    after = _selected(plan, after)
    if not after.stopped:
        shows_all = _shows_all(plan.method, number, weights)
        is_still = shows_all and incoming.is_still() and share == 1 and same_bits(state.weights, weights)
        stops = why_stop(state, after, target=plan.target, budget=plan.budget, is_still=is_still)
        after = replace(after, stopped=stops)
    if incoming.still and not after.stopped and _shows_all(plan.method, number, weights):
        notify("note", {"text": f"round {number}: {note_of_still(incoming.still)}"})
    return replace(after, seconds=state.seconds + time.perf_counter() - began)


def _shows_all(method: Method, number: int, weights: Tensors) -> bool:
    """Whether an update of zeros means that its client moves nothing: no tensor stays with it or rests this time."""
    now, later = method.schedule(number), method.schedule(number + 1)
    return method.personal is None and not any(
        now.is_personal(name) or (later.trains(name) and not now.trains(name)) for name in weights
    )


def _asked(
    plan: Plan, state: ServerState, asking: Asking, incoming: Incoming, products: Products
) -> tuple[Iterator[ClientUpdate], Tensors]:
    """The round's updates as they come in, and what the clients that answer hold from then on."""
    if plan.protected is not None:
        return incoming.watched(plan.protected(asking)), {}
    requests, held = _addressed(plan, state, asking)
    updates = incoming.updates(asking.send(requests), asking.notify)
    updates = incoming.watched(updates if plan.compute is None else map(plan.compute.completed, updates))
    # under a guarantee nothing may be known of one client's product
    return (products.watch(updates) if plan.privacy is None else updates), held


def _addressed(plan: Plan, state: ServerState, asking: Asking) -> tuple[dict[str, Request], Tensors]:
    """Every client's own request as it travels, and what those that answer hold from then on."""
    asked = {
        name: Request(TRAIN, asking.number, name, cut(asking.weights, plan.ranks.get(name)), asking.body)
        for name in asking.clients
    }
    rounding = derive(plan.seed, "compress", round_number=asking.number)
    return address(asked, plan.download, held=state.held, holders=state.holders, seed=rounding)


def _aggregated(
    plan: Plan, incoming: Incoming, updates: Iterator[ClientUpdate], kept: Mapping[str, Any], shape: Tensors
) -> tuple[Tensors, Mapping[str, Any]]:
    """The round's delta, and what privacy keeps.

    Raises:
        BudgetError: Every client's budget is spent.
        FederationError: Too few replies can be used. A round that nobody was drawn for does not fail: its update is
            noise alone.
    """
    try:
        if plan.privacy is None:
            delta = plan.method.aggregate(updates)
        else:
            delta, kept = plan.privacy.aggregate(updates, shape, kept)
    except FederationError as error:
        refuse_overspending(incoming.clients, incoming.failures)
        why = "; ".join(filter(None, [str(error), _why(incoming)]))
        is_closed = isinstance(error, ProtectionError) and plan.below_minimum == "stop" and not incoming.excluded
        raise (ProtectionError(why) if is_closed else TooFewRepliesError(why, incoming)) from error
    if incoming.usable() < min(plan.min_replies, len(incoming.clients)):
        raise TooFewRepliesError(
            f"{incoming.usable()} usable replies of {len(incoming.clients)}, "
            f"federation.min_replies = {plan.min_replies}; {_why(incoming)}",
            incoming,
        )
    return delta, with_epsilon(kept, incoming.rows)


def _skipped(plan: Plan, state: ServerState, run: RunFolder, notify: Observer, *, incoming: Incoming) -> ServerState:
    """A round that changes nothing; what it cost is recorded."""
    after = replace(state, round_number=state.round_number + 1, excluded=lasting(state.excluded))
    up, down = incoming.bytes_up(), incoming.bytes_down()
    spent = plan.meter.coordinator()
    record = RoundRecord(
        after.round_number, {}, incoming.taking_part(), tuple(incoming.failures), None, 0.0, 0.0, up, down,
        _cost(plan, spent, spent, spent), simulated_seconds=incoming.seconds,
    )  # fmt: skip
    _write(record, plan, run, notify)
    seconds = state.simulated_seconds if incoming.seconds is None else incoming.seconds
    privacy = with_epsilon(state.privacy, incoming.rows)  # those who answered have spent all the same
    up, down = state.bytes_up + up, state.bytes_down + down
    return replace(after, bytes_up=up, bytes_down=down, simulated_seconds=seconds, privacy=privacy)


def _why(incoming: Incoming) -> str:
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


def _due(plan: Plan, number: int, every: int) -> bool:
    return number % every == 0 or number == plan.rounds


def _selected(plan: Plan, state: ServerState) -> ServerState:
    """Keeps the best round so far, and stops the run when patience has run out."""
    if not _due(plan, state.round_number, plan.select_every):
        return state
    state = _compared(plan, state)
    waited = state.round_number - state.best_round
    if plan.patience is not None and waited >= plan.patience:
        return replace(state, stopped=f"no better selection metric for {waited} round{'' if waited == 1 else 's'}")
    return state


def _compared(plan: Plan, state: ServerState) -> ServerState:
    """The state, kept as the best if the selection metric says so."""
    if plan.select is None:
        return state
    metric = plan.select(state.weights)
    if state.best_metric is None or metric > state.best_metric:
        return replace(state, best_round=state.round_number, best_metric=metric, best_weights=state.weights)
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
        "aggregation_error": record.aggregation_error,
        "cost": dict(record.cost),
        **({"crossings": dict(record.crossings)} if record.crossings else {}),
        **({} if record.epsilon is None else {"epsilon": record.epsilon}),
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
            "epsilon": record.epsilon,
            "train_loss": record.train_loss,
            "seconds": record.train_seconds + record.evaluate_seconds,
        },
    )
