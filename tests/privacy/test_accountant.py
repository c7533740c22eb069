"""Epsilon against known answers, noise that fits an epsilon, Skellam's bound by hand."""

from __future__ import annotations

import math

import pytest
import torch

from silotune.errors import ConfigError, PrivacyError
from silotune.privacy import accountant
from silotune.privacy.accountant import Spend, curve, epsilon, merged, noise_for
from silotune.privacy.distributed import (
    integer_norms,
    rounding_delta,
    share_of_variance,
    skellam,
    skellam_rdp,
)
from silotune.privacy.noise import drawn, normals, uniforms

DELTA = 1e-5
KNOWN = [  # noise multiplier, sampling rate, steps, RDP, PLD (dp-accounting 0.6.0)
    (1.5, 0.04, 2250, 7.329335, 6.768787),
    (1.0, 0.01, 1000, 2.101367, 1.828244),
    (1.0, 1.0, 1, 4.728507, 4.377178),
    (1.0, 1.0, 10, 19.053598, 17.856587),
    (4.0, 1.0, 100, 14.132226, 13.206712),
    (1.1, 0.1, 100, 6.620769, 5.912652),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "rdp", "pld"), KNOWN)
def test_known_answers(noise: float, rate: float, steps: int, rdp: float, pld: float) -> None:
    spends = [Spend(noise, rate, steps)]
    assert epsilon(spends, DELTA, accountant="rdp") == pytest.approx(rdp, abs=2e-6)
    coarse = epsilon(spends, DELTA)
    assert pld - 1e-5 <= coarse <= pld + 2e-3  # an upper bound that costs little


def test_the_fine_grid_gives_the_known_answer_itself() -> None:
    assert epsilon([Spend(1.0, 0.01, 1000)], DELTA, grid=1e-4) == pytest.approx(1.828244, abs=1e-6)


def test_parts_add_up_to_the_whole() -> None:
    parts = [Spend(1.5, 0.04, 10), Spend(2.0, 1.0, 1), Spend(1.5, 0.04, 30)]
    assert merged(parts) == [Spend(1.5, 0.04, 40), Spend(2.0, 1.0, 1)]
    assert epsilon(parts, DELTA) == epsilon(merged(parts), DELTA)
    assert epsilon([], DELTA) == 0.0
    assert epsilon([Spend(0.0)], DELTA) == math.inf
    assert epsilon(parts, DELTA) > epsilon(parts[:2], DELTA) > epsilon(parts[:1], DELTA)


@pytest.mark.parametrize(("by", "target", "rate"), [("pld", 4.0, 0.05), ("rdp", 1.0, 1.0), ("rdp", 30.0, 1.0)])
def test_noise_fits_its_epsilon_closely(by: str, target: float, rate: float) -> None:
    noise = noise_for(target, DELTA, sampling_rate=rate, steps=200, accountant=by)
    assert epsilon([Spend(noise, rate, 200)], DELTA, accountant=by) <= target
    assert epsilon([Spend(noise * 0.996, rate, 200)], DELTA, accountant=by) > target


def test_an_epsilon_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "LARGEST_NOISE", 2.0)
    with pytest.raises(ConfigError, match="no noise keeps epsilon = 0.1"):
        noise_for(0.1, DELTA, steps=10, accountant="rdp")


def test_a_curve_ends_where_the_whole_does() -> None:
    points = curve([Spend(1.0, 0.1, 3)], [1, 5, 10], DELTA, accountant="rdp")
    assert points == sorted(points)
    assert points[-1] == epsilon([Spend(1.0, 0.1, 30)], DELTA, accountant="rdp")


def test_skellam_bound_by_hand_and_near_the_gaussian_one() -> None:
    # order 2, l1 3, l2 2, variance 10: 2*4/20 + min((3*4 + 18)/400, 9/20) = 0.4 + 0.075
    assert skellam_rdp(2, 3.0, 2.0, 10.0) == pytest.approx(0.475)
    l1, l2 = integer_norms(1.0, 1000.0, 100)
    assert l2 == pytest.approx(1010.0)
    assert l1 == pytest.approx(10100.0)
    discrete = epsilon([Spend(1.0, skellam_norms=(l1, l2))], DELTA)
    smooth = epsilon([Spend(1.0)], DELTA, accountant="rdp")
    assert smooth <= discrete < smooth * 1.05
    both = epsilon([Spend(1.0, skellam_norms=(l1, l2)), Spend(3.0)], DELTA)
    assert both > discrete


def test_skellam_shares_sum_to_the_whole() -> None:
    total, sites = 400.0, 4
    share = share_of_variance(total, least_sites=sites)
    made = sum(skellam(40_000, share) for _ in range(sites))
    assert made.dtype == torch.int64
    assert float(made.double().var()) == pytest.approx(total, rel=0.03)
    assert float(made.double().mean()) == pytest.approx(0.0, abs=0.5)
    chances = skellam(200_000, 0.5).double()
    assert float((chances == 0).double().mean()) == pytest.approx(math.exp(-0.5) * 1.06348, abs=0.005)  # e^-v I_0(v)
    assert rounding_delta(1_000_000, 1e4) < 2e-6
    with pytest.raises(PrivacyError, match="coarser scale"):
        skellam(1, 1e12)
    with pytest.raises(PrivacyError, match="at least one site"):
        share_of_variance(1.0, least_sites=0)


def test_normals_are_normal_and_never_repeat() -> None:
    from scipy.stats import kstest

    made = normals(40_000)
    assert made.dtype == torch.float64
    assert kstest(made.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(made[:10], normals(10))
    assert normals(0).numel() == 0
    assert kstest(uniforms(20_000).numpy(), "uniform").pvalue > 1e-6


def test_all_bits_zero_and_all_bits_one_are_finite() -> None:
    for byte in (b"\x00", b"\xff"):
        made = normals(3, lambda count, byte=byte: byte * count)
        assert torch.isfinite(made).all()
        assert drawn(3, 1.0, lambda count, byte=byte: byte * count) == [0, 1, 2]
