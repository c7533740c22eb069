"""Assigns every sentence to one split by its own digest, so that no two splits can ever share one."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from functools import partial

SPLIT_BOUNDS: tuple[tuple[str, int], ...] = (("train", 60), ("validation", 70), ("test", 85), ("corpus", 100))
LARGEST_SPLIT = 100_000
ATTEMPTS_PER_EXAMPLE = 400


def split_of(text: str) -> str:
    """The split that owns `text`: 60 % train, 10 % validation, 15 % test, 15 % corpus, whatever the seed."""
    bucket = zlib.crc32(text.encode("utf-8")) % 100
    return next(name for name, bound in SPLIT_BOUNDS if bucket < bound)


def generated(
    world: str, draw: Callable[[random.Random, str], tuple[str, dict]], sizes: Mapping[str, int], *, seed: int
) -> dict[str, list[dict]]:
    """The splits of a world, each record with an `id`.

    Args:
        world: Its name, in the ids and in what the random numbers are drawn from.
        draw: Makes one random record for a split, and before it the text that decides which split owns it.
        sizes: Records by split.
        seed: Another one gives other records.

    Raises:
        ValueError: if a split is asked to be larger than what the lexicon can make.
    """
    made = {}
    for split, count in sizes.items():
        generator = random.Random(f"{world}/{seed}/{split}")
        records = collect(partial(draw, generator, split), split=split, count=count)
        made[split] = [{"id": f"{world}-{seed}-{split}-{index}", **record} for index, record in enumerate(records)]
    return made


def collect(draw: Callable[[], tuple[str, dict]], *, split: str, count: int) -> list[dict]:
    """Calls `draw` until `count` different records of `split` were seen.

    Args:
        draw: makes one random record, and before it the text that decides its split; the text must be unique.
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
        text, record = draw()
        if split_of(text) == split:
            records.setdefault(text, record)
    if len(records) < count:
        raise ValueError(
            f"{split}: asked for {count} examples, but only {len(records)} different ones can be made; ask for fewer"
        )
    return list(records.values())
