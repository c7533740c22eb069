"""What noise costs in epsilon, and what noise an epsilon takes: dp-accounting's two accountants.

PLD: numerical composition of privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, connect the
dots). RDP: moments (Mironov 2017; Mironov, Talwar and Zhang 2019), looser and faster. Both give upper bounds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from silotune.errors import ConfigError, require
from silotune.privacy.distributed import ORDERS, SharedNoise, skellam_rdp
from silotune.settings.privacy import Accountant

GRID = 1e-3
"""Step of the grid on which PLD rounds losses up: an epsilon is at most about 0.002 above that of a step of 1e-4."""
LARGEST_NOISE = 1e4
LEAST_NOISE = 0.2
"""Less protects next to nothing (epsilon above 25 in a single step) and would take a PLD minutes, so RDP counts it."""
MOST_POINTS = 1 << 20
"""The most points on the grid of a PLD, as `_points` bounds them: seconds and some hundred MB. Above, where many steps
have little noise and epsilon is in the hundreds, RDP counts."""
_REACH, _TAIL = 10.0, 1e-15
"""Standard deviations of noise that dp-accounting keeps (all but a mass of exp(-50)), and the mass that it cuts off a
sum."""
_CLOSE = 2e-3
"""How far above the least noise that keeps an epsilon the answer of `noise_for` may be, as a share of it."""


@dataclass(frozen=True, slots=True)
class Spend:
    """Several releases of one mechanism, each of a Poisson sample of the protected units.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity (Euclidean norm) of the sum.
        sampling_rate: Probability of each unit to be in a release; 1 where no amplification is claimed.
        steps: Releases.
        skellam_norms: Of Skellam noise: sensitivity in integers as (sum of sizes, Euclidean norm); None for Gaussian.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1
    skellam_norms: tuple[float, float] | None = None


def merged(spends: Iterable[Spend]) -> list[Spend]:
    """The same releases with those of one kind counted together, in the order of their first."""
    steps: dict[Spend, int] = {}
    for spend in spends:
        kind = replace(spend, steps=1)
        steps[kind] = steps.get(kind, 0) + spend.steps
    return [replace(kind, steps=count) for kind, count in steps.items() if count]


def epsilon(spends: Iterable[Spend], delta: float, *, accountant: Accountant = "pld", grid: float = GRID) -> float:
    """Upper bound on the epsilon that these releases together cost at ``delta``, for adding or removing one unit.

    Gaussian and Skellam releases are composed each for half of delta and then added (basic composition).

    Args:
        spends: All releases; none cost nothing.
        delta: In (0, 1).
        accountant: ``pld`` or ``rdp``; Skellam releases are always counted by RDP.
        grid: Step of the PLD's grid.

    Raises:
        MissingPackageError: dp-accounting is not installed.
    """
    kinds = merged(spends)
    gaussian = [spend for spend in kinds if spend.skellam_norms is None]
    skellam = [spend for spend in kinds if spend.skellam_norms is not None]
    share = delta / 2 if gaussian and skellam else delta
    cost = _gaussian_epsilon(gaussian, share, accountant, grid) if gaussian else 0.0
    return cost + (_skellam_epsilon(skellam, share) if skellam else 0.0)


def _gaussian_epsilon(spends: Sequence[Spend], delta: float, accountant: Accountant, grid: float) -> float:
    if any(spend.noise_multiplier <= 0 for spend in spends):
        return math.inf
    events = require("dp_accounting", extra="dp")
    with _silent():
        made = _empty(accountant if _is_within(spends, grid) else "rdp", grid)
        for spend in spends:
            event = events.GaussianDpEvent(spend.noise_multiplier)
            if spend.sampling_rate < 1:
                event = events.PoissonSampledDpEvent(spend.sampling_rate, event)
            made.compose(event, spend.steps)
        return float(made.get_epsilon(delta))


def _is_within(spends: Sequence[Spend], grid: float) -> bool:
    """Whether a PLD of these releases takes bounded memory and time, whatever their noise and number."""
    is_fine = min(spend.noise_multiplier for spend in spends) >= LEAST_NOISE
    return is_fine and sum(_points(spend, grid) for spend in spends) <= MOST_POINTS


def _points(spend: Spend, grid: float) -> float:
    """An upper bound on the points of the grid on which dp-accounting composes these releases.

    Plain Gaussian releases are one with less noise. The loss of a sampled one has a range and a variance. The sum of
    many is cut by Chernoff's bound at the orders 1 to 20 over that range, which Bennett's inequality bounds in turn.
    """
    noise, rate, steps = spend.noise_multiplier, spend.sampling_rate, spend.steps
    if rate >= 1:
        alone = noise / math.sqrt(steps)
        return (1 + 2 * _REACH * alone) / alone**2 / grid + 2
    sums = np.linspace(-_REACH * noise, 1 + _REACH * noise, 4001)
    losses = np.logaddexp(math.log1p(-rate), math.log(rate) + (sums - 0.5) / noise**2) / grid
    reach = float(losses[-1] - losses[0]) + 2
    without, within = (np.exp(-(((sums - mean) / noise) ** 2) / 2) for mean in (0, 1))
    variance = max(
        float(np.cov(losses, aweights=weights, ddof=0)) for weights in (without, (1 - rate) * without + rate * within)
    )
    spread, tails = 2 * steps * variance / reach**2, 2 * math.log(2 / _TAIL)
    return reach * min(steps, *((spread * (math.exp(order) - 1 - order) + tails) / order for order in range(1, 21)))


def _skellam_epsilon(spends: Sequence[Spend], delta: float) -> float:
    rdp = require("dp_accounting.rdp", extra="dp")
    costs = [sum(spend.steps * skellam_rdp(order, *_integer_noise(spend)) for spend in spends) for order in ORDERS]
    return float(rdp.compute_epsilon(ORDERS, costs, delta)[0])


def _integer_noise(spend: Spend) -> tuple[float, float, float]:
    """Sensitivities (sum of sizes, Euclidean) and the variance, in integers."""
    largest, euclidean = spend.skellam_norms or (0.0, 0.0)
    return largest, euclidean, (spend.noise_multiplier * euclidean) ** 2


@lru_cache(64)
def noise_for(
    target: float, delta: float, *, sampling_rate: float = 1.0, steps: int = 1, accountant: Accountant = "pld"
) -> float:
    """A noise multiplier with which so many steps cost at most ``target``, at most 0.2 % above the least.

    The search starts at what the central limit makes of the steps, goes up or down until it has the answer between
    two values, and halves their ratio.

    Raises:
        ConfigError: No noise multiplier up to 10,000 is enough.
    """

    def is_enough(noise: float) -> bool:
        return epsilon([Spend(noise, sampling_rate, steps)], delta, accountant=accountant) <= target

    guess = sampling_rate * math.sqrt(2 * steps * math.log(1.25 / delta)) / target
    found = least_noise(is_enough, guess)
    if found is None:
        raise ConfigError(
            f"no noise keeps epsilon = {target:g} at delta = {delta:g} over {steps} steps of rate "
            f"{sampling_rate:g}; allow a larger epsilon or fewer rounds"
        )
    return found


def least_noise(is_enough: Callable[[float], bool], guess: float) -> float | None:
    """The least noise multiplier that is enough, up to 0.2 % above it; None where 10,000 is not."""
    high = min(max(guess, 2 * LEAST_NOISE), LARGEST_NOISE)
    while not is_enough(high):
        if high >= LARGEST_NOISE:
            return None
        high = min(1.5 * high, LARGEST_NOISE)
    low = high / 1.5
    while low > LEAST_NOISE and is_enough(low):
        low, high = low / 1.5, low
    while high / low > 1 + _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return _rounded_up(high)


def _rounded_up(noise: float) -> float:
    """To four significant digits, upwards: a figure that can be read and repeated."""
    unit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    return round(math.ceil(noise / unit - 1e-9) * unit, 12)


def curve(spends: Sequence[Spend], rounds: Sequence[int], delta: float, *, accountant: Accountant) -> list[float]:
    """Epsilon after each of ``rounds`` rounds, where ``spends`` is what one round releases."""
    return [
        epsilon([replace(spend, steps=spend.steps * count) for spend in spends], delta, accountant=accountant)
        for count in rounds
    ]


def _empty(accountant: Accountant, grid: float) -> Any:
    if accountant == "rdp":
        return require("dp_accounting.rdp", extra="dp").RdpAccountant()
    return require("dp_accounting.pld", extra="dp").PLDAccountant(value_discretization_interval=grid)


@contextmanager
def _silent() -> Iterator[None]:
    """Silences dp-accounting, which at every call logs a warning about the orders that it leaves out."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def spend_of(noise: SharedNoise, present: int) -> Spend:
    """What a sum over this many sites releases."""
    return Spend(noise.multiplier(present), skellam_norms=noise.norms)
