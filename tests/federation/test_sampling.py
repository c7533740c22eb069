from __future__ import annotations

from collections import Counter

import pytest

from silotune.errors import FederationError
from silotune.federation.coordinator.decisions import sample_clients

CLIENTS = tuple(f"c{number}" for number in range(10))


def test_a_sample_is_of_the_seed_and_the_round() -> None:
    def sample(seed: int, number: int) -> tuple[str, ...]:
        return sample_clients(CLIENTS, 4, seed=seed, round_number=number)

    assert sample(0, 1) == sample(0, 1)
    assert len({sample(0, number) for number in range(8)}) > 4
    assert len({sample(seed, 1) for seed in range(8)}) > 4


def test_a_sample_is_without_replacement_in_the_clients_order_and_uniform() -> None:
    seen: Counter[str] = Counter()
    for number in range(1000):
        sample = sample_clients(CLIENTS, 3, seed=1, round_number=number)
        assert len(set(sample)) == 3
        assert list(sample) == sorted(sample)
        seen.update(sample)
    assert set(seen) == set(CLIENTS)
    assert all(240 < count < 360 for count in seen.values())  # 300 expected, four standard deviations


def test_all_and_too_many() -> None:
    assert sample_clients(CLIENTS, None, seed=0, round_number=1) == CLIENTS
    assert sample_clients(CLIENTS, 10, seed=0, round_number=1) == CLIENTS
    with pytest.raises(FederationError, match="clients_per_round = 11, but there are 10"):
        sample_clients(CLIENTS, 11, seed=0, round_number=1)
