"""How a process's threads are used for a base, and that torch is left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tiny
from silotune.models.threads import (
    LARGEST_ON_ONE_THREAD,
    LARGEST_SIDE_BY_SIDE,
    Threads,
    operation_threads,
    threads_for,
    threads_of,
)

NANO, STORIES, SMOLLM2 = 1_180_288, 260_032, 134_515_008


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("num_values", "available", "an_operation", "side_by_side"),
    [
        (NANO, 1, 1, 1),
        (NANO, 2, 1, 2),
        (NANO, 64, 1, 64),
        (STORIES, 2, 1, 2),
        (LARGEST_ON_ONE_THREAD, 2, 1, 2),
        (LARGEST_ON_ONE_THREAD + 1, 2, 2, 2),
        (LARGEST_SIDE_BY_SIDE, 8, 8, 8),
        (LARGEST_SIDE_BY_SIDE + 1, 8, 8, 1),
        (SMOLLM2, 1, 1, 1),
        (SMOLLM2, 2, 2, 1),
    ],
)
def test_threads_follow_from_the_base_and_from_what_there_is(
    num_values: int, available: int, an_operation: int, side_by_side: int
) -> None:
    assert threads_for(num_values, available) == Threads(an_operation, side_by_side)


def test_what_a_run_may_use_is_what_it_asks_for_or_what_torch_takes() -> None:
    model = tiny.adapted()
    assert threads_of(model, None) == Threads(an_operation=1, side_by_side=3)
    assert threads_of(model, 2) == Threads(an_operation=1, side_by_side=2)


def test_torch_takes_as_many_threads_as_before_after_a_block_that_fails() -> None:
    with operation_threads(2):
        assert torch.get_num_threads() == 2
    with pytest.raises(MemoryError), operation_threads(1):
        assert torch.get_num_threads() == 1
        raise MemoryError
    assert torch.get_num_threads() == 3
