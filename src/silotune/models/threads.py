"""How many CPU threads one operation on a base takes, and how many clients train side by side for it.

An operation that is spread over threads ends when the last of them has done its share. On a small base a share takes
microseconds, so that the waiting costs what the spreading gains, and on a machine with other work each wait lasts
until the system gives the other thread a core again. The last bits of sums depend on how many threads make them:
the choice therefore follows from the base and from the threads that a run may use, never from how busy the machine is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from silotune.models.adapters import Adapted

LARGEST_ON_ONE_THREAD: Final = 2_000_000
"""Values of a base up to which an operation takes one thread (figures: ``benchmarks/README.md``)."""
LARGEST_SIDE_BY_SIDE: Final = 100_000_000
"""Values of a base up to which clients train side by side unless told otherwise: above it one operation keeps all
cores busy, and every further client at work costs the memory of its activations."""


@dataclass(frozen=True)
class Threads:
    """How a process's CPU threads are used.

    Attributes:
        an_operation: Threads of one operation, while nothing else is at work in the process.
        side_by_side: Clients that train at one time, if nothing forbids it; they divide the threads among themselves.
    """

    an_operation: int
    side_by_side: int


def threads_for(num_values: int, available: int) -> Threads:
    """How the threads that a process may use are used for a base of so many values."""
    return Threads(
        an_operation=1 if num_values <= LARGEST_ON_ONE_THREAD else available,
        side_by_side=available if num_values <= LARGEST_SIDE_BY_SIDE else 1,
    )


def threads_of(adapted: Adapted, asked: int | None) -> Threads:
    """The same for a resident model, with as many threads as are asked for; all that torch takes for None."""
    return threads_for(adapted.num_base_parameters, asked or torch.get_num_threads())


@contextmanager
def operation_threads(count: int) -> Iterator[None]:
    """An operation takes so many threads in the block, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
