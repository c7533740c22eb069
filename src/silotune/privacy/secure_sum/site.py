"""A site's side of a secure sum: one function a phase, from one stage to the next, each answered once.

Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", the protocol against an
active server, figure 4): each shares masks with each, and each holds a share of everybody's secrets. A sparse graph
(Bell et al. 2020) would be cheaper over hundreds of sites, and was given up: a coordinator that works with a fifth of
the sites can show its two halves two lists of inputs, or say of all sites around a few that they are gone.

Beyond the paper, a site complains of others whose shares it could not open before anything is masked, and commits
itself to the shares that it gives, so that a liar among the sites can be found. A commitment hides its share.
A site complains only about what the other has signed, so an honest one never has to answer another; and its answer,
the two shares that the complainer was to hold, a complainer that lies knows already.

A stage is a frozen value that the site keeps between two messages (``stages``). Asking for the same phase twice finds
another stage and is refused; asking for a new sum forgets the old one's secrets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from silotune.errors import ProtectionError
from silotune.privacy.masks import SEED_BYTES, add_streams, agreed, commitment, derived, public_half, seal, unseal
from silotune.privacy.ring import Integers
from silotune.privacy.secure_sum.sharing import (
    SHARE_BYTES,
    Secret,
    SignedSharing,
    complaint_content,
    sealed_content,
    share_commitment,
    split,
)
from silotune.privacy.secure_sum.stages import Advertised, Consistent, Held, Masked, Sealed, Shared
from silotune.privacy.secure_sum.terms import (
    Member,
    SignedKeys,
    Terms,
    check_signature,
    roster_digest,
)

Entropy: TypeAlias = Callable[[int], bytes]
_SECRETS: tuple[Secret, Secret] = ("seed", "key")
"""The order of the two shares in what is sealed."""


def advertise(member: Member, terms: Terms, entropy: Entropy) -> tuple[Advertised, SignedKeys]:
    """Phase 1: fresh keys for this sum, signed.

    Raises:
        ProtectionError: The terms name somebody who is not a member, or the cohort or the threshold is too small.
    """
    _check_enough(member, terms, len(terms.cohort))
    if member.name not in terms.cohort:
        raise ProtectionError(f"{member.name!r} is asked to join a sum whose cohort it is not in")
    strangers = [name for name in terms.cohort if name not in member.public_keys]
    if strangers:
        raise ProtectionError(f"{strangers[0]!r} is in the cohort and is not a member of the federation")
    if terms.threshold < member.least_threshold:
        raise ProtectionError(f"a threshold of {terms.threshold:.3f} is below this site's {member.least_threshold:.3f}")
    mask_key, share_key = entropy(SEED_BYTES), entropy(SEED_BYTES)
    public = {"mask": public_half(mask_key).hex(), "share": public_half(share_key).hex()}
    unsigned = SignedKeys(**public, signature="0" * 128)
    keys = SignedKeys(**public, signature=member.sign(unsigned.content(terms, member.name)).hex())
    return Advertised(terms, keys, mask_key, share_key), keys


def share(
    member: Member, stage: Advertised, keys: Mapping[str, SignedKeys], entropy: Entropy
) -> tuple[Shared, dict[str, Sealed], SignedSharing]:
    """Phase 2: verifies everybody's keys and encrypts a share of the two secrets for each of the others.

    Returns:
        The next stage, sealed shares by holder, and what the site commits itself to, signed.

    Raises:
        ProtectionError: A signature is not its alleged author's, keys were swapped, or too many are missing.
    """
    terms = stage.terms
    if keys.get(member.name) != stage.keys:
        raise ProtectionError("the list of keys does not hold this site's own: the coordinator changed it")
    if not keys.keys() <= set(terms.cohort):
        raise ProtectionError("the list of keys holds somebody who is not in the cohort")
    _check_enough(member, terms, len(keys))
    for name, signed in keys.items():
        check_signature(member.public_keys[name], signed.signature, signed.content(terms, name), name)
    roster = roster_digest(terms, keys)
    seed = entropy(SEED_BYTES)
    of_seed = split(seed, terms.needed, len(keys), entropy)
    of_key = split(stage.mask_key, terms.needed, len(keys), entropy)
    pairs = dict(zip(sorted(keys), zip(of_seed, of_key, strict=True), strict=True))
    after = Shared(stage, dict(keys), roster, seed, pairs)
    sharing = _committed(member, after)
    return after, {peer: _sealed(member, after, peer, sharing) for peer in pairs if peer != member.name}, sharing


def _sealed(member: Member, stage: Shared, peer: str, sharing: SignedSharing) -> Sealed:
    """One other site's shares."""
    key = _share_key(stage.before, stage.keys[peer], stage.roster, sender=member.name, receiver=peer)
    text = seal(key, b"".join(stage.given[peer]), _route(stage.roster, member.name, peer))
    said = (sharing.seed[peer], sharing.key[peer])
    signature = member.sign(sealed_content(stage.roster, member.name, peer, text, said)).hex()
    return Sealed(text, *said, signature)


def _committed(member: Member, stage: Shared) -> SignedSharing:
    """The commitments to a site's seed and to all shares of its secrets, signed."""
    of_seed, of_key = (
        {
            holder: share_commitment(stage.roster, member.name, holder, secret, pair[place])
            for holder, pair in stage.given.items()
        }
        for place, secret in enumerate(_SECRETS)
    )
    said = {
        "least": stage.terms.needed,
        "commitment": commitment(stage.seed),
        "seed": of_seed,
        "key": of_key,
    }
    unsigned = SignedSharing(**said, signature="0" * 128)
    return SignedSharing(**said, signature=member.sign(unsigned.content(stage.roster, member.name)).hex())


def accept(
    member: Member, stage: Shared, arrived: Sequence[str], relayed: Mapping[str, Sealed]
) -> tuple[Held, dict[str, str]]:
    """Phase 3, before any training: opens the shares that the others sent.

    A share that its owner has signed and that does not open, or is not what it has committed itself to, closes
    nothing: the site complains of the owner and goes on without it. What the owner has not signed is the coordinator's.

    Args:
        member: This site.
        stage: Where the last phase ended.
        arrived: Everybody who sent shares, this site too.
        relayed: What they sealed for this site.

    Returns:
        The next stage, and a signed complaint by owner of shares that this site does not hold.

    Raises:
        ProtectionError: A share was swapped, replayed or left out, or too many are missing.
    """
    names = _listed(member, stage.terms, arrived, among=stage.keys, said="who sent shares")
    if relayed.keys() != names - {member.name}:
        raise ProtectionError("the shares are not those of the sites that are said to have sent them")
    held, complaints = {member.name: stage.given[member.name]}, dict[str, str]()
    for owner, sealed in sorted(relayed.items()):
        content = sealed.content(stage.roster, owner, member.name)
        check_signature(member.public_keys[owner], sealed.signature, content, owner)
        pair = _opened(member, stage, owner, sealed)
        if pair is None:
            complaints[owner] = member.sign(complaint_content(stage.roster, owner, member.name)).hex()
        else:
            held[owner] = pair
    return Held(stage, tuple(sorted(names)), held), complaints


def _opened(member: Member, stage: Shared, owner: str, sealed: Sealed) -> tuple[bytes, bytes] | None:
    """An owner's two shares; None where they do not open or do not fit their commitments."""
    key = _share_key(stage.before, stage.keys[owner], stage.roster, sender=owner, receiver=member.name)
    both = unseal(key, sealed.text, _route(stage.roster, owner, member.name))
    if both is None:
        return None
    pair = (both[:SHARE_BYTES], both[SHARE_BYTES:])
    made = tuple(
        share_commitment(stage.roster, owner, member.name, secret, share)
        for secret, share in zip(_SECRETS, pair, strict=True)
    )
    return pair if made == (sealed.seed, sealed.key) else None


def answer(member: Member, stage: Held, complaints: Mapping[str, str]) -> dict[str, tuple[bytes, bytes]]:
    """Phase 4: what this site gave those that complain of it, for the coordinator to see.

    No honest site complains of another: what it complains of is signed by the other, and an honest site seals and
    signs what opens and fits. So the answer tells the one who complains nothing new.

    Args:
        member: This site.
        stage: Where ``accept`` ended.
        complaints: Signatures by holder.

    Raises:
        ProtectionError: Somebody holds no shares of this site's, or has not signed that it complains.
    """
    shared = stage.before
    for holder, signature in complaints.items():
        if holder not in shared.given or holder == member.name:
            raise ProtectionError(f"{holder!r} is said to complain of this site, and holds no shares of it")
        content = complaint_content(shared.roster, member.name, holder)
        check_signature(member.public_keys[holder], signature, content, holder)
    return {holder: shared.given[holder] for holder in complaints}


def confirm(member: Member, stage: Held, arrived: Sequence[str]) -> Masked:
    """Phase 4, before any training: the final list of those with whom masks are shared.

    Only shares of their secrets are kept: nothing is ever revealed of a party that was left out before it could mask.

    Args:
        member: This site.
        stage: Where the last phase ended.
        arrived: Those who sent shares, without any that were left out since.

    Raises:
        ProtectionError: The list holds others, leaves this site out, or is too short.
    """
    names = _listed(member, stage.terms, arrived, among=stage.arrived, said="who shares masks")
    return Masked(
        stage.before, tuple(sorted(names)), {owner: stage.held[owner] for owner in stage.held if owner in names}
    )


def _listed(
    member: Member, terms: Terms, listed: Sequence[str], *, among: Collection[str], said: str
) -> frozenset[str]:
    """A list of parties with this site on it, each once and known from before, and enough of them."""
    names = frozenset(listed)
    if member.name not in names or len(names) != len(listed) or not names <= set(among):
        raise ProtectionError(f"the list of {said} does not fit the list before it")
    _check_enough(member, terms, len(names))
    return names


def mask(member: Member, stage: Masked, arrays: Sequence[Integers], *, noise: Sequence[Integers] = ()) -> None:
    """Phase 4, the input: adds the site's own mask and one for each of the others, in place.

    Args:
        member: This site.
        stage: Where ``confirm`` ended.
        arrays: The site's integers of the ring.
        noise: Integers of the same rings and shapes added before masking: a share of distributed differential privacy.
    """
    shared = stage.before
    for array, extra in zip(arrays, noise, strict=False):
        np.add(array, extra, out=array)
    own = (derived(shared.seed, "own-mask"), False)
    pairs = (
        (pair_seed(shared.before.mask_key, shared.keys[peer], shared.roster, member.name, peer), member.name > peer)
        for peer in stage.arrived
        if peer != member.name  # whether or not this site could open its share
    )
    add_streams(arrays, (own, *pairs))


def agree(member: Member, stage: Masked, survivors: Sequence[str]) -> tuple[Consistent, str]:
    """Phase 5, the consistency check: signs who shares masks and whose input is in the sum, and only one list of each.

    Raises:
        ProtectionError: The list holds others than those who share masks, leaves this site out, or is too short.
    """
    names = _listed(member, stage.terms, survivors, among=stage.arrived, said="inputs in the sum")
    after = Consistent(stage, tuple(sorted(names)))
    return after, member.sign(after.content).hex()


def reveal(member: Member, stage: Consistent, signatures: Mapping[str, str]) -> dict[str, tuple[str, bytes]]:
    """Phase 6: of each site the share of its seed if its input is in the sum, else of its mask key; never both.

    A share that this site could not open is not revealed, whoever asks. As many as are needed have signed the same
    lists, out of the whole cohort: for two lists, twice as many less the cohort would have to sign both.

    Args:
        member: This site.
        stage: Where the check ended; its list of survivors is the one that this site signed, not one that is sent now.
        signatures: Of the same lists by the others.

    Returns:
        Owner of the secret -> (``seed`` or ``key``, share).

    Raises:
        ProtectionError: Too few have signed the same lists, or a signature is not its alleged author's.
    """
    shared = stage.before.before
    for name, signature in signatures.items():
        if name not in stage.survivors:
            raise ProtectionError(f"{name!r} has signed the list of inputs and is not on it")
        check_signature(member.public_keys[name], signature, stage.content, name)
    least, signed = shared.terms.needed, len(signatures.keys() | {member.name})
    if signed < least:
        raise ProtectionError(f"{signed} sites have signed the list of inputs, {least} are needed")
    return {
        owner: ("seed", held[0]) if owner in stage.survivors else ("key", held[1])
        for owner, held in stage.before.held.items()
    }


def pair_seed(mask_key: bytes, peer: SignedKeys, roster: bytes, one: str, other: str) -> bytes:
    """The 256-bit seed of the mask between two parties, the same from either side."""
    first, second = sorted((one, other))
    return agreed(mask_key, bytes.fromhex(peer.mask), _purpose("pair-mask", roster, first, second))


def _share_key(stage: Advertised, peer: SignedKeys, roster: bytes, *, sender: str, receiver: str) -> bytes:
    """A key for one direction, so that each seals one message only."""
    return agreed(stage.share_key, bytes.fromhex(peer.share), _purpose("share", roster, sender, receiver))


def _purpose(what: str, roster: bytes, first: str, second: str) -> str:
    return f"{what}:{roster.hex()}:{len(first)}:{first}:{second}"


def _route(roster: bytes, sender: str, receiver: str) -> bytes:
    return _purpose("route", roster, sender, receiver).encode()


def _check_enough(member: Member, terms: Terms, count: int) -> None:
    least = max(terms.needed, member.least_clients)
    if count < least:
        raise ProtectionError(f"{count} of {len(terms.cohort)} are left for this sum, {least} are needed")
