"""What the clients of a run are told: how to train, and how to score on their own examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from silotune.experiment.engines import federation_of
from silotune.experiment.modes import Part
from silotune.experiment.prepare import Prepared
from silotune.federation.client import EvaluateOrder, TrainOrder
from silotune.federation.server import Plan, exchange
from silotune.federation.transport import Transport
from silotune.sections import AttackSection, BudgetSection
from silotune.structs import Reply, Request, Tensors


def order_of(prepared: Prepared, part: Part, *, name: str) -> TrainOrder:
    """What every client is told of its local rounds; not budget, simulated attack and the others' ranks."""
    not_for_clients: dict[str, Any] = {
        "budget": BudgetSection(),
        "attack": AttackSection(),
        "clock": None,
        "ranks": {},
        "memory_mb": {},
        "policies": {},
    }
    asked = federation_of(prepared, part).model_copy(update=not_for_clients)
    return TrainOrder(
        training=part.training,
        federation=asked,
        seed=prepared.config.seed,
        rounds=asked.rounds,
        privacy=prepared.config.privacy,
        run=name,
    )


def scoring_of(prepared: Prepared) -> dict[str, Any]:
    """The body of the requests to score on one's own examples: as the gold-standard set is scored."""
    settings = prepared.config.evaluation
    order = EvaluateOrder(
        labels=tuple(prepared.gold.labels),
        batch_size=settings.batch_size,
        scoring=settings.scoring,
        max_new_tokens=settings.max_new_tokens,
    )
    return order.model_dump(mode="json")


def scored_by_clients(
    plan: Plan, transport: Transport, weights: Tensors, round_number: int, body: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Scores of the model on each client's own examples; the requests stand in the audit trail, as all others."""
    requests = {name: Request("evaluate", round_number, name, weights, body) for name in transport.clients()}
    replies = exchange(plan, transport, requests)
    return {
        reply.client: dict(reply.body) if isinstance(reply, Reply) else {"failed": reply.reason} for reply in replies
    }
