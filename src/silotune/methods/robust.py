"""Rules that some malicious or broken clients cannot lead astray.

``median``, ``trimmed_mean`` and Krum count every update once: the number of examples is only what a client says.
All of them hold every update of a round in memory at once, except the norm bound with a fixed bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from silotune.errors import FederationError
from silotune.methods.aggregate import Rule, RunningMean, weighted_mean
from silotune.settings.aggregation import (
    AggregationSettings,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from silotune.structs import ClientUpdate, Tensors
from silotune.tensors import check_alike, clip, norm

SMOOTHING = 1e-6
"""The nu of RFA: a smaller distance is taken to be this one, so that no weight is infinite."""
_CHUNK = 1 << 18
"""Number of values of every update that are compared at a time, in float64."""
_MOST_ITERATIONS = 1000
_TOLERANCE = 1e-12


def trimmed_mean(count: Callable[[int], int]) -> Rule:
    """For each value, the mean without the ``count(updates)`` smallest and largest (Yin et al. 2018, Definition 2).

    Holds all updates.
    """

    def rule(updates: Iterable[ClientUpdate]) -> Tensors:
        held = _held(updates)
        trim = count(len(held))

        def middle(values: torch.Tensor) -> torch.Tensor:  # [updates, values] -> [values]
            return values.sort(dim=0).values[trim : len(held) - trim].mean(dim=0)

        return _value_by_value(held, middle)

    return rule


def share_trimmed(share: float) -> Callable[[int], int]:
    """How many updates a share of them is, rounded up, so that at least one is left."""
    return lambda count: min(math.ceil(round(share * count, 9)), _all_but_the_middle(count))


def _all_but_the_middle(count: int) -> int:
    return (count - 1) // 2


def median() -> Rule:
    """The middle of each value, of an even number the mean of both (Yin et al. 2018, Definition 1); holds all."""
    return trimmed_mean(_all_but_the_middle)


def norm_bound(bound: float | None) -> Rule:
    """Weighted mean of updates scaled down to a norm of at most ``bound`` (Sun et al. 2019, section 5).

    With None the bound is the median of the round's norms, for which all updates are held.
    """

    def rule(updates: Iterable[ClientUpdate]) -> Tensors:
        if bound is not None:
            return weighted_mean(_clipped(updates, bound))
        held = _held(updates)
        return weighted_mean(_clipped(held, statistics.median(norm(update.delta) for update in held)))

    return rule


def _clipped(updates: Iterable[ClientUpdate], bound: float) -> Iterable[ClientUpdate]:
    return map(lambda update: replace(update, delta=clip(update.delta, bound)), updates)


def krum(malicious: int, *, keep: Callable[[int], int]) -> Rule:
    """Plain mean of the updates that are closest to their neighbours (Blanchard et al. 2017, section 4).

    An update's score is the sum of its squared distances to its n - f - 2 nearest; the ``keep(n)`` updates with the
    lowest scores stay. Holds all updates.

    Raises:
        FederationError: There are fewer than 2 f + 3 updates, for which nothing is promised.
    """

    def rule(updates: Iterable[ClientUpdate]) -> Tensors:
        held = _held(updates)
        if len(held) < 2 * malicious + 3:
            raise FederationError(
                f"krum with federation.aggregation.malicious = {malicious} needs at least {2 * malicious + 3} updates "
                f"a round, got {len(held)}; ask more clients, or lower it"
            )
        nearest = squared_distances(held).sort(dim=1).values[:, 1 : len(held) - malicious - 1]  # [n, n - f - 2]
        best = nearest.sum(dim=1).argsort(stable=True)[: keep(len(held))].tolist()
        return weighted_mean(replace(held[place], weight=1.0) for place in sorted(best))

    return rule


def geometric_median(updates: Iterable[ClientUpdate]) -> Tensors:
    """The point with the least weighted sum of distances to the updates; holds all.

    RFA (Pillutla et al. 2022), Algorithm 2: Weiszfeld's iteration with distances of at least ``SMOOTHING``, begun at
    the weighted mean and run until it stands still. Every iterate is a weighted mean of the updates, so only weights
    are moved, and the updates are gone over twice.

    Raises:
        FederationError: There is no update, or the weights sum to zero.
    """
    held = _held(updates)
    given = torch.tensor([update.counts for update in held], dtype=torch.float64)
    if not float(given.sum()) > 0:
        raise FederationError("there is nothing to aggregate: no update with at least one example")
    given /= given.sum()
    inner = inner_products(held)
    shares = given.clone()
    for _ in range(_MOST_ITERATIONS):
        # v = sum_j shares_j delta_j. By inner products a huge update comes in with its share only, which is small.
        away = (inner.diagonal() - 2 * inner @ shares + shares @ inner @ shares).clamp(min=0).sqrt()
        moved = given / away.clamp(min=SMOOTHING)
        moved /= moved.sum()
        change = float((moved - shares).abs().max())
        shares = moved
        if change < _TOLERANCE:
            break
    mean = RunningMean()
    for update, share in zip(held, shares.tolist(), strict=True):
        mean.add(update.delta, share)
    return mean.result()


def squared_distances(updates: Sequence[ClientUpdate]) -> torch.Tensor:
    """Squared Euclidean distances between all deltas [n, n], in float64."""
    apart = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0].delta:
        for values in _chunks(updates, name):
            apart += torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
    return apart


def inner_products(updates: Sequence[ClientUpdate]) -> torch.Tensor:
    """Inner products of all deltas [n, n], in float64."""
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0].delta:
        for values in _chunks(updates, name):
            found += values @ values.T
    return found


def _held(updates: Iterable[ClientUpdate]) -> list[ClientUpdate]:
    """All updates at once, by client, so that the order in which they came makes no difference.

    Raises:
        FederationError: There is none.
        MessageError: Names or shapes differ between updates.
    """
    held = sorted(updates, key=lambda update: update.client)
    if not held:
        raise FederationError("there is nothing to aggregate: no usable update")
    for update in held:
        check_alike(held[0].delta, update.delta)
    return held


def _value_by_value(held: Sequence[ClientUpdate], function: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """``function`` of all updates' values [updates, values], in the dtypes and shapes of the first update."""
    return {
        name: torch.cat([function(values) for values in _chunks(held, name)]).reshape(like.shape).to(like.dtype)
        for name, like in held[0].delta.items()
    }


def _chunks(held: Sequence[ClientUpdate], name: str) -> Iterable[torch.Tensor]:
    """One tensor of all updates, in parts of float64 [updates, values]."""
    rows = [update.delta[name].detach().reshape(-1).split(_CHUNK) for update in held]
    return (torch.stack(list(part)).double() for part in zip(*rows, strict=True))


AGGREGATIONS: Mapping[type[AggregationSettings], Callable[[Any], Rule]] = {
    Mean: lambda settings: weighted_mean,
    Median: lambda settings: median(),
    TrimmedMean: lambda settings: trimmed_mean(share_trimmed(settings.trim)),
    NormBound: lambda settings: norm_bound(settings.bound),
    Krum: lambda settings: krum(settings.malicious, keep=lambda count: 1),
    MultiKrum: lambda settings: krum(settings.malicious, keep=lambda count: count - settings.malicious),
    GeometricMedian: lambda settings: geometric_median,
}
"""Settings -> builder of the rule that they are of."""
