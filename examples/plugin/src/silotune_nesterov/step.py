"""The server's step, tensors in and tensors out, and the method that is made with it."""

from __future__ import annotations

from silotune.methods.aggregate import Rule
from silotune.methods.algorithms import Method
from silotune.methods.server_step import ServerStep
from silotune.structs import Tensors
from silotune.tensors import add_scaled
from silotune_nesterov import Nesterov


def nesterov_step(rate: float, momentum: float) -> ServerStep:
    """v <- m v + delta; weights + rate (delta + m v)."""

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        velocity = add_scaled(delta, memory, momentum) if memory else delta
        return add_scaled(weights, add_scaled(delta, velocity, momentum), rate), velocity

    return step


def method(settings: Nesterov, rule: Rule) -> Method:
    """The rule that the run chose, then this step."""
    return Method(rule, nesterov_step(settings.server_learning_rate, settings.server_momentum))
