"""Client-level mechanisms: the mean by hand, sensitivity whatever a client sends, the adaptive bound."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.privacy.client_dp import ClientMechanism, private_mean, private_update, weight_of, with_bound
from silotune.structs import ClientUpdate
from silotune.tensors import add, norm, subtract

LIKE = {"w": torch.zeros(2), "v": torch.zeros(1)}


def update(name: str, *values: float, examples: int = 1) -> ClientUpdate:
    return ClientUpdate(name, {"w": torch.tensor(values[:2]), "v": torch.tensor(values[2:])}, examples)


def seeded(seed: int = 0):
    return random.Random(seed).randbytes


def test_noise_0_and_no_bound_are_the_plain_mean() -> None:
    mechanism = ClientMechanism(0.0, expected_weight=2.0)
    made, bound = private_mean(iter([update("a", 1, 2, 3), update("b", 3, 2, 1)]), LIKE, mechanism, clip_norm=math.inf)
    assert (made["w"].tolist(), made["v"].tolist(), bound) == ([2.0, 2.0], [2.0], math.inf)
    assert made["w"].dtype == LIKE["w"].dtype


def test_clipped_and_capped_by_hand() -> None:
    # a: norm 5 -> (0.6, 0, 0.8) with weight 1; b: (0.3, 0, 0.4) with weight 5 of 10; over 1.5
    mechanism = ClientMechanism(0.0, expected_weight=1.5, max_examples=10)
    sent = [update("a", 3, 0, 4, examples=900), update("b", 0.3, 0, 0.4, examples=5)]
    made, _ = private_mean(iter(sent), LIKE, mechanism, clip_norm=1.0)
    assert made["w"].tolist() == pytest.approx([0.75 / 1.5, 0.0])
    assert made["v"].tolist() == pytest.approx([1.0 / 1.5])
    assert weight_of(7, None) == 1.0


def test_nobody_or_nonsense_gives_noise_alone() -> None:
    mechanism = ClientMechanism(1.0, expected_weight=1.0)
    made, _ = private_mean(iter([update("a", math.nan, 0, 0)]), LIKE, mechanism, clip_norm=2.0, entropy=seeded())
    nobody, _ = private_mean(iter(()), LIKE, mechanism, clip_norm=2.0, entropy=seeded())
    assert torch.equal(made["w"], nobody["w"])
    assert norm(made) > 0


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 3, st.integers(1, 10**6)), min_size=1, max_size=4),
    st.floats(0.01, 10),
    st.sampled_from([None, 3, 1000]),
)
def test_one_client_moves_the_sum_by_at_most_the_bound(sent, bound: float, cap: int | None) -> None:
    """Sensitivity for the weights used: flwr's noise took equal weights for granted while the mean was weighted."""
    mechanism = ClientMechanism(0.0, expected_weight=1.0, max_examples=cap)
    updates = [update(str(place), *values[:3], examples=values[3]) for place, values in enumerate(sent)]
    with_all, _ = private_mean(iter(updates), LIKE, mechanism, clip_norm=bound)
    without, _ = private_mean(iter(updates[1:]), LIKE, mechanism, clip_norm=bound)
    assert norm(subtract(with_all, without)) <= bound * (1 + 1e-5)


def test_noise_on_the_mean_is_what_the_sensitivity_asks() -> None:
    like = {"w": torch.zeros(20_000)}
    made, _ = private_mean(iter(()), like, ClientMechanism(1.5, expected_weight=4.0), clip_norm=2.0, entropy=seeded())
    assert float(made["w"].std()) == pytest.approx(1.5 * 2.0 / 4.0, rel=0.02)


def test_the_bound_follows_its_quantile() -> None:
    """The norms are 1 to 9: the bound that leaves half of them unclipped lies between 5 and 6 (or just below 5)."""
    mechanism = ClientMechanism(0.0, 9.0, count_deviation=0.0, quantile=0.5, clip_learning_rate=0.2, expected_clients=9)
    bound = 0.1
    for _ in range(60):
        sent = (update(str(size), size, 0, 0) for size in range(1, 10))
        _, bound = private_mean(sent, LIKE, mechanism, clip_norm=bound)
    assert 4.5 < bound < 6.0
    one = ClientMechanism(0.0, 1.0, count_deviation=0.0, quantile=0.5, clip_learning_rate=0.2, expected_clients=1)
    _, after = private_mean(iter([update("a", 5, 0, 0)]), LIKE, one, clip_norm=1.0)
    assert after == pytest.approx(math.exp(0.1))  # 1 * exp(-0.2 * (0 - 0.5))


def test_the_count_is_paid_for_by_the_sum() -> None:
    fixed = ClientMechanism(1.0, 100.0)
    adaptive = with_bound(fixed, 100.0)
    assert adaptive.count_deviation == 5.0  # a twentieth
    assert adaptive.sum_multiplier == pytest.approx((1 - 0.01) ** -0.5)
    total = adaptive.sum_multiplier**-2 + (2 * adaptive.count_deviation) ** -2
    assert total == pytest.approx(fixed.noise_multiplier**-2)


def test_a_local_update_is_clipped_and_noised_for_any_two_of_them() -> None:
    like = {"w": torch.zeros(20_000), "v": torch.full((1,), 100.0)}
    made = private_update(like, clip_norm=1.0, noise_multiplier=1.5, entropy=seeded())
    assert float(made["w"].std()) == pytest.approx(3.0, rel=0.02)  # 2 z S
    assert abs(float(made["v"])) < 20  # clipped from 100 to 1 before the noise
    quiet = private_update(LIKE | {"v": torch.ones(1)}, clip_norm=math.inf, noise_multiplier=0.0)
    assert norm(subtract(add(quiet, LIKE), LIKE | {"v": torch.ones(1)})) == 0
