"""What a site keeps of a secure sum between two messages: a stage after each phase, and an owner's sealed shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from silotune.privacy.secure_sum.sharing import sealed_content
from silotune.privacy.secure_sum.terms import SignedKeys, Terms, survivors_content


@dataclass(frozen=True)
class Advertised:
    """After phase 1: the terms and this sum's fresh keys; secrets are not shown by ``repr``."""

    terms: Terms
    keys: SignedKeys
    mask_key: bytes = field(repr=False)
    share_key: bytes = field(repr=False)


@dataclass(frozen=True)
class Shared:
    """After phase 2: everybody's keys, and the shares that each of them was given: (of seed, of mask key)."""

    before: Advertised
    keys: Mapping[str, SignedKeys]
    roster: bytes
    seed: bytes = field(repr=False)
    given: Mapping[str, tuple[bytes, bytes]] = field(repr=False)

    @property
    def terms(self) -> Terms:
        """The terms of the sum."""
        return self.before.terms


@dataclass(frozen=True)
class Held:
    """After phase 3: who is said to have sent shares; of each that opened, the shares of seed and mask key."""

    before: Shared
    arrived: tuple[str, ...]
    held: Mapping[str, tuple[bytes, bytes]] = field(repr=False)

    @property
    def terms(self) -> Terms:
        """The terms of the sum."""
        return self.before.terms


@dataclass(frozen=True)
class Masked:
    """After phase 4: with whom masks are shared, and the shares of theirs that this site holds."""

    before: Shared
    arrived: tuple[str, ...]
    held: Mapping[str, tuple[bytes, bytes]] = field(repr=False)

    @property
    def terms(self) -> Terms:
        """The terms of the sum."""
        return self.before.terms


@dataclass(frozen=True)
class Consistent:
    """After phase 5: the one list of survivors that this site has signed."""

    before: Masked
    survivors: tuple[str, ...]

    @property
    def terms(self) -> Terms:
        """The terms of the sum."""
        return self.before.terms

    @property
    def content(self) -> bytes:
        """What is signed."""
        return survivors_content(self.before.before.roster, self.before.arrived, self.survivors)


@dataclass(frozen=True)
class Closed:
    """After phase 6, or after a refusal: nothing more is said about this sum."""


@dataclass(frozen=True)
class Sealed:
    """An owner's two shares for one holder: sealed, their commitments, and its signature over all that."""

    text: bytes
    seed: str
    key: str
    signature: str

    def content(self, roster: bytes, owner: str, holder: str) -> bytes:
        """What the signature is over."""
        return sealed_content(roster, owner, holder, self.text, (self.seed, self.key))


Stage: TypeAlias = "Advertised | Shared | Held | Masked | Consistent | Closed"
