"""How the coordinator applies an aggregated delta: (weights, delta, memory) -> (weights, memory)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from silotune.structs import Tensors
from silotune.tensors import add_scaled

ServerStep: TypeAlias = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


def plain_step(server_learning_rate: float) -> ServerStep:
    """weights + server_learning_rate * delta (FedAvg at 1.0); keeps no memory."""

    def step(weights: Tensors, delta: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        return add_scaled(weights, delta, server_learning_rate), memory

    return step
