"""Updates of whole institutions under differential privacy: clipped, summed, noised; fixed or adaptive bound.

McMahan, Ramage, Talwar and Zhang 2018, "Learning differentially private recurrent language models" (clipping of
updates, the estimator with a fixed divisor); Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially private
learning with adaptive clipping".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from silotune.privacy.noise import Entropy, normals, system
from silotune.structs import ClientUpdate, Tensors
from silotune.tensors import all_finite, check_alike, clip, norm


@dataclass(frozen=True, slots=True)
class ClientMechanism:
    """How the sum of a round's updates is made private.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity, for the round's whole release.
        max_examples: Examples above which a client counts no more; None when all count the same.
        expected_weight: What the sum is divided by: the weights of all clients times their probability to take part.
            It must not depend on who takes part, or the quotient's sensitivity would be another.
        count_deviation: Standard deviation of the noise on the count of clients below the bound; None for a fixed
            bound. The noise on the sum grows so that both releases together cost what ``noise_multiplier`` costs.
        quantile: Share of clients that an adaptive bound should leave unclipped.
        clip_learning_rate: How fast it goes there.
        expected_clients: Clients of a round, on average.
    """

    noise_multiplier: float
    expected_weight: float
    max_examples: int | None = None
    count_deviation: float | None = None
    quantile: float = 0.5
    clip_learning_rate: float = 0.2
    expected_clients: float = 1.0

    @property
    def sum_multiplier(self) -> float:
        """Noise multiplier of the sum alone: (z^-2 - (2 sigma_b)^-2)^(-1/2) (Andrew et al. 2021, section 3)."""
        if not self.count_deviation or not self.noise_multiplier:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_deviation) ** -2) ** -0.5


def weight_of(num_examples: int, max_examples: int | None) -> float:
    """What an update counts, in (0, 1]: 1, or its examples up to the cap as a share of the cap."""
    return 1.0 if max_examples is None else min(num_examples, max_examples) / max_examples


def least_count_deviation(noise_multiplier: float, expected_clients: float) -> float:
    """Noise on the count: a twentieth of the clients (Andrew et al. 2021), but enough to leave most for the sum."""
    return max(expected_clients / 20, noise_multiplier)


def private_mean(
    updates: Iterable[ClientUpdate],
    like: Tensors,
    mechanism: ClientMechanism,
    *,
    clip_norm: float,
    entropy: Entropy = system,
) -> tuple[Tensors, float]:
    """The noised mean of clipped updates, and the bound for the next round.

    sum_i w_i clip(delta_i, S) + N(0, (z S)^2), over the expected weight. Every w_i is at most 1, so one client's part
    of the sum has norm at most S, whatever it sends: that is the sensitivity. Updates that are not finite count as
    nothing sent.

    Args:
        updates: Consumed one by one.
        like: Names, shapes and dtypes of the result; it is noise alone where nobody replied.
        mechanism: Noise and weights.
        clip_norm: The bound S of this round.
        entropy: Where the noise comes from.
    """
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
    below = 0.0
    for update in updates:
        check_alike(like, update.delta)
        if not all_finite(update.delta):
            continue
        exact = {name: tensor.double() for name, tensor in update.delta.items()}
        below += 0.5 if norm(exact) <= clip_norm else -0.5
        for name, tensor in clip(exact, clip_norm).items():
            total[name].add_(tensor, alpha=weight_of(update.num_examples, mechanism.max_examples))
        del update, exact  # otherwise they would stay in memory until the next one arrives
    noised = with_noise(total, _deviation(mechanism.sum_multiplier, clip_norm), entropy)
    mean = {name: (tensor / mechanism.expected_weight).to(like[name].dtype) for name, tensor in noised.items()}
    return mean, _next_bound(clip_norm, below, mechanism, entropy)


def _next_bound(clip_norm: float, below: float, mechanism: ClientMechanism, entropy: Entropy) -> float:
    """S exp(-rate (share below - quantile)); each client adds 1/2 or -1/2 to the count, so it has sensitivity 1/2."""
    if mechanism.count_deviation is None:
        return clip_norm
    noise = float(normals(1, entropy)[0]) * mechanism.count_deviation
    share = (below + noise) / mechanism.expected_clients + 0.5
    step = mechanism.clip_learning_rate * (min(max(share, 0.0), 1.0) - mechanism.quantile)
    return clip_norm * math.exp(-step)


def private_update(delta: Tensors, *, clip_norm: float, noise_multiplier: float, entropy: Entropy = system) -> Tensors:
    """One site's update, clipped and noised before it leaves: N(0, (2 z S)^2) on every value.

    The server knows that the site takes part, so its update must look like any other update within the bound: two of
    them are up to 2 S apart.
    """
    exact = {name: tensor.double() for name, tensor in delta.items()}
    noised = with_noise(clip(exact, clip_norm), _deviation(2 * noise_multiplier, clip_norm), entropy)
    return {name: tensor.to(delta[name].dtype) for name, tensor in noised.items()}


def with_noise(tensors: Tensors, deviation: float, entropy: Entropy = system) -> Tensors:
    """Independent Gaussian noise added to every value, in float64; names in their own order."""
    if not deviation:
        return dict(tensors)
    return {
        name: tensor.double() + deviation * normals(tensor.numel(), entropy).view(tensor.shape).to(tensor.device)
        for name, tensor in tensors.items()
    }


def _deviation(multiplier: float, sensitivity: float) -> float:
    """Multiplier times sensitivity; 0 without noise, even if the sensitivity is infinite."""
    return multiplier * sensitivity if multiplier else 0.0


def with_bound(mechanism: ClientMechanism, expected_clients: float) -> ClientMechanism:
    """The same mechanism with an adaptive bound."""
    deviation = least_count_deviation(mechanism.noise_multiplier, expected_clients)
    return replace(mechanism, count_deviation=deviation, expected_clients=expected_clients)
