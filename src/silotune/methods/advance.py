"""One aggregate's way into the global model: the server step on what moved, then the LoRA rule's fold."""

from __future__ import annotations

import torch

from silotune.lora import without_residuals
from silotune.methods.algorithms import Method
from silotune.methods.products import Products
from silotune.structs import ServerState, Tensors


def advance(
    method: Method, state: ServerState, delta: Tensors, *, products: Products, share: float, seed: int
) -> tuple[Tensors, Tensors, float | None]:
    """The global model after a round.

    A tensor that was not sent rests: the server step sees a delta of zero, and what it makes of it is not taken.

    Args:
        method: Server step and fold.
        state: Weights and memory before the round.
        delta: The aggregated delta of what was sent in the round.
        products: The clients' products of this round.
        share: Part of all clients whose updates are in the delta.
        seed: Of the round, for what a rule draws anew.

    Returns:
        Weights and memory, and the aggregation error; None where there are no products.
    """
    trained = without_residuals(state.weights)
    whole = {name: delta[name] if name in delta else torch.zeros_like(tensor) for name, tensor in trained.items()}
    whole |= {name: tensor for name, tensor in delta.items() if name not in trained}  # what is sent beside the adapter
    stepped, memory = method.step(trained, whole, state.memory, share)
    weights = {name: stepped[name] if name in delta else tensor for name, tensor in state.weights.items()}
    if method.fold is None:
        return weights, memory, products.error()
    folded = method.fold(weights, products, seed)
    return folded, memory, products.error(folded)
