"""Noise that sites add in shares: integers of Skellam's distribution, whose sum is Skellam's again.

Each site adds a share to its integers before they are masked; the sum of the shares is noise of central strength, and
nobody sees anything less noisy. The variances of the shares add up, so a dropout takes its share away and the cost is
that of the shares that are in the sum. Sources: Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for
differentially private federated learning" (the noise and its cost); Kairouz, Liu and Steinke 2021, "The distributed
discrete Gaussian mechanism for federated learning with secure aggregation" (clipping, conditional rounding).
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from silotune.errors import PrivacyError, ProtectionError
from silotune.privacy.noise import Entropy, system
from silotune.privacy.ring import Integers, Scale, quantise, signed

ORDERS: tuple[int, ...] = (*range(2, 65), 80, 96, 128, 192, 256, 512)
"""Rényi orders; the bound holds for integers above 1."""
LARGEST_DEVIATION = 1e5
"""Largest standard deviation of a share, in integers: the table of its distribution has 24 times as many entries."""
LEAST_LENGTH, LENGTH_A_VALUE = 4096, 8
"""An update of the clip norm becomes integers whose norm is at least the first, and at least the second times the root
of their number: then rounding costs less than half a per cent of the noise."""
PLANNED_SIZE = 1 << 16
"""Values that a plan is made for before the model is known; the cost depends on them by less than a millionth."""
_TAILS = 12
"""Standard deviations that the table of a share covers: less than 1e-30 lies outside."""
_BITS, _HALF = 126, 63
_MOST_ROUNDINGS = 100
Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class SharedNoise:
    """The noise of one sum.

    Attributes:
        length: Integers that the clip norm becomes.
        norms: Sensitivity of the sum in integers: (largest sum of sizes, largest Euclidean norm), rounding counted in.
        share_variance: Of each site's share.
        colluding: Shares that are not counted, because their owners may reveal them.
    """

    length: int
    norms: tuple[float, float]
    share_variance: int
    colluding: int

    def multiplier(self, present: int) -> float:
        """Standard deviation of the noise of so many sites in the sum, over the sensitivity."""
        return math.sqrt(max(0, present - self.colluding) * self.share_variance) / self.norms[1]


def shared_noise(multiplier: float, *, bits: int, clients: int, needed: int, colluding: int, size: int) -> SharedNoise:
    """The noise of a sum that has at least ``multiplier`` times its sensitivity, whoever drops out.

    The shares of the fewest sites that a sum is opened for, without the colluding ones, make up the whole. The integers
    are as fine as is useful and as the ring and the table of the noise allow: clients x (integer norm + largest share)
    is below 2**(bits - 1), so no sum can wrap.

    Args:
        multiplier: Standard deviation of the noise over the sensitivity.
        bits: Of the ring.
        clients: At most so many are added up.
        needed: Fewest that a sum is opened for.
        colluding: Of these, so many may tell the server their shares.
        size: Values of an update.

    Raises:
        ProtectionError: Nobody's noise is left, or the ring has no room.
    """
    counted = needed - colluding
    if counted < 1:
        raise ProtectionError(
            f"a sum that is opened for {needed} sites, {colluding} of which may collude, has no noise that protects: "
            "take fewer privacy.dp.colluding, or more clients a round"
        )
    root = math.sqrt(size)
    ratio = multiplier / math.sqrt(counted)  # deviation of a share over the sensitivity
    room = ((1 << (bits - 1)) - 1) / clients - _TAILS - 2
    most = min(room / (1 + _TAILS * ratio), LARGEST_DEVIATION / ratio)
    length = max(LEAST_LENGTH, math.ceil(LENGTH_A_VALUE * root))
    if integer_norms(length, size)[1] > most:
        rest = most**2 - size / 4 - root / 2
        length = math.floor((math.sqrt(1 + 4 * rest) - 1) / 2) if rest > 0 else 0
    if length < 1:
        raise ProtectionError(
            f"{size} values of {clients} clients and their noise do not fit a ring of {bits} bits: take more "
            "privacy.protection.ring_bits or less noise"
        )
    norms = integer_norms(length, size)
    return SharedNoise(length, norms, math.ceil((ratio * norms[1]) ** 2), colluding)


def integer_norms(length: int, size: int) -> tuple[float, float]:
    """Largest (sum of sizes, Euclidean norm) of an update of norm ``length`` after conditional rounding.

    The norm is at most sqrt(length^2 + d / 4 + length + sqrt(d) / 2) and at most length + sqrt(d) for d values
    (Kairouz et al. 2021, proposition 22 with beta = e^(-1/2)); the sum of sizes is at most sqrt(d) times the norm and,
    of integers, at most its square.
    """
    root = math.sqrt(size)
    l2 = min(math.sqrt(length**2 + size / 4 + length + root / 2), length + root)
    return min(root * l2, l2**2), l2


def largest_noised(noise: SharedNoise, clients: int, size: int) -> tuple[float, float]:
    """Largest (magnitude of a value, Euclidean norm) that a noised sum of integers has, but with a chance of 1e-29.

    The updates' part is certain: each has at most the integer norm. The noise's is Bernstein's inequality, for a value
    of variance V and, over d values that keep within t, for the sum of their squares (mean d V, variance below
    d (3 V^2 + V), each at most t^2): t = 12 sqrt(V) + 48 and d V + 12 sqrt(d (3 V^2 + V)) + 48 t^2 are passed with a
    chance below e^-70 each.

    Args:
        noise: That every client added a share of.
        clients: In the sum.
        size: Values of an update.
    """
    variance = clients * noise.share_variance
    value = 12 * math.sqrt(variance) + 48
    squares = size * variance + 12 * math.sqrt(size * (3 * variance**2 + variance)) + 48 * value**2
    update = clients * noise.norms[1]
    return update + value, update + math.sqrt(squares)


def rounded(values: Array, weight: int, scale: Scale, *, bits: int, generator: np.random.Generator) -> Integers:
    """An update as integers whose norm is surely within ``integer_norms``: rounded again until it is.

    A try succeeds with a chance of 0.39 or more (Kairouz et al. 2021, proposition 22), mostly at once.

    Args:
        values: float32 [size], of norm at most ``scale.bound``.
        weight: Of the site, at most ``scale.max_examples``.
        scale: Its levels are the integers of the clip norm.
        bits: Of the ring.
        generator: For the rounding; it may be reproducible, since the noise hides what it does.

    Raises:
        ProtectionError: No try succeeds: the update is longer than it may be.
    """
    largest = integer_norms(scale.levels, values.size)[1]
    for _ in range(_MOST_ROUNDINGS):
        made, _ = quantise(values, weight, scale, bits=bits, generator=generator)
        if np.linalg.norm(signed(made).astype(np.float64)) <= largest:
            return made
    raise ProtectionError("an update is longer than privacy.dp.clip_norm and cannot be noised")


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


def skellam(count: int, variance: int, entropy: Entropy = system) -> Array:
    """Independent Skellam integers of mean 0, int64 [count].

    By inversion: a uniform integer of 126 bits is looked up among the sums of the probabilities. Those are computed in
    integers, so that no digit of the noise depends on floating point; a value's distribution differs from Skellam's by
    less than 2^-90 in total variation.

    Args:
        count: Values.
        variance: A whole number, 1 or more.
        entropy: Where the bits come from.

    Raises:
        PrivacyError: The standard deviation is so large that its table would not fit.
    """
    if not 1 <= variance <= LARGEST_DEVIATION**2:
        raise PrivacyError(
            f"a share of noise has variance {variance:g} in integers; it may have 1 to {LARGEST_DEVIATION**2:g}"
        )
    sums, upper = _table(variance)
    drawn = np.frombuffer(entropy(8 * count), "<u8") >> np.uint64(64 - _HALF)
    places = np.searchsorted(upper, drawn, side="right")
    unsure = np.flatnonzero(np.searchsorted(upper, drawn, side="left") != places)
    for place in unsure:  # the first half of the bits does not decide
        rest = int.from_bytes(entropy(8), "little") >> (64 - _HALF)
        places[place] = bisect.bisect_right(sums, (int(drawn[place]) << _HALF) | rest)
    return places.astype(np.int64) - len(sums) // 2


@lru_cache(maxsize=2)  # the sites of one process draw from one table
def _table(variance: int) -> tuple[list[int], Integers]:
    """Sums of the probabilities of -n to n in units of 2^-126, and their upper halves.

    A probability is e^-v I_|k|(v). The Bessel functions come from their recurrence I_(k-1) = I_(k+1) + (2k / v) I_k,
    downwards (Miller's algorithm), in integers, begun so far outside that the beginning does not matter.
    """
    reach = _TAILS * (math.isqrt(variance) + 1)
    outer, inner = 0, 1 << 200
    found: list[int] = []
    for order in range(reach + reach // 3 + 40, 0, -1):
        outer, inner = inner, outer + 2 * order * inner // variance
        if order <= reach + 1:
            found.append(inner)  # of order - 1
    chances = [*found, *found[-2::-1]]  # of n to 0, then of 1 to n
    whole, total, sums = sum(chances), 0, []
    for chance in chances:
        total += chance
        sums.append((total << _BITS) // whole)
    return sums, np.array([item >> _HALF for item in sums], np.uint64)
