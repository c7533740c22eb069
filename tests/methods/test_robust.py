"""Weightings and robust rules: by hand, against the slow obvious way, and in any order of the clients."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from silotune.errors import FederationError, MessageError
from silotune.methods import aggregate, robust
from silotune.methods.algorithms import method
from silotune.settings.aggregation import AGGREGATIONS, WEIGHTINGS
from silotune.settings.sections import FederationSection
from silotune.structs import ClientUpdate


def updates(*values: list[float], examples: int = 1) -> list[ClientUpdate]:
    return [ClientUpdate(str(place), {"w": torch.tensor(own)}, examples) for place, own in enumerate(values)]


def rule(name: str, **options) -> robust.Rule:
    own = {key: value for key, value in options.items() if key in AGGREGATIONS[name].model_fields}
    return method(FederationSection(aggregation={"type": name, **own})).aggregate


def test_tables_hold_what_the_configuration_allows() -> None:
    assert [each.type for each in robust.AGGREGATIONS] == list(AGGREGATIONS)
    assert [each.type for each in aggregate.WEIGHTINGS] == list(WEIGHTINGS)


# --- weightings ------------------------------------------------------------------------------------------------------


def test_weightings_by_hand() -> None:
    one = ClientUpdate("a", {}, 200, loss=3.0)
    for name, options, expected in (
        ("examples", {}, 200),
        ("uniform", {}, 1),
        ("q-ffl", {"fairness_q": 2.0}, 1800),
        ("q-ffl", {"fairness_q": 0.0}, 200),
        ("capped", {"cap": 50}, 50),
        ("capped", {"cap": 500}, 200),
    ):
        assert method(FederationSection(weighting={"type": name, **options})).weigh(one) == expected
    harder = [ClientUpdate("a", {"w": torch.zeros(1)}, 10, loss=1.0), ClientUpdate("b", {"w": torch.ones(1)}, 10, 3.0)]
    fair = method(FederationSection(weighting={"type": "q-ffl", "fairness_q": 1.0})).aggregate(harder)
    assert fair["w"].item() == pytest.approx(0.75)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(WEIGHTINGS)),
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 20)), min_size=1, max_size=6),
)
def test_weights_sum_to_one(name: str, clients: list[tuple[int, float]]) -> None:
    ones = [ClientUpdate(str(place), {"w": torch.ones(3)}, n, loss) for place, (n, loss) in enumerate(clients)]
    made = method(FederationSection(weighting={"type": name, **({"cap": 100} if name == "capped" else {})})).aggregate(
        ones
    )
    torch.testing.assert_close(made["w"], torch.ones(3), rtol=1e-6, atol=0)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_median_by_hand() -> None:
    assert rule("median")(updates([1.0, 9.0], [5.0, 1.0], [2.0, 2.0]))["w"].tolist() == [2.0, 2.0]
    assert rule("median")(updates([1.0], [2.0], [4.0], [100.0]))["w"].tolist() == [3.0]
    assert rule("median")(updates([1.0], [7.0]))["w"].tolist() == [4.0]


def test_trimmed_mean_by_hand() -> None:
    five = updates([0.0], [1.0], [2.0], [6.0], [1000.0])
    assert rule("trimmed-mean", trim=0.2)(five)["w"].tolist() == [3.0]
    assert rule("trimmed-mean", trim=0.21)(five)["w"].tolist() == [2.0], "two are more than a fifth of five"
    assert rule("trimmed-mean", trim=0.49)(five[:1])["w"].tolist() == [0.0], "one is always left"


def test_norm_bound_by_hand() -> None:
    two = updates([3.0, 4.0], [0.0, 1.0])  # norms 5 and 1
    torch.testing.assert_close(rule("norm-bound", bound=2.5)(two)["w"], torch.tensor([0.75, 1.5]))
    torch.testing.assert_close(rule("norm-bound")(two)["w"], torch.tensor([0.9, 1.7]))  # the median norm is 3
    torch.testing.assert_close(rule("norm-bound", bound=9.0)(two)["w"], torch.tensor([1.5, 2.5]))


def slow_krum(values: np.ndarray, malicious: int) -> np.ndarray:
    """Scores by brute force: the sum of the n - f - 2 smallest squared distances to others."""
    count = len(values)
    scores = []
    for i in range(count):
        distances = sorted(float(((values[i] - values[j]) ** 2).sum()) for j in range(count) if j != i)
        scores.append(sum(distances[: count - malicious - 2]))
    return np.argsort(scores, kind="stable")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2**31))
def test_krum_against_brute_force(malicious: int, more: int, seed: int) -> None:
    count = 2 * malicious + 3 + more
    values = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    made = updates(*values.tolist())
    best = slow_krum(values.astype(np.float64), malicious)
    np.testing.assert_array_equal(rule("krum", malicious=malicious)(made)["w"].numpy(), values[best[0]])
    kept = values[best[: count - malicious]].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(rule("multi-krum", malicious=malicious)(made)["w"].numpy(), kept, atol=1e-6)


def test_krum_needs_enough_updates() -> None:
    with pytest.raises(FederationError, match="at least 5 updates a round, got 4"):
        rule("krum", malicious=1)(updates([1.0], [2.0], [3.0], [4.0]))


def test_geometric_median_by_hand() -> None:
    """Of a triangle whose angles are below 120 degrees it is the Fermat point; of an obtuse one the obtuse corner."""
    height = 3**0.5
    fermat = rule("geometric-median")(updates([-1.0, 0.0], [1.0, 0.0], [0.0, height]))["w"]
    torch.testing.assert_close(fermat, torch.tensor([0.0, height / 3]), atol=1e-5, rtol=0)
    corner = rule("geometric-median")(updates([-1.0, 0.0], [1.0, 0.0], [0.0, 0.1]))["w"]
    torch.testing.assert_close(corner, torch.tensor([0.0, 0.1]), atol=1e-4, rtol=0)


def test_geometric_median_is_not_led_astray_by_the_largest_update_there_may_be() -> None:
    random_numbers = np.random.default_rng(3)
    honest = random_numbers.normal(1e-4, 1e-4, (5, 70_000)).astype(np.float32)
    found = rule("geometric-median")(updates(*honest.tolist(), [9e11] * 70_000))["w"].numpy()
    assert np.linalg.norm(found - honest.mean(0)) < np.linalg.norm(honest[0] - honest.mean(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 7), st.integers(0, 2**31))
def test_geometric_median_against_weiszfeld_on_the_vectors(count: int, seed: int) -> None:
    random_numbers = np.random.default_rng(seed)
    values, weights = random_numbers.normal(size=(count, 4)), random_numbers.integers(1, 9, size=count)
    point = (weights[:, None] * values).sum(0) / weights.sum()
    for _ in range(1000):
        pull = weights / np.maximum(np.linalg.norm(values - point, axis=1), robust.SMOOTHING)
        point = (pull[:, None] * values).sum(0) / pull.sum()
    made = [
        ClientUpdate(str(n), {"w": torch.tensor(own)}, int(k))
        for n, (own, k) in enumerate(zip(values, weights, strict=True))
    ]
    np.testing.assert_allclose(rule("geometric-median")(made)["w"].numpy(), point, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(AGGREGATIONS)),
    st.integers(3, 6),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_order_names_and_shapes(name: str, count: int, shape: list[int], seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    made = [
        ClientUpdate(
            f"c{n}", {"a": torch.randn(shape, generator=noise), "b": torch.randn(2, generator=noise).half()}, n + 1
        )
        for n in range(count)
    ]
    aggregate = rule(name, malicious=0)
    expected = aggregate(iter(made))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in expected.items()} == {
        "a": (torch.Size(shape), torch.float32), "b": (torch.Size([2]), torch.float16),
    }  # fmt: skip
    random.Random(seed).shuffle(made)
    tiny.assert_close(aggregate(iter(made)), expected, 1e-6 if name in ("mean", "norm-bound") else 0.0)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_equal_updates_are_their_aggregate(name: str) -> None:
    value = torch.tensor([1.0, -2.0, 0.25])
    same = [ClientUpdate(str(n), {"w": value.clone()}, n + 1) for n in range(5)]
    torch.testing.assert_close(rule(name)(same)["w"], value)


@pytest.mark.parametrize("name", sorted(set(AGGREGATIONS) - {"krum", "multi-krum"}))
def test_one_client_is_its_own_aggregate_bit_for_bit(name: str) -> None:
    value = torch.randn(20, generator=torch.Generator().manual_seed(3))
    one = [ClientUpdate("a", {"w": value}, 7)]
    tiny.assert_same_bits(rule(name, bound=1e9)(one), {"w": value})


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_faults(name: str) -> None:
    with pytest.raises(FederationError, match="nothing to aggregate"):
        rule(name)([])
    odd = [*updates(*([1.0],) * 4), ClientUpdate("x", {"w": torch.ones(2)}, 1)]
    with pytest.raises(MessageError, match="shape"):
        rule(name)(odd)


@pytest.mark.parametrize("name", sorted(set(AGGREGATIONS) - {"mean"}))
@pytest.mark.parametrize("factor", [-10.0, 100.0, -1e6])
def test_two_of_ten_cannot_lead_it_astray(name: str, factor: float) -> None:
    """Honest updates lie around (1, ..., 1); the aggregate stays nearer to it than a plain mean, and near."""
    noise = torch.Generator().manual_seed(0)
    honest = [1 + 0.3 * torch.randn(50, generator=noise) for _ in range(8)]
    bad = [factor * (1 + 0.3 * torch.randn(50, generator=noise)) for _ in range(2)]
    values = list(itertools.chain(bad, honest))
    made = [ClientUpdate(f"c{n}", {"w": value}, 1) for n, value in enumerate(values)]
    middle = torch.stack(honest).mean(0)
    found = rule(name, malicious=2)(made)["w"]
    assert float((found - middle).norm()) < 0.6 * float(middle.norm())
    assert float((rule("mean")(made)["w"] - middle).norm()) > 1.5 * float(middle.norm())
