"""Epsilon against known answers, noise that fits an epsilon."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import pytest
import torch

from silotune.errors import ConfigError
from silotune.privacy import accountant
from silotune.privacy.accountant import Spend, curve, epsilon, merged, noise_for
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
    assert documented()[noise, rate, steps] == (f"{rdp:.3f}", f"{coarse:.3f}")


def documented() -> dict[tuple[float, float, int], tuple[str, str]]:
    """The table of the document, whose figures are those that the program counts."""
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    return {
        (float(noise), float(rate), int(steps.replace(",", ""))): (rdp, pld) for noise, rate, steps, rdp, pld in rows
    }


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


@pytest.mark.parametrize("noise", [1e-5, 0.01, 0.1, 0.19])
def test_next_to_no_noise_is_counted_at_once_and_never_below_what_more_noise_costs(noise: float) -> None:
    """By RDP: the grid of a PLD would grow with the square of 1 / noise, up to minutes for one request."""
    spend = Spend(noise, 0.1, 3)
    began = time.process_time()
    found = epsilon([spend, Spend(1.0)], 1e-5)
    assert time.process_time() - began < 10
    assert found == epsilon([spend, Spend(1.0)], 1e-5, accountant="rdp") > epsilon([Spend(0.2, 0.1, 3)], 1e-5)


@pytest.mark.parametrize(
    "spend", [Spend(0.2, 0.5, 10**11), Spend(0.3, 0.99, 10**6), Spend(0.2, 1.0, 10**6), Spend(1.0, 0.5, 10**7)]
)
def test_so_many_steps_that_a_grid_would_take_the_memory_are_counted_at_once(spend: Spend) -> None:
    """By RDP, an upper bound as well."""
    began = time.process_time()
    assert epsilon([spend, Spend(2.0)], DELTA) == epsilon([spend, Spend(2.0)], DELTA, accountant="rdp")
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "spend",
    [Spend(1.0, 0.01, 1000), Spend(1.1, 0.1, 100), Spend(0.5, 0.1, 1000), Spend(1.0, 0.01, 10**5), Spend(4.0, 1.0, 100),
     Spend(0.2, 0.01, 3), Spend(2.0, 0.5, 1)],
)  # fmt: skip
def test_the_size_of_a_grid_is_never_larger_than_it_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, spend: Spend
) -> None:
    from dp_accounting.pld import pld_pmf

    sizes, dense = [], pld_pmf.DensePLDPmf.__init__

    def watched(
        it: pld_pmf.DensePLDPmf, interval: float, lower: int, probabilities: list[float], *rest: object
    ) -> None:
        sizes.append(len(probabilities))
        dense(it, interval, lower, probabilities, *rest)

    monkeypatch.setattr(pld_pmf.DensePLDPmf, "__init__", watched)
    epsilon([spend], DELTA)
    assert sizes and max(sizes) <= accountant._points(spend, accountant.GRID) <= accountant.MOST_POINTS


def test_an_epsilon_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "LARGEST_NOISE", 2.0)
    with pytest.raises(ConfigError, match="no noise keeps epsilon = 0.1"):
        noise_for(0.1, DELTA, steps=10, accountant="rdp")


def test_a_curve_ends_where_the_whole_does() -> None:
    points = curve([Spend(1.0, 0.1, 3)], [1, 5, 10], DELTA, accountant="rdp")
    assert points == sorted(points)
    assert points[-1] == epsilon([Spend(1.0, 0.1, 30)], DELTA, accountant="rdp")


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
