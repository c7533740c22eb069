"""Terms that a method adds to a client's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from silotune.structs import Tensors
from silotune.tensors import scale, subtract

Correction: TypeAlias = Callable[[Tensors, Tensors], Tensors]
"""``correction(weights, received)`` is added to the gradient before each local step."""
Anchored: TypeAlias = Callable[[Tensors], Correction]
"""``anchored(anchor)`` is the correction of a model that starts elsewhere and is pulled towards the anchor."""


def proximal(mu: float) -> Correction:
    """mu * (weights - received): the gradient of (mu / 2) ||w - w_t||^2 (FedProx, Li et al. 2020, equation 2)."""

    def term(weights: Tensors, received: Tensors) -> Tensors:
        return scale(subtract(weights, received), mu)

    return term


def towards(weight: float) -> Anchored:
    """weight * (weights - anchor): the pull of a model of one's own (Ditto, Li et al. 2021, Algorithm 1)."""

    def anchored(anchor: Tensors) -> Correction:
        def term(weights: Tensors, received: Tensors) -> Tensors:
            return {name: (tensor - anchor[name].to(tensor.device)) * weight for name, tensor in weights.items()}

        return term

    return anchored
