"""Secrets in shares of which a threshold is needed (Shamir 1979, "How to Share a Secret"), and proofs of a false share.

A party commits itself to every share (a hash of it), by holder, and signs that. So a holder that reveals another share
than it was given can be told apart from an owner whose shares do not give its secret. The hash hides the share: each is
drawn from 2^256 values, whatever fewer shares than the threshold say of it. The signature makes an owner's lie
something that can be shown to others: for an honest owner there are no shares that fit what it has signed and give
anything but its secret, so nobody can make up such a proof against it, neither a coordinator nor other parties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from silotune.errors import ProtectionError
from silotune.privacy.masks import commitment
from silotune.privacy.secure_sum.terms import Hex32, Hex64, check_signature, framed
from silotune.settings.base import Positive, Section

OpenShare = Annotated[str, Field(pattern="^([0-9a-f]{2}){33}$")]
Secret: TypeAlias = Literal["seed", "key"]
"""What shares are of: a party's mask seed, or its mask key."""


class SignedSharing(Section):
    """A party's commitments to its seed and to every share.

    Attributes:
        least: Shares that give a secret back.
        commitment: To the mask seed.
        seed: Holder -> commitment to its share of the seed.
        key: Holder -> commitment to its share of the mask key.
        signature: With the key that the party is known by.
    """

    least: Positive
    commitment: Hex32
    seed: dict[str, Hex32]
    key: dict[str, Hex32]
    signature: Hex64

    @model_validator(mode="after")
    def _same_holders(self) -> SignedSharing:
        if self.seed.keys() != self.key.keys():
            raise ValueError("the holders of both secrets must be the same")
        return self

    def content(self, roster: bytes, name: str) -> bytes:
        """What the signature is over: this sum, this party, and all that it says."""
        said = (part for holder in sorted(self.seed) for part in (holder, self.seed[holder], self.key[holder]))
        parts = (name, str(self.least), self.commitment, *said)
        return framed("sharing", roster, *(part.encode() for part in parts))

    def fits(self, roster: bytes, owner: str, holder: str, secret: Secret, share: bytes) -> bool:
        """Whether a share is the one that the owner has committed itself to for this holder."""
        said = (self.seed if secret == "seed" else self.key).get(holder)
        return said == share_commitment(roster, owner, holder, secret, share)


def share_commitment(roster: bytes, owner: str, holder: str, secret: Secret, share: bytes) -> str:
    """What an owner says of one holder's share of one secret in one sum (SHA-256)."""
    parts = (owner.encode(), holder.encode(), secret.encode(), share)
    return hashlib.sha256(framed("share", roster, *parts)).hexdigest()


def sealed_content(roster: bytes, owner: str, holder: str, sealed: bytes, said: tuple[str, str]) -> bytes:
    """What an owner signs of a sealed pair of shares: for whom it is, and the commitments to the two."""
    parts = (owner.encode(), holder.encode(), sealed, *(text.encode() for text in said))
    return framed("sealed", roster, *parts)


def complaint_content(roster: bytes, owner: str, holder: str) -> bytes:
    """What a holder signs when the shares that an owner has signed for it do not open, or do not fit."""
    return framed("complaint", roster, owner.encode(), holder.encode())


class FalseSharing(Section):
    """Proof that a party has lied in its sharing: shares of its seed that fit what it signed, and do not give it.

    Attributes:
        roster: Digest of the keys of the sum in which it lied, in hexadecimal.
        sharing: What it has signed there.
        shares: Holder -> the share that it revealed, as many as ``sharing.least``.
    """

    roster: Hex32
    sharing: SignedSharing
    shares: dict[str, OpenShare]


def check_proof(proof: FalseSharing, owner: str, public: bytes) -> None:
    """Raises ``ProtectionError`` unless the proof shows that this owner has lied in the proof's sum."""
    roster, sharing = bytes.fromhex(proof.roster), proof.sharing
    check_signature(public, sharing.signature, sharing.content(roster, owner), owner)
    shares = {holder: bytes.fromhex(text) for holder, text in proof.shares.items()}
    fitting = all(sharing.fits(roster, owner, holder, "seed", share) for holder, share in shares.items())
    if not fitting or len(shares) < sharing.least or secret_of(shares, sharing, "seed") is not None:
        raise ProtectionError(f"the proof that {owner!r} has lied in its shares does not hold")


def secret_of(shares: Mapping[str, bytes], sharing: SignedSharing, secret: Secret) -> bytes | None:
    """The secret that shares by holder give; None for a seed that is not the one committed to, or shares of none.

    Raises:
        ProtectionError: There are too few shares.
    """
    places = {holder: place for place, holder in enumerate(sorted(sharing.seed), start=1)}
    numbered = {places[holder]: share for holder, share in shares.items()}
    found = join(numbered, sharing.least)
    if found is None or (secret == "seed" and commitment(found) != sharing.commitment):
        return None
    return found


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
