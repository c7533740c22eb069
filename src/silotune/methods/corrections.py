"""What a method adds to a client's gradient, and what the client keeps for it between rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from silotune.methods.aggregate import CONTROL
from silotune.structs import Tensors
from silotune.tensors import add_scaled, scale, subtract, taken_from

Correction: TypeAlias = Callable[[Tensors, Tensors], Tensors]
"""``correction(weights, received)`` is added to the gradient before each local step."""


@dataclass(frozen=True)
class LocalWork:
    """What a client did in a round.

    Attributes:
        delta: Trained minus received adapter tensors.
        steps: Optimiser steps.
        learning_rate: Of each of them.
        gradient: Gives the mean gradient over all of the client's examples at the received tensors: another pass.
    """

    delta: Tensors
    steps: int
    learning_rate: float
    gradient: Callable[[], Tensors]


@dataclass(frozen=True)
class Corrector:
    """A client's side of a method.

    Attributes:
        begin: The client's own control and the coordinator's to the round's gradient term. Controls have the adapter's
            names; the coordinator's is empty where the method sends none.
        end: The client's own control after the round, from both and what was done; None where nothing is kept.
        sends_change: Whether the reply carries the change of the client's control.
        hears: The client's own control once it is known what of a reply is lost for good on a link that rounds, from
            that control and from what is lost: both sides then add up the same. None where nothing is kept.
    """

    begin: Callable[[Tensors, Tensors], Correction]
    end: Callable[[Tensors, Tensors, LocalWork], Tensors] | None = None
    sends_change: bool = False
    hears: Callable[[Tensors, Tensors], Tensors] | None = None


Anchored: TypeAlias = Callable[[Tensors], Corrector]
"""``anchored(anchor)`` is for a model that starts elsewhere and is pulled towards the anchor."""


def beside(weights: Tensors, tensors: Tensors) -> Tensors:
    """The kept tensors of the weights' names, moved from main memory to the weights' devices."""
    return {name: tensors[name].to(weight.device) for name, weight in weights.items()}


def proximal(mu: float) -> Correction:
    """mu * (weights - received): the gradient of (mu / 2) ||w - w_t||^2 (FedProx, Li et al. 2020, equation 2)."""

    def term(weights: Tensors, received: Tensors) -> Tensors:
        return scale(subtract(weights, received), mu)

    return term


def towards_received(mu: float) -> Corrector:
    """FedProx: the proximal term; nothing is kept."""
    return Corrector(begin=lambda own, server: proximal(mu))


def control_variates(option: str) -> Corrector:
    """SCAFFOLD (Karimireddy et al. 2020, Algorithm 1): c - c_i is added to each gradient.

    Afterwards, line 12: c_i is the gradient at the received model (option I), or c_i - c + (x - y) / (K eta)
    (option II), which is the mean of the gradients of K plain steps of rate eta and of nothing else.
    """

    def begin(own: Tensors, server: Tensors) -> Correction:
        shift = subtract(server, own)
        return lambda weights, received: beside(weights, shift)

    return Corrector(
        begin,
        SCAFFOLD_OPTIONS[option],
        sends_change=True,
        hears=lambda own, lost: subtract(own, taken_from(CONTROL, lost)),
    )


def _gradient_at_received(own: Tensors, server: Tensors, work: LocalWork) -> Tensors:
    return work.gradient()


def _mean_gradient(own: Tensors, server: Tensors, work: LocalWork) -> Tensors:
    return add_scaled(subtract(own, server), work.delta, -1 / (work.steps * work.learning_rate))


SCAFFOLD_OPTIONS: Mapping[str, Callable[[Tensors, Tensors, LocalWork], Tensors]] = {
    "I": _gradient_at_received,
    "II": _mean_gradient,
}


def dynamic_regulariser(alpha: float) -> Corrector:
    """FedDyn (Acar et al. 2021, Algorithm 1): alpha * (weights - received) - g_i; then g_i <- g_i - alpha * delta.

    g_i is the client's gradient at its last own optimum, 0 at first.
    """

    def begin(own: Tensors, server: Tensors) -> Correction:
        return lambda weights, received: subtract(scale(subtract(weights, received), alpha), beside(weights, own))

    return Corrector(
        begin,
        lambda own, server, work: add_scaled(own, work.delta, -alpha),
        hears=lambda own, lost: add_scaled(own, lost, alpha),
    )


def towards(weight: float) -> Anchored:
    """weight * (weights - anchor): the pull of a model of one's own (Ditto, Li et al. 2021, Algorithm 1)."""

    def anchored(anchor: Tensors) -> Corrector:
        def term(weights: Tensors, received: Tensors) -> Tensors:
            return scale(subtract(weights, beside(weights, anchor)), weight)

        return Corrector(begin=lambda own, server: term)

    return anchored
