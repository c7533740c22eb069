"""A Grid of Flower's in memory, whose nodes answer through the ClientApp in an order that a test decides."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, RecordDict

from silotune.settings.sections import FederationSection
from silotune.transports.flower import Errand, FlowerTransport, client_app
from silotune.transports.in_process import codec_of

NAMES = ("a", "b", "c")


@dataclass
class Line:
    """A Grid in memory: nodes that answer through the ClientApp, in an order that a test decides."""

    work: Any
    order: random.Random
    nodes: dict[str, Any]

    def __post_init__(self) -> None:
        self.app = client_app(self.work)
        self.waiting: dict[str, Message] = {}
        self.pushed: list[tuple[str, str]] = []
        self.numbers = itertools.count(1)

    def get_nodes(self) -> Sequence[Any]:
        return list(self.nodes.values())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        made = []
        for message in messages:
            name = next(node.name for node in self.nodes.values() if node.node_id == message.metadata.dst_node_id)
            number = f"m{next(self.numbers)}"
            message.metadata.__dict__["_message_id"] = number
            self.pushed.append((name, number))
            self.waiting[number] = message
            made.append(number)
        return made

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        there = [number for number in message_ids if number in self.waiting]
        if not there:
            return []
        chosen = self.order.choice(there)
        return [self.app(self.waiting.pop(chosen), Context(1, 1, {}, RecordDict(), {}))]


def node(name: str, number: int, activated: str = "then") -> Any:
    return SimpleNamespace(name=name, node_id=number, last_activated_at=activated)


def line(work: Any, *, seed: int = 0, names: Sequence[str] = NAMES) -> Line:
    return Line(work, random.Random(seed), {name: node(name, number + 7) for number, name in enumerate(names)})


def transport(grid: Any, **more: Any) -> FlowerTransport:
    return FlowerTransport(grid, NAMES, Errand("run-1", {"seed": 1}), codec=codec_of(FederationSection()), **more)
