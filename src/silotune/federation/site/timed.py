"""Examples that can be looked at for so long: what bounds the time of a round, whatever its settings say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

from silotune.errors import PolicyError

Item = TypeVar("Item")


class Timed(Sequence[Item], Generic[Item]):
    """A sequence that raises once its time is over; every batch of training and of scoring takes its examples from it.

    Args:
        items: The sequence.
        seconds: From now on.
        clock: Seconds that only grow.
    """

    def __init__(self, items: Sequence[Item], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._items, self._seconds, self._clock = items, seconds, clock
        self._end = clock() + seconds

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        if self._clock() > self._end:
            raise PolicyError("most_seconds", f"the work took longer than {self._seconds:g} s and was broken off")
        return self._items[place]
