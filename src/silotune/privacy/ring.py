"""Real vectors as integers modulo a power of two: quantised with head-room, and read back from their sum.

Each client sends q = rounded(levels * w * x / bound) with its weight w = num_examples / max_examples in (0, 1] and x in
[-bound, bound], so |q| <= levels. ``levels`` is chosen such that clients * levels <= 2**(bits - 1) - 1: no
sum of any of the clients wraps, so the sum modulo 2**bits, read as a signed number, is the sum of the integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from silotune.errors import ProtectionError

Integers: TypeAlias = "np.ndarray[Any, Any]"
RINGS: Mapping[int, str] = {16: "<u2", 32: "<u4", 64: "<u8"}
"""Bits of a ring -> numpy's unsigned type, whose arithmetic is modulo 2**bits."""

FINEST = 1 << 52
"""Most levels: up to here float64 holds every integer and a fraction to round by."""
_CHUNK = 1 << 18


def levels(bits: int, clients: int) -> int:
    """The largest integer that a client may send, so that the sum over all clients cannot wrap.

    Args:
        bits: Of the ring.
        clients: At most so many are added up.

    Raises:
        ProtectionError: There is no room for a single level.
    """
    found = min(((1 << (bits - 1)) - 1) // clients, FINEST)
    if found < 1:
        raise ProtectionError(f"{clients} clients do not fit a ring of {bits} bits: take more ring_bits")
    return found


@dataclass(frozen=True)
class Scale:
    """How real values stand for integers; all clients of a sum use the same one.

    Attributes:
        levels: Largest magnitude of a client's integer.
        bound: Largest magnitude of a value; what lies beyond is cut off and counted.
        max_examples: Number of examples that weighs 1.
    """

    levels: int
    bound: float
    max_examples: int

    def factor(self, num_examples: int) -> float:
        """Integers a unit of value, for a client with so many examples.

        Raises:
            ProtectionError: They are more than ``max_examples``.
        """
        if num_examples > self.max_examples:
            raise ProtectionError(
                f"a client holds more examples than privacy.protection.max_examples = {self.max_examples}, the largest "
                "weight that fits the sum: raise it, with ring_bits when updates get too coarse"
            )
        return self.levels * num_examples / (self.max_examples * self.bound)

    def largest_sum(self, clients: int, num_examples: int) -> float:
        """The largest magnitude that the integers of so many clients can add up to.

        Each client's is at most its weight times the levels, rounded up.

        Args:
            clients: In the sum.
            num_examples: Of all of them.
        """
        return self.levels * num_examples / self.max_examples + clients

    def error_bound(self, clients: int, num_examples: int) -> float:
        """The largest difference of a value of the mean from the unrounded weighted mean, nothing being cut off.

        Each client's rounding is off by less than one integer; the reading back adds float32's own rounding.
        """
        return clients / self.factor(1) / num_examples


def quantise(
    values: np.ndarray[Any, Any], num_examples: int, scale: Scale, *, bits: int, generator: np.random.Generator
) -> tuple[Integers, int]:
    """A client's values as integers of the ring, stochastically rounded (unbiased).

    Args:
        values: float32 [size].
        num_examples: The client's weight.
        scale: Shared by all clients.
        bits: Of the ring.
        generator: For the rounding; it may be reproducible, since it hides nothing.

    Returns:
        Integers of the ring [size], and how many values were beyond ``scale.bound``.

    Raises:
        ProtectionError: The weight is too large.
    """
    factor = scale.factor(num_examples)
    made = np.empty(values.size, RINGS[bits])
    clipped = 0
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK].astype(np.float64)
        clipped += int((np.abs(part) > scale.bound).sum())
        np.clip(part, -scale.bound, scale.bound, out=part)
        part *= factor
        part += generator.random(part.size)
        made[start : start + _CHUNK] = np.floor(part, out=part).astype(np.int64).astype(made.dtype)
    return made, clipped


def mean(total: Integers, num_examples: int, scale: Scale) -> np.ndarray[Any, Any]:
    """The weighted mean that a sum of integers stands for, float32 [size].

    Args:
        total: Sum of the clients' integers in the ring.
        num_examples: Of all clients in the sum.
        scale: As the clients used it.
    """
    return (signed(total) / (scale.factor(1) * num_examples)).astype(np.float32)


def largest_of(total: Integers) -> float:
    """The largest magnitude in a sum of integers of the ring."""
    return float(np.abs(signed(total).astype(np.float64)).max(initial=0.0))


def signed(total: Integers) -> Integers:
    """Integers of the ring as signed numbers around zero."""
    return total.view(total.dtype.str.replace("u", "i"))
