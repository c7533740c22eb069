"""Clients on the tests' tiny model, and what they are asked."""

from __future__ import annotations

from typing import Any

import tiny
from silotune.federation.site.state import Site
from silotune.federation.wire.orders import TrainOrder
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import Failure, Reply, Request, Tensors
from silotune.transports.in_process import InProcess

EXAMPLES = tiny.encoded(tiny.closed(8))
SETTINGS = tiny.training(learning_rate=0.01)


def order(settings: TrainingSection = SETTINGS, **federation: Any) -> dict[str, Any]:
    """The body of a request to train."""
    made = TrainOrder(training=settings, federation=FederationSection(**federation), seed=3, rounds=2)
    return made.model_dump(mode="json")


def many(model: Any, count: int = 7) -> dict[str, Site]:
    """Clients with 8, 7 or 6 examples."""
    return {f"site-{number}": Site(f"site-{number}", EXAMPLES[number % 3 :], model) for number in range(count)}


def ask(
    transport: InProcess, start: Tensors, kind: str = "train", body: dict[str, Any] | None = None
) -> list[Reply | Failure]:
    """What all clients answer to the same request."""
    requests = {name: Request(kind, 1, name, start, body or order()) for name in transport.clients()}
    return list(transport.exchange(requests, timeout_seconds=1.0))
