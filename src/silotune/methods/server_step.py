"""How the coordinator applies an aggregated delta: (weights, delta, memory, share) -> (weights, memory).

``memory`` is the step's own and part of every checkpoint. ``share`` is the part of all clients whose updates are in the
delta, by heads. A method that keeps a mean over all clients weighs it as the round's mean is weighed, with what the
updates count in all (``COUNTED``), which stands beside the delta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from silotune.methods.aggregate import CONTROL, COUNTED
from silotune.methods.optimizers import clip, kept_of, learning_rate, optimizer_of, restore
from silotune.settings.sections import TrainingSection
from silotune.structs import Tensors
from silotune.tensors import add_scaled, combine, put_under, scale, subtract, taken_from, zeros_like

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


def training_step(training: TrainingSection, *, rounds: int, server_learning_rate: float) -> ServerStep:
    """The step that pooled training takes, with the clients' mean gradient in place of its own.

    FedSGD (McMahan et al. 2017, section 2) with any optimiser of ``[training]``: -delta is the gradient, which is
    clipped, and the optimiser's moments are the memory. With all clients and weights by examples the mean of their
    gradients is an unbiased estimate of the pooled one.

    Args:
        training: Optimiser, rate, schedule over the rounds, decay of weights and bound on the gradient's norm.
        rounds: Of the run, for the schedule.
        server_learning_rate: The rate is multiplied by it.
    """

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        moving = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
        for name, parameter in moving.items():
            parameter.grad = -delta[name].to(parameter.dtype)
        clip(moving.values(), training.clip_norm)
        counts = taken_from(_ROUND, memory)
        done = int(counts[_DONE]) if counts else 0
        rate = server_learning_rate * learning_rate(training, done + 1, rounds)
        optimizer = optimizer_of(training, moving, rate)
        restore(optimizer, moving, taken_from(_OPTIMIZER, memory))
        optimizer.step()
        stepped = {name: parameter.detach() for name, parameter in moving.items()}
        remembered = put_under(_OPTIMIZER, kept_of(optimizer, moving))
        return stepped, {**remembered, **put_under(_ROUND, {_DONE: torch.tensor(float(done + 1))})}

    return step


_OPTIMIZER, _ROUND, _DONE = "optimizer", "round", "done"


def adagrad_moment() -> SecondMoment:
    """v + delta^2."""
    return lambda v, square: v + square


def yogi_moment(beta2: float) -> SecondMoment:
    """v - (1 - beta2) delta^2 sign(v - delta^2)."""
    return lambda v, square: v - (1 - beta2) * square * torch.sign(v - square)


def adam_moment(beta2: float) -> SecondMoment:
    """beta2 v + (1 - beta2) delta^2."""
    return lambda v, square: beta2 * v + (1 - beta2) * square


def _counted(memory: Tensors, delta: Tensors, share: float) -> tuple[float, float, Tensors]:
    """How a round enters a mean over all clients, of whom the coordinator knows what they count once they answer.

    All clients' weight is taken to be what was counted so far, divided by the shares of clients that it was counted of.
    That is exact where all take part, or all count the same. Elsewhere it moves a little from round to round, and the
    mean is scaled along, so that it stays in proportion to the clients' weighted sum; where the clients agree, that sum
    is zero, whatever it is divided by.

    Returns:
        What the mean so far is multiplied by, the round's part of all clients' weight, and what to remember: the sums
        of shares and weights, under ``COUNTED``.
    """
    now = torch.tensor([share, float(delta[COUNTED])], dtype=torch.float64)
    before = memory.get(COUNTED)
    seen = now if before is None else before + now
    whole = float(seen[1] / seen[0])
    kept = 1.0 if before is None else float(before[1] / before[0]) / whole
    return kept, float(delta[COUNTED]) / whole, {COUNTED: seen}


def control_step(server_learning_rate: float) -> ServerStep:
    """weights + server_learning_rate * delta, and c <- c + share * (mean change of the clients' controls).

    SCAFFOLD, Karimireddy et al. 2020, Algorithm 1, lines 16 and 17; |S| / N is the round's part of all clients' weight,
    so that c is the weighted mean of the clients' own. The change comes in the delta's group ``control``, and the
    memory holds c in a group of the same name.
    """

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        kept, part, counts = _counted(memory, delta, share)
        control = add_scaled(scale(control_of(weights, memory), kept), taken_from(CONTROL, delta), part)
        change = {name: delta[name] for name in weights}
        return add_scaled(weights, change, server_learning_rate), {**put_under(CONTROL, control), **counts}

    return step


def control_of(weights: Tensors, memory: Tensors) -> Tensors:
    """The server's control, under the weights' names; zeros before the first round."""
    return taken_from(CONTROL, memory) or zeros_like(weights)


def dynamic_step(server_learning_rate: float, alpha: float) -> ServerStep:
    """h <- h - alpha * share * delta; weights + server_learning_rate * delta - h / alpha, for an alpha above 0.

    FedDyn, Acar et al. 2021, Algorithm 1. The share is the round's part of all clients' weight: times the mean over the
    round's clients it is 1/m times their sum in the paper, where all count the same.
    """

    def step(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
        kept, part, counts = _counted(memory, delta, share)
        change = {name: delta[name] for name in weights}
        before = {name: memory.get(name, torch.zeros_like(tensor)) for name, tensor in weights.items()}
        drift = add_scaled(scale(before, kept), change, -alpha * part)
        stepped = subtract(add_scaled(weights, change, server_learning_rate), scale(drift, 1 / alpha))
        return stepped, {**drift, **counts}

    return step
