"""Terms that a method adds to a client's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from silotune.structs import Tensors
from silotune.tensors import scale, subtract

Correction: TypeAlias = Callable[[Tensors, Tensors], Tensors]
"""``correction(weights, received)`` is added to the gradient before each local step."""


def proximal(mu: float) -> Correction:
    """mu * (weights - received): the gradient of (mu / 2) ||w - w_t||^2 (FedProx, Li et al. 2020, equation 2)."""

    def term(weights: Tensors, received: Tensors) -> Tensors:
        return scale(subtract(weights, received), mu)

    return term
