"""DP-SGD as another gradient for the one training loop: Poisson samples, clipped gradients, noise, a fixed divisor.

Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1. What is added to a gradient afterwards, such
as FedProx's term, and what an optimiser makes of it, depends on the examples through the noised gradient alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from silotune.models.adapters import Adapted
from silotune.privacy.client_dp import with_noise
from silotune.privacy.noise import Entropy, drawn, system
from silotune.structs import Tensors
from silotune.tensors import add
from silotune.training.encode import Encoded
from silotune.training.examplewise import Losses, clipped_sum, gradients, moving


@dataclass(frozen=True)
class DpSgd:
    """What is done to each step of a local round so that its result protects single examples.

    Attributes:
        noise_multiplier: Standard deviation of the noise over ``clip_norm``.
        clip_norm: Bound on an example's gradient; infinite for none, with noise 0 only.
        entropy: Where samples and noise come from.
    """

    noise_multiplier: float
    clip_norm: float
    entropy: Entropy = field(default=system)


def sampling_rate(num_examples: int, batch_size: int, gradient_accumulation: int) -> float:
    """Probability of each example to be in a step: the examples of a plain step over all."""
    return min(1.0, batch_size * gradient_accumulation / num_examples)


def poisson_groups(
    examples: Sequence[Encoded], rate: float, *, batch_size: int, entropy: Entropy
) -> Iterator[list[list[Encoded]]]:
    """Endless steps: of each, a Poisson sample in forward passes of at most ``batch_size`` examples, longest first.

    A step may hold no example at all. Its size is random, so it is never filled up or cut.
    """
    while True:
        chosen = sorted((examples[place] for place in drawn(len(examples), rate, entropy)), key=_shorter)
        yield [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]


def _shorter(example: Encoded) -> int:
    return -example.length


def private_gradient(
    adapted: Adapted, group: Sequence[Sequence[Encoded]], losses: Losses, *, dp: DpSgd, expected: float
) -> Tensors:
    """One step's gradient: (sum of clipped gradients + N(0, (z C)^2)) / expected, of what trains, on its device.

    ``expected`` is the mean size of the samples and not this one's, which would tell how many were drawn.
    """
    parameters = moving(adapted)
    total = {name: torch.zeros_like(item, dtype=torch.float32) for name, item in parameters.items()}
    for batch in group:
        by_example, _ = gradients(adapted, batch, losses)
        total = add(total, clipped_sum(by_example, dp.clip_norm))
    deviation = dp.noise_multiplier * dp.clip_norm if dp.noise_multiplier else 0.0
    noised = with_noise(total, deviation, dp.entropy)
    made = {name: tensor / expected for name, tensor in noised.items()}
    return {name: tensor.to(parameters[name].dtype) for name, tensor in made.items()}
