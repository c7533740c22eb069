"""What the parties of one secure sum agree on: the terms, the members' keys, who holds whose shares, and signatures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, model_validator

from silotune.errors import ProtectionError
from silotune.privacy.distributed import SharedNoise, shared_noise
from silotune.privacy.ring import Scale, levels
from silotune.settings import Positive, PositiveNumber, Section

CORRUPT_SHARE, CHANCE_TO_OPEN = 0.2, 2.0**-40
DROPPED_SHARE, CHANCE_TO_STICK = 0.1, 2.0**-20
FEW = 32
"""What ``safe_degree`` is safe against; up to ``FEW`` parties everybody is everybody's neighbour."""

Hex32 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]


class NoiseTerms(Section):
    """Noise that every party adds a share of; all sign to it, so that all know that the others add theirs.

    Attributes:
        multiplier: Standard deviation of the noise over the sensitivity, from the fewest parties that open a sum.
        clip_norm: Largest norm of an update.
        colluding: Parties whose shares are not counted.
    """

    multiplier: PositiveNumber
    clip_norm: PositiveNumber
    colluding: Annotated[int, Field(ge=0)]


class Terms(Section):
    """The terms of one sum; every signature covers them.

    Attributes:
        session: Random name of this sum, 16 bytes in hexadecimal.
        round_number: Of the run.
        cohort: Everybody who is asked to take part, sorted.
        threshold: Share of the parties (and of the holders of each secret) that must go through to the end; more.
        degree: Neighbours of each party: with whom it shares masks, and who holds shares of its secrets.
        bits: Of the ring.
        bound: Largest magnitude of a value.
        max_examples: Largest weight; with noise, examples beyond it do not count.
        size: Values to be summed.
        work: SHA-256 of what every party is to do to make its input: model and settings. A coordinator that gave one
            party another model than the rest could make the others' inputs vanish, and read the one from the sum
            (Pasquini et al. 2022).
        noise: Of distributed differential privacy; None for an exact sum.
    """

    session: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    round_number: Positive
    cohort: Annotated[tuple[str, ...], Field(min_length=2)]
    threshold: Annotated[float, Field(gt=0.5, lt=1)]
    degree: Positive
    bits: Literal[16, 32, 64]
    bound: Annotated[float, Field(gt=0)]
    max_examples: Positive
    size: Positive
    work: Hex32
    noise: NoiseTerms | None = None

    @model_validator(mode="after")
    def _cohort_is_sorted(self) -> Terms:
        if list(self.cohort) != sorted(set(self.cohort)):
            raise ValueError("cohort must be sorted, each name once")
        return self

    def needed(self, count: int) -> int:
        """How many of ``count`` parties are needed: more than the threshold's share, at most all."""
        return needed_of(count, self.threshold)

    def scale(self) -> Scale:
        """How values stand for integers."""
        if self.noise is not None:
            return Scale(self.shared_noise(self.noise).length, self.noise.clip_norm, self.max_examples)
        return Scale(levels(self.bits, len(self.cohort)), self.bound, self.max_examples)

    def shared_noise(self, noise: NoiseTerms) -> SharedNoise:
        """What each party adds, and what it is worth.

        Raises:
            ProtectionError: As in ``distributed.shared_noise``.
        """
        parties = len(self.cohort)
        return shared_noise(
            noise.multiplier,
            bits=self.bits,
            clients=parties,
            needed=self.needed(parties),
            colluding=noise.colluding,
            size=self.size,
        )

    def digest(self) -> bytes:
        """SHA-256 over all terms."""
        return hashlib.sha256(self.model_dump_json().encode()).digest()


def needed_of(count: int, threshold: float) -> int:
    """How many of ``count`` parties are more than the threshold's share of them; at most all."""
    return min(count, math.floor(threshold * count + 1e-9) + 1)


class SignedKeys(Section):
    """The two X25519 keys that a party made for one sum, signed with the key it is known by."""

    mask: Hex32
    share: Hex32
    signature: Hex64

    def content(self, terms: Terms, name: str) -> bytes:
        """What the signature is over."""
        return framed("keys", terms.digest(), name.encode(), self.mask.encode(), self.share.encode())


@dataclass(frozen=True)
class Member:
    """A site as the protocol sees it.

    Attributes:
        name: The site's own.
        sign: Signs bytes with the site's Ed25519 key; raw signature.
        public_keys: Raw Ed25519 key of every member of the federation by name, from the kit, never from a message.
        least_clients: The site's own rule: it takes part in no sum of fewer.
        least_threshold: Share of the parties that the site insists on, as in ``Terms``.
        least_degree: Neighbours that the site insists on, from the number of parties and the threshold.
    """

    name: str
    sign: Callable[[bytes], bytes]
    public_keys: Mapping[str, bytes]
    least_clients: int
    least_threshold: float
    least_degree: Callable[[int, float], int]


def framed(purpose: str, *parts: bytes) -> bytes:
    """The parts with their lengths, so that no two lists of parts give the same bytes."""
    return b"".join(
        len(part).to_bytes(4, "big") + part for part in (f"silotune-v1:secure-sum:{purpose}".encode(), *parts)
    )


def roster_digest(terms: Terms, keys: Mapping[str, SignedKeys]) -> bytes:
    """SHA-256 over the terms and everybody's keys: all who saw the same list have the same digest."""
    parts = [part.encode() for name in sorted(keys) for part in (name, keys[name].mask, keys[name].share)]
    return hashlib.sha256(framed("roster", terms.digest(), *parts)).digest()


def survivors_content(roster: bytes, arrived: Sequence[str], survivors: Sequence[str]) -> bytes:
    """What each party signs in the consistency check: with whom it shares masks, and whose input is in the sum."""
    lists = (",".join(name.encode().hex() for name in sorted(names)).encode() for names in (arrived, survivors))
    return framed("survivors", roster, *lists)


def is_signed(public: bytes, signature: str, content: bytes) -> bool:
    """Whether the signature over the content is the one of this raw Ed25519 key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), content)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_signature(public: bytes, signature: str, content: bytes, name: str) -> None:
    """Raises ``ProtectionError`` unless the signature is the member's."""
    if not is_signed(public, signature, content):
        raise ProtectionError(f"what the coordinator relays as {name!r} is not signed by {name!r}")


def holders(name: str, names: Sequence[str], roster: bytes, degree: int) -> tuple[str, ...]:
    """Who holds shares of a party's secrets: itself and its neighbours, sorted.

    The neighbours are the nearest on a ring (Bell et al. 2020, Harary graph), whose order is drawn from the digest of
    everybody's keys, so that the coordinator cannot put its friends around somebody.
    """
    if degree >= len(names) - 1:
        return tuple(sorted(names))
    ring = ring_order(names, roster)
    place, half = ring.index(name), degree // 2
    return tuple(sorted(ring[(place + step) % len(ring)] for step in range(-half, half + 1)))


def ring_order(names: Sequence[str], roster: bytes) -> list[str]:
    """The parties in the order drawn from the digest."""
    return sorted(names, key=lambda other: hashlib.sha256(framed("ring", roster, other.encode())).digest())


def all_holders(names: Sequence[str], roster: bytes, degree: int) -> dict[str, tuple[str, ...]]:
    """``holders`` of everybody."""
    if degree >= len(names) - 1:
        everybody = tuple(sorted(names))
        return dict.fromkeys(names, everybody)
    ring, half = ring_order(names, roster), degree // 2
    return {
        name: tuple(sorted(ring[(place + step) % len(ring)] for step in range(-half, half + 1)))
        for place, name in enumerate(ring)
    }


def degree_of(parties: int, threshold: float) -> int:
    """The neighbours of each party in a sum over so many: those that are safe, and one at least."""
    return max(1, safe_degree(parties, threshold))


def safe_degree(parties: int, threshold: float) -> int:
    """The fewest neighbours that are safe, rounded to even; all others, where there are few parties.

    Two chances, each a union bound over a hypergeometric tail as in Bell et al. 2020 (section 3): that the holders of
    anybody's secrets contain a threshold of the corrupt is below 2**-40 when a fifth of the parties works together with
    the coordinator; that too few of somebody's holders are left is below 2**-20 when a tenth of the parties drops out.

    Args:
        parties: In the sum.
        threshold: As in ``Terms``.
    """
    if parties <= FEW:
        return parties - 1
    corrupt, dropped = math.floor(CORRUPT_SHARE * parties), math.ceil(DROPPED_SHARE * parties)
    for degree in range(2, parties - 1, 2):
        needed = math.floor(threshold * (degree + 1) + 1e-9) + 1
        opened = parties * _tail(parties - 1, corrupt, degree, needed)
        stuck = parties * _tail(parties, dropped, degree + 1, degree + 2 - needed)
        if opened < CHANCE_TO_OPEN and stuck < CHANCE_TO_STICK:
            return degree
    return parties - 1


def _tail(total: int, marked: int, drawn: int, least: int) -> float:
    """The chance that ``least`` or more of the drawn are marked."""
    ways = sum(
        math.comb(marked, found) * math.comb(total - marked, drawn - found)
        for found in range(max(least, 0), min(marked, drawn) + 1)
    )
    return ways / math.comb(total, drawn)
