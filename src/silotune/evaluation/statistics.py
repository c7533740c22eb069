"""Statistics over seeds: mean, spread, bootstrap and Student intervals, a paired test, Holm's correction, fronts.

A seed is one repetition of a whole experiment (data, partition, first adapter, order of examples), so seeds are the
sample. With three of them little can be said, and these functions do not pretend otherwise:

- ``bootstrap_interval`` resamples the seeds. Of three values it is the range from the least to the greatest, which
  holds the true mean less often than 95 %: about three times of four for a symmetric distribution.
- ``paired_test`` is Student's paired t. A sign-flip permutation test, which assumes less, cannot give a p below
  2 / 2^n, that is 0.25 for three seeds and 0.0625 for five: it could never find anything here. The price is the
  assumption that differences between seeds are near normal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXACT = 50_000
"""Most resamples that are enumerated; beyond, so many are drawn."""
LEAST_SEEDS = 3
"""Fewer seeds than this carry no claim."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Mean, standard deviation and bootstrap 95 % interval of values, one a seed."""

    count: int
    mean: float
    deviation: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference over seeds.

    Attributes:
        sample: Of the differences.
        low: Lower end of Student's 95 % interval of the mean difference; None below two seeds.
        high: Upper end.
        p: Of the two-sided paired t test; None below two seeds.
    """

    sample: Sample
    low: float | None
    high: float | None
    p: float | None


def describe(values: Sequence[float]) -> Sample:
    """Mean, standard deviation (divisor n - 1; None of one value) and bootstrap interval.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values")
    low, high = bootstrap_interval(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Sample(len(values), math.fsum(values) / len(values), deviation, low, high)


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979).

    All n^n resamples where they are at most ``EXACT`` (up to six values), else as many drawn with a fixed seed.
    """
    sample = np.asarray(values, dtype=float)
    count = len(sample)
    if count**count <= EXACT:
        places = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        places = np.random.default_rng(seed).integers(count, size=(EXACT, count))
    means = sample[places].mean(axis=1)  # [resamples]
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail], method="inverted_cdf")
    return float(low), float(high)


def paired(left: Sequence[float], right: Sequence[float], *, level: float = 0.95) -> Difference:
    """``left`` minus ``right``, seed by seed, with Student's interval and test.

    Raises:
        ValueError: There are no values, or not equally many.
    """
    differences = [a - b for a, b in zip(left, right, strict=True)]
    sample = describe(differences)
    if sample.deviation is None:
        return Difference(sample, None, None, None)
    error = sample.deviation / math.sqrt(sample.count)
    half = _t_quantile((1 + level) / 2, sample.count - 1) * error
    return Difference(sample, sample.mean - half, sample.mean + half, paired_test(differences))


def paired_test(differences: Sequence[float]) -> float:
    """Two-sided p of Student's paired t test: that the mean difference is 0.

    Differences that are all the same number leave nothing to compare it with: p is 1 where that number is 0, else 0.

    Raises:
        ValueError: There are fewer than two.
    """
    from scipy.stats import t

    if len(differences) < 2:
        raise ValueError("a paired test needs two differences")
    mean = math.fsum(differences) / len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    if error <= 1e-12 * max(1.0, abs(mean)):
        return 1.0 if abs(mean) <= 1e-12 else 0.0
    return float(2 * t.sf(abs(mean) / error, len(differences) - 1))


def _t_quantile(share: float, degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(share, degrees))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p, in the order given, for all tests of a family.

    The k-th smallest of m is multiplied by m - k + 1, is at least the one before it, and at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of (cost, quality) no other beats: none is as cheap and as good, and cheaper or better."""
    return [
        not any(
            other_cost <= cost and other_quality >= quality and (other_cost < cost or other_quality > quality)
            for other_cost, other_quality in points
        )
        for cost, quality in points
    ]
