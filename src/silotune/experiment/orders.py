"""What the clients of a run are told: how to train, and how to score on their own examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from silotune.experiment.engines import federation_of
from silotune.experiment.modes import Part
from silotune.experiment.prepare import Prepared
from silotune.federation.coordinator.rounds import Plan, exchange
from silotune.federation.wire.orders import TrainOrder, evaluate_order, train_order
from silotune.federation.wire.transport import Transport
from silotune.structs import Reply, Request, Tensors


def order_of(prepared: Prepared, part: Part, *, name: str) -> TrainOrder:
    """What every client of a part is told of its local rounds; ``name`` is the part's identity in ledgers."""
    asked = federation_of(prepared, part)
    return train_order(prepared.config, run=name, training=part.training, federation=asked)


def scoring_of(prepared: Prepared) -> dict[str, Any]:
    """The body of the requests to score on one's own examples: as the gold-standard set is scored."""
    return evaluate_order(prepared.config.evaluation, prepared.gold.labels).model_dump(mode="json")


def scored_by_clients(
    plan: Plan, transport: Transport, weights: Tensors, round_number: int, body: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """Scores of the model on each client's own examples; the requests stand in the audit trail, as all others."""
    requests = {name: Request("evaluate", round_number, name, weights, body) for name in transport.clients()}
    replies = exchange(plan, transport, requests)
    return {
        reply.client: dict(reply.body) if isinstance(reply, Reply) else {"failed": reply.reason} for reply in replies
    }
