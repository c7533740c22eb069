"""One aggregate's way into the global model: the server step on what moved, then the LoRA rule's fold."""

from __future__ import annotations

import torch

from silotune.lora import without_residuals
from silotune.methods.algorithms import Method
from silotune.methods.products import Products
from silotune.structs import Tensors


def advance(
    method: Method, delta: Tensors, *, weights: Tensors, memory: Tensors, products: Products, seed: int
) -> tuple[Tensors, Tensors, float | None]:
    """The global model after a round.

    Args:
        method: Server step and fold.
        delta: The aggregated delta of the tensors that were sent in the round.
        weights: The global model before the round.
        memory: The server step's own.
        products: The clients' products of this round.
        seed: Of the round, for what a rule draws anew.

    Returns:
        Weights and memory, and the aggregation error; None where there are no products. Of rules that only average
        it is taken before the server step: it says what averaging lost, whatever the step makes of it.
    """
    trained = without_residuals(weights)
    whole = {name: delta[name] if name in delta else torch.zeros_like(tensor) for name, tensor in trained.items()}
    stepped, memory = method.step(trained, whole, memory)
    moved = {name: stepped[name] if name in delta else tensor for name, tensor in weights.items()}
    if method.fold is not None:
        folded = method.fold(moved, products, seed)
        return folded, memory, products.error(folded)
    averaged = {name: tensor + delta[name] if name in delta else tensor for name, tensor in weights.items()}
    return moved, memory, products.error(averaged)
