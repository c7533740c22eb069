"""Label inference: how many examples of each class an update was made from.

For a softmax over classes the gradient of a bias is mean(p_c) - share of class c, so one step tells the shares exactly
where the model's mean answer is known. The rows of a head's weight, and IA3's vectors, tell less: which classes were
there more often than the model expects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from silotune.structs import Tensors


def shares_of(step: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The share of each class among the examples of one plain step [classes].

    Args:
        step: What the step added to the head's bias over the learning rate: the gradient with its sign turned.
        expected: Mean probability of each class under the model that the step began with.
    """
    return (expected + step).clamp(min=0)


def counts_of(step: torch.Tensor, expected: torch.Tensor, examples: int) -> list[int]:
    """How many of so many examples are of each class, as whole numbers that add up to all of them."""
    exact = shares_of(step, expected)
    exact = exact / exact.sum().clamp(min=1e-12) * examples
    counts = exact.floor().long()
    for place in torch.argsort(exact - counts, descending=True)[: examples - int(counts.sum())]:
        counts[place] += 1
    return [int(count) for count in counts]


def class_signal(update: Tensors, classes: int) -> torch.Tensor | None:
    """How strongly an update pulls towards each class [classes]; None where it trains nothing with a row for each.

    That is the change of a head's bias, or where it has none, the sum of each row of its weight: hidden states have a
    mean, and what is pulled towards a class is pulled along it.
    """
    biases = [tensor for name, tensor in update.items() if name.endswith("bias") and tensor.shape == (classes,)]
    if biases:
        return biases[-1].double()
    heads = [
        tensor
        for name, tensor in update.items()
        if tensor.dim() == 2 and tensor.shape[0] == classes and ".lora_" not in name
    ]
    return _along_mean(heads[-1].double()) if heads else None


def _along_mean(rows: torch.Tensor) -> torch.Tensor:
    """Coefficient of each row along the direction that the rows have most in common, signed so that they add to 0."""
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    found = rows @ directions[0]
    return found if float(found.max()) >= -float(found.min()) else -found


def mean_error(found: Sequence[int], true: Sequence[int]) -> float:
    """Half the sum of differences: examples whose class was told wrongly."""
    return sum(abs(one - other) for one, other in zip(found, true, strict=True)) / 2
