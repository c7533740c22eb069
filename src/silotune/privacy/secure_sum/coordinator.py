"""The coordinator's side of a secure sum: what it relays, what it adds up, and how the masks come off the sum.

It holds no secret. What it learns is the sum, who dropped out when, and sizes and times of messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from silotune.errors import ProtectionError
from silotune.privacy.masks import add_streams, commitment, derived, public_half
from silotune.privacy.ring import Integers
from silotune.privacy.secure_sum.shamir import join
from silotune.privacy.secure_sum.site import pair_seed
from silotune.privacy.secure_sum.terms import SignedKeys, Terms, all_holders, roster_digest

Revealed = Mapping[str, tuple[str, bytes]]
"""What one site revealed: owner of the secret -> (``seed`` or ``key``, share)."""


def routed(sealed: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """Sealed shares by sender and receiver as receiver and sender, among those who sent any."""
    return {
        receiver: {sender: texts[receiver] for sender, texts in sealed.items() if receiver in texts}
        for receiver in sealed
    }


def unmask(
    sums: Sequence[Integers],
    terms: Terms,
    keys: Mapping[str, SignedKeys],
    *,
    commitments: Mapping[str, str],
    survivors: Sequence[str],
    revealed: Mapping[str, Revealed],
) -> None:
    """Takes the masks off the sums, in place: the survivors' own ones, and those they share with who dropped out.

    Args:
        sums: Masked inputs of the survivors, added up.
        terms: Of this sum.
        keys: Of everybody who advertised some.
        commitments: To the mask seed, by everybody who sent shares.
        survivors: Whose input is in the sums.
        revealed: Shares by the site that sent them.

    Raises:
        ProtectionError: Too few shares of a secret, or shares that do not give what its owner stands for.
    """
    add_streams(sums, list(_masks(terms, keys, commitments, set(survivors), revealed)))  # all of them, or none


def _masks(
    terms: Terms,
    keys: Mapping[str, SignedKeys],
    commitments: Mapping[str, str],
    alive: AbstractSet[str],
    revealed: Mapping[str, Revealed],
) -> Iterator[tuple[bytes, bool]]:
    """Seeds of the masks that are left in the sums, and whether to subtract them."""
    roster = roster_digest(terms, keys)
    with_shares = all_holders(tuple(keys), roster, terms.degree)
    for name in sorted(commitments):
        if not alive & set(with_shares[name]):
            continue  # it dropped out and nobody in the sum has a mask with it
        secret = _joined(name, with_shares[name], terms, revealed, kind="seed" if name in alive else "key")
        if name in alive:
            if commitment(secret) != commitments[name]:
                raise ProtectionError(f"the shares of {name!r} do not give its mask: the sum stays closed")
            yield derived(secret, "own-mask"), True
            continue
        if public_half(secret).hex() != keys[name].mask:
            raise ProtectionError(f"the shares of {name!r} do not give its key: the sum stays closed")
        for peer in sorted(alive & set(with_shares[name])):
            yield pair_seed(secret, keys[peer], roster, name, peer), peer < name  # the peer added it if it comes first


def _joined(
    owner: str, with_shares: Sequence[str], terms: Terms, revealed: Mapping[str, Revealed], *, kind: str
) -> bytes:
    shares = {
        place: revealed[holder][owner][1]
        for place, holder in enumerate(with_shares, start=1)
        if revealed.get(holder, {}).get(owner, ("",))[0] == kind
    }
    try:
        return join(shares, terms.needed(len(with_shares)))
    except ProtectionError as error:
        raise ProtectionError(f"{owner!r}: {error}") from error
