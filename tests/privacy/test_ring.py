"""Rings and masks: room for every sum, unbiased rounding, streams as the standard says; Shamir's shares."""

from __future__ import annotations

import os
from itertools import combinations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import ProtectionError
from silotune.privacy import masks
from silotune.privacy.figures import FIGURES, Limits, from_integers, to_integers
from silotune.privacy.masks import (
    SEGMENT_BYTES,
    Keystream,
    add_streams,
    agreed,
    counter_mode,
    counter_mode_of_gcm,
    public_half,
)
from silotune.privacy.ring import RINGS, Scale, largest_of, levels, mean, quantise, signed
from silotune.privacy.secure_sum.sharing import PRIME, join, split


@settings(max_examples=25)
@given(bits=st.sampled_from(list(RINGS)), clients=st.integers(1, 1000))
def test_no_sum_of_any_clients_wraps(bits: int, clients: int) -> None:
    most = levels(bits, clients)
    assert clients * most <= 2 ** (bits - 1) - 1
    ends = np.array([most, -most], np.int64).astype(RINGS[bits])
    total = np.zeros(2, RINGS[bits])
    for _ in range(min(clients, 50)):
        total += ends
    assert signed(total).tolist() == [most * min(clients, 50), -most * min(clients, 50)]


def test_levels_by_hand() -> None:
    assert levels(16, 10) == 3276 and levels(32, 4) == 536_870_911 and levels(64, 3) == 1 << 52
    with pytest.raises(ProtectionError, match="40000 clients do not fit a ring of 16 bits"):
        levels(16, 40_000)


def test_quantise_by_hand() -> None:
    scale = Scale(levels=1000, bound=2.0, max_examples=10)
    made, clipped = quantise(
        np.array([2.0, -2.0, 0.0, 5.0, -0.4], np.float32), 5, scale, bits=16, generator=np.random.default_rng(0)
    )
    assert signed(made)[:4].tolist() == [500, -500, 0, 500] and clipped == 1
    assert signed(made)[4] in (-101, -100, -99)
    assert mean(made, 5, scale)[0] == 2.0
    with pytest.raises(ProtectionError, match="more examples than privacy.protection.max_examples = 10"):
        scale.factor(11)


def test_rounding_is_unbiased() -> None:
    scale = Scale(levels=10, bound=1.0, max_examples=1)
    values = np.full(40_000, 0.123, np.float32)
    made, _ = quantise(values, 1, scale, bits=32, generator=np.random.default_rng(1))
    assert set(signed(made)) == {1, 2}
    assert float(signed(made).mean()) == pytest.approx(1.23, abs=4 * 0.42 / 200)  # 4 standard errors


@settings(max_examples=20)
@given(
    weights=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    bits=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 99),
)
def test_mean_is_the_weighted_mean_within_the_bound(weights: list[int], bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scale = Scale(levels(bits, len(weights)), 0.5, 100)
    updates = [generator.uniform(-0.5, 0.5, 20).astype(np.float32) for _ in weights]
    total = np.zeros(20, RINGS[bits])
    for update, weight in zip(updates, weights, strict=True):
        total += quantise(update, weight, scale, bits=bits, generator=generator)[0]
    expected = np.average(np.stack(updates).astype(np.float64), axis=0, weights=weights)
    bound = scale.error_bound(len(weights), sum(weights)) + 2**-24
    assert np.abs(mean(total, sum(weights), scale) - expected).max() <= bound


def _counter_mode(seed: bytes, count: int) -> bytes:
    """The keystream the obvious way: each segment counts from block 2 behind its number."""
    drawn = b""
    for number in range(-(-count // SEGMENT_BYTES)):
        first = number.to_bytes(12, "big") + (2).to_bytes(4, "big")
        drawn += Cipher(algorithms.AES(seed), modes.CTR(first)).encryptor().update(bytes(SEGMENT_BYTES))
    return drawn[:count]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("keystream", [counter_mode, counter_mode_of_gcm])
def test_streams_are_aes_in_counter_mode_over_all_arrays(
    threads: int, keystream: Keystream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "fastest_keystream", lambda: keystream)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seed, other = bytes(range(32)), bytes(reversed(range(32)))
    arrays = [np.zeros(300_001, "<u4"), np.zeros(7, "<u8"), np.zeros(1_000_000, "<u4")]
    total = sum(array.nbytes for array in arrays)

    def held() -> bytes:
        return b"".join(array.tobytes() for array in arrays)

    add_streams(arrays, [(seed, False)])
    assert held() == _counter_mode(seed, total)
    add_streams(arrays, [(other, False), (seed, True)])
    assert held() == _counter_mode(other, total)
    add_streams(arrays, [(other, True)])
    assert not any(array.any() for array in arrays)


def test_no_arrays_and_no_streams_are_nothing() -> None:
    array = np.arange(5, dtype="<u4")
    add_streams([array], [])
    add_streams([], [(bytes(32), False)])
    add_streams([np.zeros(0, "<u4")], [(bytes(32), False)])
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_both_sides_agree_and_purposes_differ() -> None:
    one, other = os.urandom(32), os.urandom(32)
    assert agreed(one, public_half(other), "a") == agreed(other, public_half(one), "a")
    assert agreed(one, public_half(other), "a") != agreed(one, public_half(other), "b")
    with pytest.raises(ProtectionError, match="public key is not valid"):
        agreed(one, bytes(32), "a")


def test_any_threshold_of_shares_gives_the_secret() -> None:
    secret = b"\xff" * 32
    shares = dict(enumerate(split(secret, 3, 5, os.urandom), start=1))
    for places in combinations(shares, 3):
        assert join({place: shares[place] for place in places}, 3) == secret
    with pytest.raises(ProtectionError, match="2 shares of a secret, 3 are needed"):
        join({1: shares[1], 2: shares[2]}, 3)


def test_shares_by_hand() -> None:
    """5 + 7 x + 2 x^2 at 1, 2, 3; fewer shares fit every secret."""
    made = split((5).to_bytes(32, "big"), 3, 3, _fixed())
    assert [int.from_bytes(share, "big") for share in made] == [14, 27, 44]
    assert pow(3, PRIME - 1, PRIME) == 1


def _fixed():
    drawn = iter([7, 2])
    return lambda count: next(drawn).to_bytes(count, "big")


REPORT = {
    "num_examples": 3, "loss": 0.5, "steps": 2, "tokens": 90, "seconds": 1.5, "core_seconds": 0.25, "joules": 2.0,
    "energy_source": "measured",
}  # fmt: skip


def test_figures_are_summed() -> None:
    other = {**REPORT, "num_examples": 1, "loss": 2.5, "energy_source": "estimated"}
    total = to_integers(REPORT, clipped=4, clients=2) + to_integers(other, clipped=0, clients=2)
    assert from_integers(total, limits(2)) == {
        "num_examples": 4, "weight": 4, "loss": 1.0, "steps": 4, "tokens": 180, "seconds": 3.0, "core_seconds": 0.5,
        "joules": 4.0, "energy_source": "estimated", "clipped": 4,
    }  # fmt: skip
    unknown = to_integers({**REPORT, "joules": None}, clipped=0, clients=2)
    found = from_integers(total + unknown, limits(3))
    assert found["joules"] is None and found["energy_source"] == "unavailable"
    withheld = to_integers({**REPORT, "loss": None, "seconds": None, "joules": None}, clipped=0, clients=2)
    found = from_integers(total + withheld, limits(3))
    assert (found["loss"], found["seconds"], found["num_examples"]) == (1.0, None, 7)
    assert from_integers(withheld, limits(1))["loss"] is None
    with pytest.raises(ProtectionError, match="too large"):
        to_integers({**REPORT, "tokens": 1 << 61}, clipped=0, clients=4)
    with pytest.raises(ProtectionError, match="cannot be true: its num_examples is 0, and 2 sites send 2 to 200"):
        from_integers(total - total, limits(2))


def limits(clients: int, *, is_capped: bool = False) -> Limits:
    return Limits(clients, 100, 1000, is_capped=is_capped)


REPORTS = st.fixed_dictionaries(
    {
        "num_examples": st.integers(1, 100),
        "loss": st.none() | st.floats(-1e3, 1e3),
        "steps": st.integers(1, 1 << 20),
        "tokens": st.integers(0, 1 << 30),
        "seconds": st.none() | st.floats(0, 1e6),
        "core_seconds": st.none() | st.floats(0, 1e6),
        "joules": st.none() | st.floats(0, 1e6),
        "energy_source": st.sampled_from(["measured", "estimated", "unavailable"]),
    }
)


@given(st.lists(st.tuples(REPORTS, st.integers(0, 1000)), min_size=1, max_size=5), st.booleans())
def test_whatever_honest_sites_report_can_be_true(reports: list, is_capped: bool) -> None:
    clients, total = len(reports), np.zeros(len(FIGURES), "<u8")
    for report, clipped in reports:
        weight = min(report["num_examples"], 7) if is_capped else None
        total += to_integers(report, clipped=clipped, clients=clients, weight=weight)
    held = Limits(clients, 7 if is_capped else 100, 1000, is_capped=is_capped)
    found = from_integers(total, held)
    assert found["num_examples"] == sum(report["num_examples"] for report, _ in reports)


@given(st.integers(0, (1 << 64) - 1), st.sampled_from(range(len(FIGURES))))
def test_no_figure_of_a_random_mask_passes_for_itself_and_the_others(drawn: int, place: int) -> None:
    """A number as large as a mask's is told by its own limits, but for those that have none upwards."""
    total = to_integers(REPORT, clipped=4, clients=2) + to_integers(REPORT, clipped=0, clients=2)
    unbounded = {"weighted_loss", "steps", "tokens", "seconds", "core_seconds", "joules"}
    name = list(FIGURES)[place]
    total[place] = drawn
    value = drawn - (1 << 64) if drawn >> 63 else drawn
    if name in unbounded and (value > 2 or name == "weighted_loss"):
        from_integers(total, limits(2))
    elif abs(value) > 1 << 16:
        with pytest.raises(ProtectionError, match="cannot be true"):
            from_integers(total, limits(2))


@given(st.integers(1, 5), st.sampled_from([16, 32, 64]), st.integers(1, 50), st.integers(0, 1 << 32))
def test_no_sum_of_honest_updates_is_larger_than_it_can_be(clients: int, bits: int, most: int, seed: int) -> None:
    """Values at the bound and beyond, any weights."""
    scale, generator = Scale(levels(bits, clients), 0.5, most), np.random.default_rng(seed)
    total, weight = np.zeros(40, RINGS[bits]), 0
    for _ in range(clients):
        values = (generator.choice([-1, 1]) * generator.uniform(0.4, 0.7, 40)).astype(np.float32)
        examples = int(generator.integers(1, most + 1))
        total += quantise(values, examples, scale, bits=bits, generator=generator)[0]
        weight += examples
    largest = largest_of(total)
    assert largest <= scale.largest_sum(clients, weight)
    assert largest > 0.75 * scale.largest_sum(clients, weight) - 2 * clients or clients > 1
    bound = scale.bound + scale.error_bound(clients, weight)
    assert np.abs(mean(total, weight, scale)).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_the_largest_magnitude_of_a_ring(bits: int) -> None:
    assert largest_of(np.array([1, (1 << bits) - 3], RINGS[bits])) == 3
    assert largest_of(np.array([1 << (bits - 1)], RINGS[bits])) == 2.0 ** (bits - 1)
    assert largest_of(np.zeros(0, RINGS[bits])) == 0
