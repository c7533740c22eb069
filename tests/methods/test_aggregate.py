"""FedAvg's arithmetic: by hand, in any order, one update at a time."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import FederationError, MessageError
from silotune.methods.aggregate import weighted_mean
from silotune.structs import ClientUpdate


def update(values: list[float], examples: int, client: str = "c", dtype=torch.float32) -> ClientUpdate:
    return ClientUpdate(client, {"w": torch.tensor(values, dtype=dtype)}, examples)


def test_by_hand() -> None:
    """The clients of KNOWN_ANSWERS round 1, as deltas from x0 = [1, -2, .5]: (1 * .1 + 3 * -.1) / 4 = -.05."""
    mean = weighted_mean([update([0.1, -0.2, 0.0], 1), update([-0.1, 0.2, 0.2], 3)])
    torch.testing.assert_close(mean["w"], torch.tensor([-0.05, 0.1, 0.15]))


def test_one_client_is_its_own_mean_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        own = ClientUpdate("c", {"w": torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)}, 7)
        mean = weighted_mean([own])
        assert mean["w"].dtype == dtype
        if dtype != torch.float64:  # (7 x) / 7 may round in the accumulator's own precision
            assert torch.equal(mean["w"], own.delta["w"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 10_000)),
        min_size=1,
        max_size=8,
    ),
    st.randoms(),
)
def test_order_does_not_matter(clients: list, shuffler: random.Random) -> None:
    updates = [update(values, examples) for values, examples in clients]
    expected = weighted_mean(updates)["w"]
    slow = sum(torch.tensor(v, dtype=torch.float64) * n for v, n in clients) / sum(n for _, n in clients)
    torch.testing.assert_close(expected, slow.float(), rtol=1e-6, atol=1e-6)
    shuffler.shuffle(updates)
    torch.testing.assert_close(weighted_mean(updates)["w"], expected, rtol=1e-7, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3), min_size=1, max_size=8), st.randoms())
def test_order_does_not_matter_to_a_bit_where_sums_are_exact(clients: list, shuffler: random.Random) -> None:
    updates = [update([float(value) for value in values], number + 1) for number, values in enumerate(clients)]
    expected = weighted_mean(updates)["w"]
    shuffler.shuffle(updates)
    assert torch.equal(weighted_mean(updates)["w"], expected)


def test_never_two_updates_in_memory() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def arriving() -> Iterator[ClientUpdate]:
        nonlocal most
        for number in range(20):
            tensor = torch.full((1000,), float(number))
            alive.append(weakref.ref(tensor))
            made = ClientUpdate(str(number), {"w": tensor}, 1)
            del tensor
            most = max(most, sum(ref() is not None for ref in alive))
            yield made
            del made

    assert float(weighted_mean(arriving())["w"][0]) == 9.5
    assert most == 1


def test_inputs_are_left_alone() -> None:
    updates = [update([1.0, 2.0], 1), update([3.0, 4.0], 1)]
    weighted_mean(updates)["w"].zero_()
    assert updates[0].delta["w"].tolist() == [1.0, 2.0]


def test_what_cannot_be_aggregated() -> None:
    with pytest.raises(FederationError, match="nothing to aggregate"):
        weighted_mean([])
    with pytest.raises(FederationError, match="nothing to aggregate"):
        weighted_mean([update([1.0], 0)])
    with pytest.raises(MessageError, match="shape"):
        weighted_mean([update([1.0], 1), update([1.0, 2.0], 1)])
    with pytest.raises(MessageError, match="'v'"):
        weighted_mean([update([1.0], 1), ClientUpdate("d", {"v": torch.ones(1)}, 1)])
