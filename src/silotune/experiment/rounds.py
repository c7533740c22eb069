"""What a run of rounds is to do for a part of a run: its settings, as the one server loop takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from silotune.evaluation.metrics import signed
from silotune.experiment import privacy
from silotune.experiment.parts import Part, settings_of
from silotune.experiment.prepare import Prepared
from silotune.experiment.scoring import SetScorer
from silotune.federation.coordinator.audit import Audit
from silotune.federation.coordinator.protection import PROTECTIONS
from silotune.federation.coordinator.rounds import Plan
from silotune.federation.coordinator.settlement import Reported
from silotune.federation.wire.orders import Order
from silotune.methods.algorithms import method
from silotune.record.cost import Meter
from silotune.settings.sections import FederationSection
from silotune.structs import Tensors


def plan_of(
    prepared: Prepared,
    part: Part,
    meter: Meter,
    *,
    audit: Audit | None = None,
    name: str = "",
    keys: Mapping[str, Sequence[str]] | None = None,
    order: Order | None = None,
) -> Plan:
    """What ``run_rounds`` is to do for a part; baselines are scored before the first and after the last round.

    ``name`` is the part's identity in privacy ledgers, ``keys`` what clients sign their part in protected sums with,
    ``order`` the one that a submitter has vouched for, where sites ask for that.
    """
    config, settings = prepared.config, settings_of(prepared, part)
    federation = settings.federation
    clock, target = federation.clock, config.evaluation.target
    return Plan(
        rounds=federation.rounds,
        method=method(federation, part.training),
        body=(order or Order(setup=settings.digest(), run=name, seed=config.seed)).body(),
        seed=config.seed,
        settings=settings,
        clients_per_round=_asked_a_round(part, federation),
        ranks=prepared.ranks if part.sends_updates else {},
        timeout_seconds=federation.timeout_seconds,
        below_minimum=federation.below_minimum,
        min_replies=min(federation.min_replies, part.clients_per_round or len(part.clients)),
        score=prepared.gold,
        select=_selector(prepared.selection, prepared.task.metric) if prepared.selection else None,
        every=config.evaluation.every if part.sends_updates else federation.rounds,
        select_every=config.evaluation.select_every,
        patience=config.evaluation.patience,
        target=None if target is None else signed(prepared.task.metric, target),
        budget=federation.budget,
        checkpoint_every=config.record.checkpoint_every,
        download=federation.download,
        staleness_exponent=clock.staleness_exponent if clock and clock.buffer else None,
        meter=meter,
        audit=audit,
        reported=Reported(config.privacy, part.training, federation.rounds, federation.below_minimum == "wait"),
        protected=PROTECTIONS[type(config.privacy.protection)](privacy.collected(config, part), keys or {})
        if part.sends_updates
        else None,
        privacy=privacy.central_of(config, part, name),
    )


def _asked_a_round(part: Part, federation: FederationSection) -> int | None:
    """Number of clients that a round asks, with those beyond ``clients_per_round``; None for all."""
    if part.clients_per_round is None or federation.clock is None:
        return part.clients_per_round
    return min(len(part.clients), math.ceil(part.clients_per_round * federation.clock.over_sampling))


def _selector(scorer: SetScorer, metric: str) -> Callable[[Tensors], float]:
    """The task's metric on the selection set, turned so that higher is better."""

    def select(weights: Tensors) -> float:
        return signed(metric, float(scorer(weights)[metric]))

    return select
