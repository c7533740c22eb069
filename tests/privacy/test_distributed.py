"""Noise in shares: its distribution and cost, sensitivity after rounding, room in the ring."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from scipy.stats import skellam as theory

from silotune.errors import PrivacyError, ProtectionError
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.distributed import (
    LENGTH_A_VALUE,
    SharedNoise,
    integer_norms,
    largest_noised,
    rounded,
    shared_noise,
    skellam,
    skellam_rdp,
)
from silotune.privacy.ring import Scale, signed

DELTA = 1e-5


def seeded(seed: int = 0):
    return random.Random(seed).randbytes


@pytest.mark.parametrize("variance", [1, 7, 400])
def test_a_share_is_skellam(variance: int) -> None:
    made = skellam(100_000, variance, seeded(1))
    assert made.dtype == np.int64
    places = np.arange(-3 * math.isqrt(variance) - 1, 3 * math.isqrt(variance) + 2)
    counts = np.array([np.count_nonzero(made == place) for place in places])
    chances = theory.pmf(places, variance / 2, variance / 2)
    rest = len(made) - counts.sum()
    expected = np.append(chances, 1 - chances.sum()) * len(made)
    assert chisquare(np.append(counts, rest), expected).pvalue > 1e-6


def test_shares_add_up_to_central_strength() -> None:
    """Twelve shares of a twelfth: variance and shape of the whole, to three standard errors."""
    sites, whole = 12, 48_000
    made = sum(skellam(20_000, whole // sites, seeded(site)) for site in range(sites))
    assert float(made.var()) == pytest.approx(whole, rel=0.03)
    assert abs(float(made.mean())) < 3 * math.sqrt(whole / 20_000)
    assert skellam(5, 10**8).std() > 0  # from the system's generator
    with pytest.raises(PrivacyError, match=r"it may have 1 to 1e\+10"):
        skellam(1, 10**10 + 1)
    with pytest.raises(PrivacyError, match="it may have 1 to"):
        skellam(1, 0)


def test_bits_that_do_not_decide_are_looked_up_further() -> None:
    """A uniform value in the cell of a boundary: the second half of its bits says on which side it is."""
    low, high = (skellam(1, 1, lambda count, byte=byte: byte * count)[0] for byte in (b"\x00", b"\xff"))
    assert low == -24 and high == 24


def test_cost_by_hand_and_near_the_gaussian_one() -> None:
    # order 2, l1 3, l2 2, variance 10: 2*4/20 + min((3*4 + 18)/400, 9/20) = 0.4 + 0.075
    assert skellam_rdp(2, 3.0, 2.0, 10.0) == pytest.approx(0.475)
    assert skellam_rdp(2, 3.0, 2.0, 0.0) == math.inf
    norms = integer_norms(4096, 10_000)
    for multiplier, known in ((1.0, 4.728507), (4.0, None)):  # KNOWN_ANSWERS: 1, 1, 1 by RDP (dp-accounting)
        discrete = epsilon([Spend(multiplier, skellam_norms=norms)], DELTA)
        smooth = epsilon([Spend(multiplier)], DELTA, accountant="rdp") if known is None else known
        assert smooth * 0.9999 <= discrete < smooth * 1.02
    both = epsilon([Spend(1.0, skellam_norms=norms), Spend(3.0)], DELTA)
    assert both > epsilon([Spend(1.0, skellam_norms=norms)], DELTA)


@pytest.mark.parametrize("order", [2, 8])
def test_the_bound_holds_for_the_exact_divergence(order: int) -> None:
    variance, shift = 400, 20
    places = np.arange(-600, 601)
    here, there = (theory.logpmf(places - moved, variance / 2, variance / 2) for moved in (0, shift))
    exact = np.log(np.exp(order * here - (order - 1) * there).sum()) / (order - 1)
    bound = skellam_rdp(order, shift, shift, variance)
    assert exact <= bound < 1.05 * exact


def test_norms_by_hand() -> None:
    # 64 values of norm 100: sqrt(10000 + 16 + 100 + 4) and no more than 108; at most 8 times that
    l1, l2 = integer_norms(100, 64)
    assert l2 == pytest.approx(math.sqrt(10_120)) and l1 == pytest.approx(8 * l2)
    assert integer_norms(1, 1_000_000)[1] == pytest.approx(math.sqrt(1 + 250_000 + 1 + 500))
    assert integer_norms(1, 4) == (pytest.approx(math.sqrt(4) * math.sqrt(4)), pytest.approx(2.0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400), st.integers(0, 10**6), st.integers(1, 5))
def test_a_rounded_update_is_never_longer_than_its_sensitivity(size: int, seed: int, weight: int) -> None:
    drawn = np.random.default_rng(seed)
    values = drawn.normal(size=size)
    values = (2.0 * values / np.linalg.norm(values)).astype(np.float32)
    scale = Scale(50, 2.0, 5)
    made = rounded(values, weight, scale, bits=32, generator=drawn)
    assert np.linalg.norm(signed(made).astype(float)) <= integer_norms(50, size)[1]
    assert np.abs(signed(made) - values * scale.factor(weight)).max() < 1 + 1e-3


def test_an_update_that_is_too_long_is_refused() -> None:
    with pytest.raises(ProtectionError, match="longer than privacy.dp.clip_norm"):
        rounded(np.full(100, 1.0, np.float32), 1, Scale(5000, 1.0, 1), bits=32, generator=np.random.default_rng(0))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 50), st.integers(3, 1000), st.integers(1, 10**7), st.sampled_from([32, 64]), st.integers(0, 1))
def test_sums_never_wrap_and_have_the_noise_whoever_drops_out(multiplier, clients, size, bits, colluding) -> None:
    needed = clients * 2 // 3 + 1
    made = shared_noise(multiplier, bits=bits, clients=clients, needed=needed, colluding=colluding, size=size)
    largest_share = 12 * (math.isqrt(made.share_variance) + 1)
    assert clients * (made.norms[1] + largest_share) <= 2 ** (bits - 1) - 1
    assert made.multiplier(needed) >= multiplier * (1 - 1e-12)
    assert made.multiplier(needed) == pytest.approx(multiplier, rel=0.01)
    assert made.multiplier(clients) >= made.multiplier(needed)
    assert made.multiplier(colluding) == 0.0
    assert made.norms == integer_norms(made.length, size)


def test_shares_by_hand() -> None:
    # 10 sites, 7 needed, 1 colluding: six shares make up 2 times the sensitivity
    made = shared_noise(2.0, bits=32, clients=10, needed=7, colluding=1, size=100)
    assert made.length == 4096 and LENGTH_A_VALUE * 10 < 4096
    l2 = math.sqrt(4096**2 + 25 + 4096 + 5)
    assert made.norms == (pytest.approx(10 * l2), pytest.approx(l2))
    assert made.share_variance == math.ceil(4 * l2**2 / 6)
    assert made.multiplier(10) == pytest.approx(2 * math.sqrt(9 / 6))
    assert isinstance(made, SharedNoise)


def test_what_cannot_be_noised_is_said() -> None:
    with pytest.raises(ProtectionError, match="take fewer privacy.dp.colluding"):
        shared_noise(1.0, bits=32, clients=3, needed=3, colluding=3, size=10)
    with pytest.raises(ProtectionError, match="do not fit a ring of 16 bits"):
        shared_noise(1.0, bits=16, clients=1000, needed=700, colluding=0, size=1_000_000)


@pytest.mark.parametrize(("multiplier", "size"), [(1e-4, 50), (0.5, 50), (0.5, 20_000), (8.0, 3000)])
def test_a_noised_sum_keeps_within_what_it_can_be_and_comes_near(multiplier: float, size: int) -> None:
    noise = shared_noise(multiplier, bits=32, clients=4, needed=3, colluding=1, size=size)
    value, norm = largest_noised(noise, 4, size)
    scale = Scale(noise.length, 1.0, 1)
    for seed in range(5):
        generator = np.random.default_rng(seed)
        update = generator.normal(size=size).astype(np.float32)
        update /= np.linalg.norm(update) * np.float32(1 + 1e-6)
        total = np.zeros(size)
        for _ in range(4):  # all of them the same, so that norms add up
            made = signed(rounded(update, 1, scale, bits=32, generator=generator)).astype(np.int64)
            total += made + skellam(size, noise.share_variance)
        assert np.abs(total).max() <= value and np.linalg.norm(total) <= norm
    assert size < 1000 or norm < 3 * np.linalg.norm(total)  # of few values it is very generous


@pytest.mark.parametrize("variance", [1, 4, 1000])
def test_the_tail_of_the_noise_is_below_the_promised_chance(variance: int) -> None:
    noise = SharedNoise(4096, (1.0, 0.0), variance, 0)
    value, _ = largest_noised(noise, 1, 10)
    assert theory.sf(value, variance / 2, variance / 2) < 1e-29
