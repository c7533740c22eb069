"""How clients' updates become one delta."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from silotune.errors import FederationError
from silotune.structs import ClientUpdate, Tensors
from silotune.tensors import check_alike


def weighted_mean(updates: Iterable[ClientUpdate]) -> Tensors:
    """Mean of the deltas, weighted by examples (McMahan et al. 2017, Algorithm 1).

    Consumes the updates one by one, so memory does not grow with the number of clients. Sums are kept in
    float64; the result has the dtypes of the first update.

    Raises:
        FederationError: There is no update, or the weights sum to zero.
        MessageError: Names or shapes differ between updates.
    """
    total: Tensors = {}
    dtypes: dict[str, torch.dtype] = {}
    weight = 0
    for update in updates:
        if not dtypes:
            dtypes = {name: tensor.dtype for name, tensor in update.delta.items()}
            total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in update.delta.items()}
        check_alike(total, update.delta)
        for name in total:
            total[name].add_(update.delta[name].double(), alpha=update.num_examples)
        weight += update.num_examples
        del update  # or it would live on until the next one is there
    if weight <= 0:
        raise FederationError("there is nothing to aggregate: no update with at least one example")
    return {name: (tensor / weight).to(dtypes[name]) for name, tensor in total.items()}
