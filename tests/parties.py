"""Parties of a secure sum without messages: sites and coordinator as the protocol's own functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.errors import ProtectionError
from silotune.privacy.ring import RINGS
from silotune.privacy.secure_sum import coordinator, site
from silotune.privacy.secure_sum.sharing import SignedSharing, split
from silotune.privacy.secure_sum.stages import Advertised, Sealed, Shared, Stage
from silotune.privacy.secure_sum.terms import Member, SignedKeys, Terms


def members(count: int, *, least_clients: int = 2) -> dict[str, Member]:
    private = {f"site-{number:03}": Ed25519PrivateKey.generate() for number in range(count)}
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    return {name: Member(name, key.sign, public, least_clients, 0.6) for name, key in private.items()}


def terms(names: Sequence[str], **changes) -> Terms:
    values = {
        "session": os.urandom(16).hex(), "round_number": 1, "cohort": tuple(sorted(names)), "threshold": 2 / 3,
        "bits": 32, "bound": 1.0, "max_examples": 100, "size": 5,
        "work": "0" * 64,
    }  # fmt: skip
    return Terms(**{**values, **changes})


@dataclass
class Sum:
    """A sum that goes on: each method is one phase, in which the named sites drop out."""

    members: Mapping[str, Member]
    terms: Terms
    inputs: Mapping[str, np.ndarray]
    stages: dict[str, Stage] = field(default_factory=dict)
    keys: dict[str, SignedKeys] = field(default_factory=dict)
    sealed: dict[str, dict[str, Sealed]] = field(default_factory=dict)
    sharings: dict[str, SignedSharing] = field(default_factory=dict)
    complaints: dict[str, dict[str, str]] = field(default_factory=dict)
    masked: dict[str, np.ndarray] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    revealed: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()

    def advertise(self, *gone: str) -> None:
        for name, member in self.members.items():
            if name not in gone:
                self.stages[name], self.keys[name] = site.advertise(member, self.terms, os.urandom)

    def share(self, *gone: str) -> None:
        for name in [name for name in self.keys if name not in gone]:
            made = site.share(self.members[name], self.stages[name], self.keys, os.urandom)
            self.stages[name], self.sealed[name], self.sharings[name] = made

    def accept(self, *gone: str) -> None:
        routed = coordinator.routed(self.sealed)
        for name in [name for name in self.sealed if name not in gone]:
            made = site.accept(self.members[name], self.stages[name], tuple(self.sealed), routed[name])
            self.stages[name], self.complaints[name] = made

    @property
    def parties(self) -> coordinator.Circle:
        return coordinator.circle(self.terms, self.keys)

    @property
    def agreed(self) -> coordinator.Agreed:
        return coordinator.after_complaints(self.parties, self.complaints)

    def mask(self, *gone: str) -> None:
        arrived = self.agreed.arrived
        if len(arrived) < (needed := self.terms.needed):
            raise ProtectionError(f"{len(arrived)} are left, {needed} are needed")
        for name in [name for name in arrived if name not in gone]:
            self.stages[name] = site.confirm(self.members[name], self.stages[name], arrived)
            self.masked[name] = self.inputs[name].astype(RINGS[self.terms.bits])
            site.mask(self.members[name], self.stages[name], [self.masked[name]])

    def agree(self, *gone: str) -> None:
        for name in [name for name in self.masked if name not in gone]:
            made = site.agree(self.members[name], self.stages[name], tuple(self.masked))
            self.stages[name], self.signatures[name] = made

    def reveal(self, *gone: str) -> None:
        for name in [name for name in self.signatures if name not in gone]:
            self.revealed[name] = site.reveal(self.members[name], self.stages[name], self.signatures)

    def open(self) -> np.ndarray:
        total = sum(self.masked.values(), start=np.zeros(self.terms.size, RINGS[self.terms.bits]))
        alive = tuple(self.masked)
        expected = coordinator.to_reveal(self.agreed, alive, holders=tuple(self.revealed))
        fitting, self.wrong = coordinator.fitting(self.parties, self.sharings, self.revealed, expected=expected)
        coordinator.unmask(
            [total], self.parties, self.sharings, arrived=self.agreed.arrived, survivors=alive, revealed=fitting
        )
        return total

    def run(self, dropouts: Mapping[str, Sequence[str]] | None = None) -> np.ndarray:
        for phase in PHASES:
            getattr(self, phase)(*(dropouts or {}).get(phase, ()))
        return self.open()


def resealed(
    member: Member, stage: Shared, pairs: Mapping[str, tuple[bytes, bytes]]
) -> tuple[Shared, dict[str, Sealed], SignedSharing]:
    """As ``site.share`` of a site that gives these shares, commits itself to them and signs for them."""
    made = replace(stage, given=pairs)
    sharing = site._committed(member, made)
    peers = [peer for peer in stage.keys if peer != member.name]
    return made, {peer: site._sealed(member, made, peer, sharing) for peer in peers}, sharing


def false_shares(
    member: Member, stage: Advertised, keys: Mapping[str, SignedKeys], secret: str
) -> tuple[Shared, dict[str, Sealed], SignedSharing]:
    """As ``site.share``, of a site that gives shares of something else, and commits itself to just these."""
    shared, _, sharing = site.share(member, stage, keys, os.urandom)
    wrong = split(os.urandom(32), sharing.least, len(shared.given), os.urandom)
    pairs = {
        holder: (false, pair[1]) if secret == "seed" else (pair[0], false)
        for false, (holder, pair) in zip(wrong, sorted(shared.given.items()), strict=True)
    }
    return resealed(member, shared, pairs)


def spoilt(member: Member, stage: Shared, one: Sealed, holder: str) -> Sealed:
    """A sealed pair that does not open, signed by its owner all the same."""
    made = replace(one, text=os.urandom(len(one.text)))
    return replace(made, signature=member.sign(made.content(stage.roster, member.name, holder)).hex())


PHASES = ("advertise", "share", "accept", "mask", "agree", "reveal")


def begin(count: int, *, seed: int = 0, **changes) -> Sum:
    """A sum of ``count`` sites with random inputs."""
    people = members(count)
    made = terms(tuple(people), **changes)
    drawn = np.random.default_rng(seed)
    return Sum(people, made, {name: drawn.integers(0, 1 << 12, made.size) for name in people})
