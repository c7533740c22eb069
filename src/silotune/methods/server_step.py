"""How the coordinator applies an aggregated delta: (weights, delta, memory, share) -> (weights, memory).

``memory`` is the step's own and part of every checkpoint. ``share`` is the part of all clients whose updates are in the
delta: methods that keep a mean over all clients need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from silotune.methods.aggregate import CONTROL
from silotune.structs import Tensors
from silotune.tensors import add_scaled, combine, put_under, scale, subtract, taken_from, without, zeros_like

ServerStep: TypeAlias = Callable[[Tensors, Tensors, Tensors, float], tuple[Tensors, Tensors]]
SecondMoment: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(v, delta^2) -> v."""


def plain_step(server_learning_rate: float) -> ServerStep:
    """weights + server_learning_rate * delta (FedAvg at 1.0); keeps no memory."""

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        return add_scaled(weights, delta, server_learning_rate), memory

    return step


def momentum_step(server_learning_rate: float, momentum: float) -> ServerStep:
    """v <- momentum * v + delta; weights + server_learning_rate * v (FedAvgM, Hsu et al. 2019, section 4.3)."""

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        velocity = add_scaled(delta, memory, momentum) if memory and momentum else delta
        return add_scaled(weights, velocity, server_learning_rate), velocity

    return step


def adaptive_step(server_learning_rate: float, *, beta1: float, tau: float, second_moment: SecondMoment) -> ServerStep:
    """FedAdagrad, FedYogi and FedAdam: Reddi et al. 2021, Algorithm 2, as it stands there.

    m <- beta1 m + (1 - beta1) delta, from 0; v <- second_moment(v, delta^2), from tau^2; weights +
    server_learning_rate m / (sqrt(v) + tau). Nothing is corrected for bias; Flower's FedAdam corrects it and begins v
    at 0.
    """

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        first = taken_from("first", memory) or zeros_like(weights)
        second = taken_from("second", memory) or combine(lambda tensor: torch.full_like(tensor, tau**2), weights)
        first = add_scaled(scale(first, beta1), delta, 1 - beta1)
        second = combine(lambda v, change: second_moment(v, change.square()), second, delta)
        stepped = combine(lambda w, m, v: w + server_learning_rate * m / (v.sqrt() + tau), weights, first, second)
        return stepped, {**put_under("first", first), **put_under("second", second)}

    return step


def adagrad_moment() -> SecondMoment:
    """v + delta^2."""
    return lambda v, square: v + square


def yogi_moment(beta2: float) -> SecondMoment:
    """v - (1 - beta2) delta^2 sign(v - delta^2)."""
    return lambda v, square: v - (1 - beta2) * square * torch.sign(v - square)


def adam_moment(beta2: float) -> SecondMoment:
    """beta2 v + (1 - beta2) delta^2."""
    return lambda v, square: beta2 * v + (1 - beta2) * square


def control_step(server_learning_rate: float) -> ServerStep:
    """weights + server_learning_rate * delta, and c <- c + share * (mean change of the clients' controls).

    SCAFFOLD, Karimireddy et al. 2020, Algorithm 1, lines 16 and 17; ``share`` is |S| / N. The change comes in the
    delta's group ``control``, and the memory holds c in a group of the same name.
    """

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        control = add_scaled(control_of(weights, memory), taken_from(CONTROL, delta), share)
        return add_scaled(weights, without(CONTROL, delta), server_learning_rate), put_under(CONTROL, control)

    return step


def control_of(weights: Tensors, memory: Tensors) -> Tensors:
    """The server's control, under the weights' names; zeros before the first round."""
    return taken_from(CONTROL, memory) or zeros_like(weights)


def dynamic_step(server_learning_rate: float, alpha: float) -> ServerStep:
    """h <- h - alpha * share * delta; weights + server_learning_rate * delta - h / alpha.

    FedDyn, Acar et al. 2021, Algorithm 1; ``share`` times the mean over the round's clients is 1/m times their sum.
    With alpha = 0 there is no regulariser and no h: FedAvg.
    """
    if alpha == 0:
        return plain_step(server_learning_rate)

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        drift = add_scaled(memory or zeros_like(weights), delta, -alpha * share)
        return subtract(add_scaled(weights, delta, server_learning_rate), scale(drift, 1 / alpha)), drift

    return step
