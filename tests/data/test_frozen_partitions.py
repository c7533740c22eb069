"""Partitions that runs have been made with: the same seed must give the same clients in every later version."""

from __future__ import annotations

import hashlib

import pytest

from silotune.data.partition import Clients, partition
from silotune.settings.sections import PartitionSection
from silotune.structs import Example

SEEDS = (0, 1, 2, 7, 42, 1234, 2**32 - 1)
FROZEN: dict[tuple[str, int, float, int, int, int], str] = {
    ("iid", 1, 0.3, 7, 3, 1): "98e77a5eed5766c5",
    ("iid", 4, 0.3, 103, 3, 4): "7e0a3bdc43a3b340",
    ("iid", 10, 0.3, 57, 3, 5): "b7a71a8ffd95921e",
    ("iid", 100, 0.3, 1000, 3, 4): "f066c7b6e2e83e3b",
    ("dirichlet", 1, 0.3, 20, 3, 4): "60dc00a864037b83",
    ("dirichlet", 2, 0.3, 60, 2, 4): "0bfe4d6cb62de217",
    ("dirichlet", 4, 0.3, 400, 3, 4): "2eec26b3d258d896",
    ("dirichlet", 4, 0.3, 400, 3, 1): "a2287a158d01dfea",
    ("dirichlet", 4, 1.0, 97, 1, 4): "fc7a1b23ca42ee48",
    ("dirichlet", 5, 0.05, 300, 3, 4): "dc23f8be881f1361",
    ("dirichlet", 8, 0.1, 1000, 20, 10): "7a6bbd225d696d75",
    ("dirichlet", 8, 0.5, 200, 3, 10): "d300f60cc9dae69f",
    ("dirichlet", 10, 1.0, 120, 5, 4): "9af4ec00e08f1d43",
    ("dirichlet", 10, 100.0, 120, 5, 4): "477297680d195922",
    ("dirichlet", 10, 0.3, 120, 5, 4): "beb3d295bdd3d2a5",
    ("dirichlet", 10, 0.01, 40, 1, 4): "6531105fa0f8b465",
    ("dirichlet", 30, 0.3, 3000, 10, 20): "3c29fe57dabe17e0",
    ("dirichlet", 100, 0.5, 2000, 40, 4): "384ea967dc538da3",
    ("dirichlet", 3, 1e-320, 40, 2, 1): "76cdf3fff69394fa",
    ("dirichlet", 3, 1e308, 40, 2, 1): "3007bebd2603def4",
    ("dirichlet", 3, 50.0, 30, 2, 10): "15f2e9a61c8be573",
    ("quantity", 4, 0.3, 103, 3, 4): "6d44ab6aff653462",
    ("quantity", 10, 5.0, 300, 3, 4): "61930434ed500d52",
    ("field", 4, 0.3, 200, 2, 4): "9860f4965be1f528",
    ("field", 4, 0.3, 500, 12, 4): "e17160e929440eb7",
    ("field", 4, 0.3, 90, 9, 8): "cb5e9361933b86cc",
}
"""(scheme, clients, alpha, examples, values, least) -> the start of the SHA-256 of what all seeds give together."""


def examples(count: int, values: int) -> list[Example]:
    """Examples whose field ``value`` has so many values, of which low ones are frequent."""
    drawn = [place * place * 31 % 101 * values // 101 * (place % 3 + 1) // 3 for place in range(count)]
    return [Example((("user", "?"),), "!", fields={"value": f"value {number}"}) for number in drawn]


def made(scheme: str, clients: int, alpha: float, least: int, rows: list[Example], seed: int) -> Clients:
    section = PartitionSection(scheme=scheme, clients=clients, alpha=alpha, min_examples=least, field="value")
    return partition(rows, section, seed=seed)


@pytest.mark.parametrize(("setting", "expected"), FROZEN.items(), ids=str)
def test_a_seed_gives_the_partition_that_it_always_gave(
    setting: tuple[str, int, float, int, int, int], expected: str
) -> None:
    scheme, clients, alpha, count, values, least = setting
    rows = examples(count, values)
    found = [made(scheme, clients, alpha, least, rows, seed) for seed in SEEDS]
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == expected


def test_a_small_partition_index_by_index() -> None:
    assert made("dirichlet", 4, 0.5, 3, examples(24, 3), 5) == {
        "client-0": (12, 15, 16),
        "client-1": (2, 4, 6, 8, 9, 10, 11, 13, 19, 20, 22),
        "client-2": (0, 3, 17, 18),
        "client-3": (1, 5, 7, 14, 21, 23),
    }
