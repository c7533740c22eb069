"""Assigns every sentence to one split by its own digest, so that no two splits can ever share one."""

from __future__ import annotations

import zlib
from collections.abc import Callable

SPLIT_BOUNDS: tuple[tuple[str, int], ...] = (("train", 60), ("validation", 70), ("test", 85), ("corpus", 100))
LARGEST_SPLIT = 100_000
ATTEMPTS_PER_EXAMPLE = 400


def split_of(text: str) -> str:
    """The split that owns `text`: 60 % train, 10 % validation, 15 % test, 15 % corpus, whatever the seed."""
    bucket = zlib.crc32(text.encode("utf-8")) % 100
    return next(name for name, bound in SPLIT_BOUNDS if bucket < bound)


def collect(draw: Callable[[], dict], *, key: str, split: str, count: int) -> list[dict]:
    """Calls `draw` until `count` different records of `split` were seen.

    Args:
        draw: makes one random record.
        key: the field whose text decides the split and must be unique.
        split: the split to keep.
        count: how many records to return, at least 0.

    Raises:
        ValueError: if `count` is negative or larger than what the lexicon can make.
    """
    if not 0 <= count <= LARGEST_SPLIT:
        raise ValueError(f"{split}: asked for {count} examples; give a number from 0 to {LARGEST_SPLIT}")
    records: dict[str, dict] = {}
    for _ in range(ATTEMPTS_PER_EXAMPLE * count):
        if len(records) == count:
            break
        record = draw()
        if split_of(record[key]) == split:
            records.setdefault(record[key], record)
    if len(records) < count:
        raise ValueError(
            f"{split}: asked for {count} examples, but only {len(records)} different ones can be made; ask for fewer"
        )
    return list(records.values())
