"""What the parties of one secure sum agree on: the terms, the members' keys, and signatures."""

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
from silotune.settings.base import Positive, PositiveNumber, Section

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
        threshold: More than this share of the cohort must go through to the end: in each phase, to give back a secret,
            and to sign the list of inputs.
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

    @property
    def needed(self) -> int:
        """How many of the cohort are needed: more than the threshold's share, at most all."""
        return needed_of(len(self.cohort), self.threshold)

    def scale(self) -> Scale:
        """How integers stand for values."""
        if self.noise is not None:
            return Scale(self.shared_noise(self.noise).length, self.noise.clip_norm, self.max_examples)
        return Scale(levels(self.bits, len(self.cohort)), self.bound, self.max_examples)

    def shared_noise(self, noise: NoiseTerms) -> SharedNoise:
        """The noise that each party adds, and the protection that it gives.

        Raises:
            ProtectionError: As in ``distributed.shared_noise``.
        """
        parties = len(self.cohort)
        return shared_noise(
            noise.multiplier,
            bits=self.bits,
            clients=parties,
            needed=self.needed,
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
    """

    name: str
    sign: Callable[[bytes], bytes]
    public_keys: Mapping[str, bytes]
    least_clients: int
    least_threshold: float


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
