"""A lower bound on epsilon from what an attacker guesses right: a check that a guarantee is not false.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run": canaries are put in or left out by
independent fair coins, the attacker guesses some of the coins from the outcome, and under (epsilon, delta)
differential privacy it can hardly guess more of them right than randomised response would (theorem 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom


def p_value(right: int, guesses: int, canaries: int, *, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses under the claimed guarantee (Steinke et al. 2023, algorithm 3).

    Args:
        right: Guesses that were right.
        guesses: Guesses made; the attacker may abstain from the others.
        canaries: Examples whose coin was thrown.
        epsilon: Claimed.
        delta: Claimed.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    fewer = np.arange(1, right + 1)
    summed = np.cumsum(binom.pmf(right - fewer, guesses, chance))  # P[right > X >= right - fewer]
    steepest = float(np.max(summed / fewer, initial=0.0))
    return min(1.0, tail + steepest * delta * 2 * canaries)


def lower_bound(right: int, guesses: int, canaries: int, *, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that so many right guesses rule out, at the confidence; 0 when they rule out none."""
    low, high = 0.0, 20.0
    if p_value(right, guesses, canaries, epsilon=low, delta=delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        is_ruled_out = p_value(right, guesses, canaries, epsilon=middle, delta=delta) <= 1 - confidence
        low, high = (middle, high) if is_ruled_out else (low, middle)
    return low


def guesses_right(scores: Sequence[float], was_in: Sequence[bool], guesses: int) -> int:
    """Number of right guesses of an attacker that calls the highest scores "in" and as many of the lowest "out".

    Args:
        scores: Of each canary; higher speaks for its being in.
        was_in: What the coins said.
        guesses: How many to make; even.
    """
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    half = guesses // 2
    return sum(not was_in[place] for place in order[:half]) + sum(was_in[place] for place in order[-half:])
