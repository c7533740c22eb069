"""Clients on the tests' tiny model, and what they are asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tiny
from acting import ORDER, acting
from silotune.federation.site.state import Site
from silotune.federation.wire.run_setup import RunSettings
from silotune.structs import Failure, Reply, Request, Tensors
from silotune.transports.in_process import InProcess

EXAMPLES = tiny.encoded(tiny.closed(8))
TRAINING = tiny.training(learning_rate=0.01)
SETTINGS = acting(TRAINING, labels=tiny.LABELS, rounds=2)
KEEPING = replace(SETTINGS, training=TRAINING.model_copy(update={"optimizer_state": "keep"}))


def many(model: Any, count: int = 7, settings: RunSettings = SETTINGS) -> dict[str, Site]:
    """Clients with 8, 7 or 6 examples."""
    names = (f"site-{number}" for number in range(count))
    return {name: Site(name, EXAMPLES[number % 3 :], model, settings=settings) for number, name in enumerate(names)}


def ask(transport: InProcess, start: Tensors, kind: str = "train") -> list[Reply | Failure]:
    """What all clients answer to the same request."""
    requests = {name: Request(kind, 1, name, start, ORDER) for name in transport.clients()}
    return list(transport.exchange(requests, timeout_seconds=1.0))
