"""Random numbers for privacy: from the operating system's cryptographic generator, never from a run's seed.

Noise that can be guessed protects nobody, and neither does a sample that can be guessed: amplification by sampling
holds only against those who do not know who was drawn. Every function takes the source of its bytes, so that a test
can give one of its own; nothing else may.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TypeAlias

import torch

Entropy: TypeAlias = Callable[[int], bytes]
"""``entropy(count)`` gives that many unpredictable bytes."""
system: Entropy = os.urandom
"""The operating system's generator (ChaCha20 on Linux)."""
_BITS = 52  # with the half between two of them, a double's mantissa: 0 and 1 are never reached
_AT_ONCE = 1 << 19
"""Values that are drawn together: bounds memory."""


def normals(count: int, entropy: Entropy = system) -> torch.Tensor:
    """Independent standard normal values, float64 [count].

    Each is half the sum of four by Box and Muller: the bits of one floating-point draw can give it away when it is
    added to a value (Mironov 2012); those of a sum of four do so at no practical cost to find (Holohan and Braghin
    2021, "Secure random sampling in differential privacy", section 4).
    """
    parts = [_normals(min(_AT_ONCE, count - start), entropy) for start in range(0, count, _AT_ONCE)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _normals(count: int, entropy: Entropy) -> torch.Tensor:
    uniform = (_integers(4 * count, entropy).double() + 0.5) * 2.0**-_BITS  # in (0, 1), neither end
    first, second = uniform.view(2, 2 * count)
    radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * math.pi * second
    made = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
    return made.view(4, count).sum(0) / 2.0


def uniforms(count: int, entropy: Entropy = system) -> torch.Tensor:
    """Independent values in (0, 1), float64 [count]."""
    return (_integers(count, entropy).double() + 0.5) * 2.0**-_BITS


def drawn(count: int, rate: float, entropy: Entropy = system) -> list[int]:
    """A Poisson sample: each index below ``count`` is in it with probability ``rate``, whatever the others do."""
    return torch.nonzero(uniforms(count, entropy) < rate).view(-1).tolist()


def _integers(count: int, entropy: Entropy) -> torch.Tensor:
    """Uniform integers [count]."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    raw = torch.frombuffer(bytearray(entropy(8 * count)), dtype=torch.int64)
    return raw & ((1 << _BITS) - 1)
