"""The coordinator's side of a secure sum: what it checks and relays, who has lied, and how the masks come off the sum.

It holds no secret. What it learns is the sum, who dropped out when, whom which site complains of, and sizes and times
of messages. Its checks protect the sites that keep to the protocol from those that do not: whatever it would relay and
an honest site would refuse is found here first, and booked under the name of the site that sent it. They do not protect
anybody from the coordinator: each site makes its own checks again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from silotune.errors import ProtectionError
from silotune.privacy.masks import SEED_BYTES, add_streams, agreed, derived, public_half
from silotune.privacy.ring import Integers
from silotune.privacy.secure_sum.sharing import FalseSharing, Secret, SignedSharing, complaint_content, secret_of
from silotune.privacy.secure_sum.site import pair_seed
from silotune.privacy.secure_sum.stages import Sealed
from silotune.privacy.secure_sum.terms import (
    SignedKeys,
    Terms,
    is_signed,
    roster_digest,
    survivors_content,
)

Revealed = Mapping[str, tuple[Secret, bytes]]
"""What one site revealed: owner of the secret -> (of which secret, share)."""


class FalseSharesError(ProtectionError):
    """Shares that fit what their owner committed itself to, and do not give its secret: the owner has lied.

    Attributes:
        owner: Who made the shares.
        proof: Shows the lie to the sites; None for a mask key, since its owner's input is in no sum that must be
            repeated.
    """

    def __init__(self, owner: str, secret: Secret, proof: FalseSharing | None) -> None:
        super().__init__(f"the shares that {owner!r} made do not give its {secret}: it has lied in its sharing")
        self.owner, self.proof = owner, proof


class FewSharesError(ProtectionError):
    """Too few shares of a secret; ``owner`` is whose it is."""

    def __init__(self, owner: str, found: int, needed: int) -> None:
        super().__init__(f"{found} shares of a secret of {owner!r} are there, {needed} are needed")
        self.owner = owner


@dataclass(frozen=True)
class Circle:
    """The sites that have advertised valid keys: each holds a share of everybody's secrets."""

    terms: Terms
    keys: Mapping[str, SignedKeys]
    roster: bytes


def circle(terms: Terms, keys: Mapping[str, SignedKeys]) -> Circle:
    """The parties with these keys."""
    return Circle(terms, dict(keys), roster_digest(terms, keys))


def fault_of_keys(terms: Terms, name: str, keys: SignedKeys, known: Sequence[bytes]) -> str | None:
    """Why no honest site would go on with these keys; None where each would.

    Args:
        terms: Of the sum.
        name: Whose keys they are said to be.
        keys: The keys.
        known: Raw Ed25519 keys that the site may sign with; empty where the coordinator knows none.
    """
    if not _is_known(known, keys.signature, keys.content(terms, name)):
        return "its keys are not signed by it for this sum"
    try:
        for public in (keys.mask, keys.share):
            agreed(os.urandom(SEED_BYTES), bytes.fromhex(public), "check")
    except ProtectionError:
        return "one of its keys is not valid: nobody can agree on a secret with it"
    return None


def fault_of_sharing(
    parties: Circle, name: str, sealed: Mapping[str, Sealed], sharing: SignedSharing, known: Sequence[bytes]
) -> str | None:
    """Why shares cannot be used, as far as can be told without opening them; None where they may be relayed."""
    if sealed.keys() != parties.keys.keys() - {name} or sharing.seed.keys() != parties.keys.keys():
        return "its shares are not one for each of the others"
    if any((one.seed, one.key) != (sharing.seed[peer], sharing.key[peer]) for peer, one in sealed.items()):
        return "the hashes of its shares for their holders are not those for the coordinator"
    if sharing.least != parties.terms.needed:
        return f"its secrets are said to take {sharing.least} shares, {parties.terms.needed} are agreed on"
    signed = [(sharing.signature, sharing.content(parties.roster, name))]
    signed += [(one.signature, one.content(parties.roster, name, peer)) for peer, one in sealed.items()]
    if not all(_is_known(known, signature, content) for signature, content in signed):
        return "what it says of its shares is not signed by it for this sum"
    return None


def fault_of_complaints(
    parties: Circle, name: str, complaints: Mapping[str, str], known: Sequence[bytes], *, sent: Collection[str]
) -> str | None:
    """Why complaints must not be shown to those they are about; None where they may.

    ``sent`` are the owners whose shares the site was sent.
    """
    if not complaints.keys() <= set(sent):
        return "it complains of shares that it was not sent"
    for owner, signature in complaints.items():
        if not _is_known(known, signature, complaint_content(parties.roster, owner, name)):
            return "its complaint is not signed by it for this sum"
    return None


def fault_of_answers(
    parties: Circle,
    name: str,
    answers: Mapping[str, tuple[bytes, bytes]],
    sharing: SignedSharing,
    asked: Collection[str],
) -> str | None:
    """Why an owner's answer to complaints shows that it has lied; None where it gives the shares that it signed."""
    fits = all(
        sharing.fits(parties.roster, name, holder, "seed", of_seed)
        and sharing.fits(parties.roster, name, holder, "key", of_key)
        for holder, (of_seed, of_key) in answers.items()
    )
    if answers.keys() == set(asked) and fits:
        return None
    return "its answer to a complaint is not the shares that it has signed"


def fault_of_signature(
    parties: Circle,
    signature: str,
    known: Sequence[bytes],
    *,
    arrived: Sequence[str],
    survivors: Sequence[str],
) -> str | None:
    """Why a signature of the consistency check must not be relayed; None where it fits."""
    if _is_known(known, signature, survivors_content(parties.roster, arrived, survivors)):
        return None
    return "its signature is not over the list of inputs that it was asked to sign"


def _is_known(known: Sequence[bytes], signature: str, content: bytes) -> bool:
    return not known or any(is_signed(public, signature, content) for public in known)


def routed(sealed: Mapping[str, Mapping[str, Sealed]]) -> dict[str, dict[str, Sealed]]:
    """Sealed shares by owner and holder as holder and owner, among those who sent any."""
    return {holder: {owner: texts[holder] for owner, texts in sealed.items() if holder in texts} for holder in sealed}


@dataclass(frozen=True)
class Agreed:
    """The outcome of the sites' complaints.

    Attributes:
        arrived: Who goes on; sorted.
        liars: Sites in more disputes than there can be liars to dispute with, so that they lie themselves.
        disputes: (owner, holder that does not hold its shares), of those who go on: one of the two does not keep to the
            protocol; the owner is to answer.
    """

    arrived: tuple[str, ...]
    liars: tuple[str, ...]
    disputes: tuple[tuple[str, str], ...]

    def against(self, owner: str) -> tuple[str, ...]:
        """Who complains of an owner."""
        return tuple(holder for disputed, holder in self.disputes if disputed == owner)


def after_complaints(parties: Circle, complaints: Mapping[str, Collection[str]]) -> Agreed:
    """Who goes on after each site has said whose shares it does not hold.

    Either the owner or the holder lies. As many sites may lie as may drop out, one at least: who is in dispute with
    more of them lies itself, since an honest site is only in dispute with liars. The others go on: an owner answers
    with the shares that it gave, or is not in the sum.

    Args:
        parties: Of the sum.
        complaints: Each site that answered -> the owners whose shares it does not hold.
    """
    found = {(owner, holder) for holder, owners in complaints.items() for owner in owners if owner in complaints}
    against: dict[str, set[str]] = {name: set() for name in complaints}
    for owner, holder in found:
        against[owner].add(holder)
        against[holder].add(owner)
    may_lie = max(1, len(parties.keys) - parties.terms.needed)
    liars = {name for name, others in against.items() if len(others) > may_lie}
    arrived = set(complaints) - liars
    disputes = sorted((owner, holder) for owner, holder in found if {owner, holder} <= arrived)
    return Agreed(tuple(sorted(arrived)), tuple(sorted(liars)), tuple(disputes))


def fitting(
    parties: Circle,
    sharings: Mapping[str, SignedSharing],
    revealed: Mapping[str, Revealed],
    *,
    expected: Mapping[str, Mapping[str, Secret]],
) -> tuple[dict[str, Revealed], tuple[str, ...]]:
    """The revealed shares that fit their owners' commitments, and the sites that have revealed anything else.

    Args:
        parties: Of the sum.
        sharings: What every owner has committed itself to.
        revealed: Shares by the site that sent them.
        expected: Holder -> owner -> the secret of which it is to reveal its share.
    """
    kept: dict[str, Revealed] = {}
    for holder, shares in revealed.items():
        kept[holder] = {
            owner: (secret, share)
            for owner, (secret, share) in shares.items()
            if expected[holder].get(owner) == secret
            and sharings[owner].fits(parties.roster, owner, holder, secret, share)
        }
    wrong = (name for name in revealed if not kept[name].keys() == revealed[name].keys() == expected[name].keys())
    return kept, tuple(wrong)


def to_reveal(agreed_on: Agreed, survivors: Sequence[str], *, holders: Sequence[str]) -> dict[str, dict[str, Secret]]:
    """What each of the holders is to reveal: the seeds of those in the sum, the keys of the rest."""
    unheld, alive = set(agreed_on.disputes), set(survivors)
    return {
        holder: {
            owner: "seed" if owner in alive else "key" for owner in agreed_on.arrived if (owner, holder) not in unheld
        }
        for holder in holders
    }


def with_answers(
    revealed: Mapping[str, Revealed], answers: Mapping[str, Mapping[str, tuple[bytes, bytes]]]
) -> dict[str, Revealed]:
    """The revealed shares, and of owners in the sum those of their seeds that they have shown themselves.

    Args:
        revealed: Shares by the site that sent them.
        answers: Owner -> holder that complained -> its shares (of the seed, of the mask key).
    """
    made = dict(revealed)
    for owner, shown in answers.items():
        for holder, (of_seed, _) in shown.items():
            made[holder] = {**made.get(holder, {}), owner: ("seed", of_seed)}
    return made


def unmask(
    sums: Sequence[Integers],
    parties: Circle,
    sharings: Mapping[str, SignedSharing],
    *,
    arrived: Sequence[str],
    survivors: Sequence[str],
    revealed: Mapping[str, Revealed],
) -> None:
    """Takes the masks off the sums, in place: the survivors' own ones, and those they share with who dropped out.

    Args:
        sums: Masked inputs of the survivors, added up.
        parties: Of this sum.
        sharings: What every owner has committed itself to.
        arrived: Who was to share masks.
        survivors: Whose input is in the sums.
        revealed: Shares that fit, by the site that sent them.

    Raises:
        FewSharesError: Too few shares of a secret.
        FalseSharesError: Shares that do not give what their owner stands for.
    """
    add_streams(sums, list(_masks(parties, sharings, arrived, frozenset(survivors), revealed)))  # all, or none


def _masks(
    parties: Circle,
    sharings: Mapping[str, SignedSharing],
    arrived: Sequence[str],
    alive: frozenset[str],
    revealed: Mapping[str, Revealed],
) -> Iterator[tuple[bytes, bool]]:
    """Seeds of the masks that are left in the sums, and whether to subtract them."""
    for name in sorted(arrived):
        if name in alive:
            yield derived(_joined(parties, name, sharings[name], revealed, "seed"), "own-mask"), True
            continue
        secret = _joined(parties, name, sharings[name], revealed, "key")
        for peer in sorted(alive):
            seed = pair_seed(secret, parties.keys[peer], parties.roster, name, peer)
            yield seed, peer < name  # the peer added it if it comes first


def _joined(
    parties: Circle, owner: str, sharing: SignedSharing, revealed: Mapping[str, Revealed], secret: Secret
) -> bytes:
    shares = {
        holder: revealed[holder][owner][1]
        for holder in parties.keys
        if revealed.get(holder, {}).get(owner, ("",))[0] == secret
    }
    needed = parties.terms.needed
    if len(shares) < needed:
        raise FewSharesError(owner, len(shares), needed)
    found = secret_of(shares, sharing, secret)
    if found is not None and (secret == "seed" or public_half(found).hex() == parties.keys[owner].mask):
        return found
    proof = None
    if secret == "seed":
        shown = {holder: shares[holder].hex() for holder in sorted(shares)[:needed]}
        proof = FalseSharing(roster=parties.roster.hex(), sharing=sharing, shares=shown)
    raise FalseSharesError(owner, secret, proof)
