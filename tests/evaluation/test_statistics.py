"""Statistics against numbers computed by hand, and their identities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.evaluation.statistics import (
    bootstrap_interval,
    describe,
    holm,
    paired,
    paired_test,
    pareto_front,
)


def test_mean_deviation_and_interval_by_hand() -> None:
    sample = describe([1.0, 2.0, 6.0])
    assert (sample.count, sample.mean) == (3, 3.0)
    assert sample.deviation == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    # Each of the 27 resamples has probability .037: the least and the greatest mean lie at 2.5 % and 97.5 %.
    assert (sample.low, sample.high) == (1.0, 6.0)
    one = describe([0.5])
    assert (one.mean, one.deviation, one.low, one.high) == (0.5, None, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        describe([])


def test_the_bootstrap_of_two_values_is_their_range() -> None:
    assert bootstrap_interval([0.0, 4.0]) == (0.0, 4.0)  # means 0, 2, 2, 4
    assert bootstrap_interval([0.0, 4.0], level=0.4) == (2.0, 2.0)


def test_the_bootstrap_of_many_values_is_near_the_normal_interval_and_repeats() -> None:
    values = [math.sin(number) for number in range(200)]
    sample = describe(values)
    assert sample.deviation is not None
    half = 1.96 * sample.deviation / math.sqrt(200)
    assert sample.low == pytest.approx(sample.mean - half, abs=0.01)
    assert sample.high == pytest.approx(sample.mean + half, abs=0.01)
    assert describe(values) == sample


def test_the_paired_test_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641; of two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.sample.mean == 2.0 and found.sample.deviation == 1.0
    assert found.p == pytest.approx(1 - 3.4641016 / math.sqrt(14), abs=1e-6)
    half = 4.3026527 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_the_test_and_its_interval_agree_and_exchange_sides() -> None:
    left, right = [0.8, 0.9, 0.7, 0.85], [0.5, 0.7, 0.66, 0.6]
    there, back = paired(left, right), paired(right, left)
    assert there.p == pytest.approx(back.p) and there.low == pytest.approx(-(back.high or 0))
    assert there.low is not None and (there.low > 0) == ((there.p or 0) < 0.05)


def test_differences_without_spread() -> None:
    assert paired_test([0.0, 0.0, 0.0]) == 1.0
    assert paired_test([0.25, 0.25, 0.25]) == 0.0
    assert paired([1.0], [0.0]).p is None
    with pytest.raises(ValueError, match="two differences"):
        paired_test([1.0])
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= 1
    if p_values:
        assert min(holm(p_values)) == pytest.approx(min(1.0, len(p_values) * min(p_values)))


def test_the_front_by_hand() -> None:
    points = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.7), (2.0, 0.6), (1.0, 0.5)]
    assert pareto_front(points) == [True, True, False, False, True]
    assert pareto_front([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_whoever_is_off_the_front_is_beaten_by_one_on_it(points: list[tuple[float, float]]) -> None:
    on = [point for point, is_on in zip(points, pareto_front(points), strict=True) if is_on]
    assert on
    for cost, quality in points:
        assert any(a <= cost and b >= quality for a, b in on)
