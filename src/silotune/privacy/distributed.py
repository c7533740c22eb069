"""Noise that sites add in shares: integers of Skellam's distribution, whose sum is Skellam's again.

Each site adds a share to its integers before they are masked; the sum of the shares is noise of central strength, and
nobody sees anything less noisy. The variances of the shares add up, so a dropout takes its share away and the cost is
that of the shares that are in the sum. Source: Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for
differentially private federated learning".
"""

from __future__ import annotations

import math

import torch

from silotune.errors import PrivacyError
from silotune.privacy.noise import Entropy, system, uniforms

ORDERS: tuple[float, ...] = tuple(range(2, 65)) + (80, 96, 128, 192, 256, 512)
"""Rényi orders; the bound holds for integers above 1."""
_TAILS = 12.0
"""Standard deviations up to which the table of probabilities goes: less than 1e-30 lies outside."""
LARGEST_DEVIATION = 1e5
"""Of a share, in integers: the table of its distribution has 24 times as many entries."""


def skellam_rdp(order: float, l1: float, l2: float, variance: float) -> float:
    """Rényi divergence of order ``order`` between Skellam noise and itself moved by an integer vector.

    order l2^2 / (2 v) + min(((2 order - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v)), with v the variance (Agarwal et al.
    2021, theorem 3.5).

    Args:
        order: Integer above 1.
        l1: Largest sum of sizes of the vector.
        l2: Its largest Euclidean norm.
        variance: Of the noise on each value.
    """
    if variance <= 0:
        return math.inf
    extra = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return order * l2**2 / (2 * variance) + extra


def skellam(count: int, variance: float, entropy: Entropy = system) -> torch.Tensor:
    """Independent Skellam integers of mean 0, int64 [count].

    By inversion of the distribution function in double precision; `rounding_delta` bounds what that is off by.

    Raises:
        PrivacyError: The standard deviation is so large that its table would not fit; lower the scale.
    """
    from scipy.special import ive

    deviation = math.sqrt(variance)
    if not 0 < deviation <= LARGEST_DEVIATION:
        raise PrivacyError(
            f"a share of noise has standard deviation {deviation:g} in integers; it may have up to "
            f"{LARGEST_DEVIATION:g}: use a coarser scale"
        )
    reach = _reach(variance)
    places = torch.arange(-reach, reach + 1)
    chances = torch.from_numpy(ive(places.abs().double().numpy(), variance))  # e^-v I_|k|(v)
    total = chances.cumsum(0)
    return places[torch.searchsorted(total / total[-1], uniforms(count, entropy)).clamp(max=2 * reach)]


def rounding_delta(count: int, variance: float) -> float:
    """What drawing ``count`` values in double precision may add to delta, for each site that draws a share.

    Both ends of each of the table's entries are off by at most 2^-53 for the sum and 2^-52 for the uniform value; total
    variation adds up over entries and values.
    """
    return count * (2 * _reach(variance) + 1) * 2.0**-51


def _reach(variance: float) -> int:
    return math.ceil(_TAILS * math.sqrt(variance)) + 12


def share_of_variance(total: float, *, least_sites: int) -> float:
    """Variance of each site's share so that the shares of ``least_sites`` sites make up ``total``.

    More sites than that make the sum noisier than needed, fewer must not be summed: the threshold of the secure sum
    is the natural value.
    """
    if least_sites < 1:
        raise PrivacyError("noise in shares needs at least one site")
    return total / least_sites


def integer_norms(clip_norm: float, scale: float, num_values: int) -> tuple[float, float]:
    """Sensitivity of a rounded update in integers: (largest sum of sizes, largest Euclidean norm).

    An update of norm at most ``clip_norm`` is multiplied by ``scale`` and rounded stochastically. Rounding moves each
    value by less than 1, so the norm by less than sqrt(num_values); the sum of sizes is at most sqrt(num_values) times
    the norm, and of integers at most its square.
    """
    l2 = scale * clip_norm + math.sqrt(num_values)
    return min(math.sqrt(num_values) * l2, l2**2), l2
