"""A site's part of distributed differential privacy: the round's cost, the update within its bound, a share of noise.

The noise is part of the terms of the secure sum, which every site signs, so each knows that the others add their
shares. Before anything is trained, the site writes down the cost with the fewest sites that may open the sum. Once the
sites have agreed whose inputs are in the sum, and before it is opened, the site corrects the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from silotune import tensors as arithmetic
from silotune.errors import ProtectionError
from silotune.federation.site.ledger import open_round, settle_round
from silotune.federation.site.state import Site
from silotune.federation.wire.orders import Order
from silotune.privacy.accountant import Spend, spend_of
from silotune.privacy.distributed import Array, SharedNoise, rounded, skellam
from silotune.privacy.noise import Entropy, system
from silotune.privacy.ring import RINGS, Integers
from silotune.privacy.secure_sum.terms import Terms
from silotune.settings.privacy import Distributed
from silotune.settings.sections import FederationSection, PrivacySection
from silotune.structs import Reply, Tensors


@dataclass(frozen=True)
class Share:
    """A site's share of a sum's noise, the ledger's entry of its cost, and the source of its randomness."""

    noise: SharedNoise
    entry: str
    entropy: Entropy = system


def begin(terms: Terms, order: Order, site: Site) -> Share | None:
    """Writes the round's cost to the site's ledger before anything is trained; None for an exact sum.

    Args:
        terms: Of the sum that the site takes part in.
        order: The order to train.
        site: Whose state moves on.

    Raises:
        ProtectionError: The terms of the sum name other noise than the run's settings.
        BudgetError: The round would overspend.
    """
    privacy = site.settings.privacy
    check_noise(terms, privacy)
    if terms.noise is None:
        return None
    noise = terms.shared_noise(terms.noise)
    planned = planned_of(terms, noise)
    opened = open_round(
        site.name, site.state, site.budget, privacy, run=order.run, round_number=terms.round_number,
        release=lambda kept: planned,
    )  # fmt: skip
    site.state = opened.state
    return Share(noise, opened.identity)


def check_noise(terms: Terms, privacy: PrivacySection) -> None:
    """Raises ``ProtectionError`` unless the noise in the terms of a sum is that of the order to train."""
    dp = privacy.dp
    if (terms.noise is None) == dp.is_in_shares:
        raise ProtectionError(f"the order says privacy.dp = {dp.type!r}, but the terms of the sum say otherwise")
    if terms.noise is None or not isinstance(dp, Distributed):
        return
    asked = (dp.clip_norm, dp.colluding, dp.noise_multiplier or terms.noise.multiplier)
    if (terms.noise.clip_norm, terms.noise.colluding, terms.noise.multiplier) != asked:
        raise ProtectionError("the noise in the terms of the sum is not that of the order to train")


def largest_weight(privacy: PrivacySection, federation: FederationSection) -> int:
    """The most that one site weighs in a sum; with noise in shares that is its cap, or 1 where all weigh the same."""
    if not privacy.dp.is_in_shares:
        return privacy.sums.max_examples
    return federation.weighting.largest or 1


def planned_of(terms: Terms, noise: SharedNoise) -> Spend:
    """What a round costs at most: the noise of the fewest sites that the sum may be opened over."""
    return spend_of(noise, terms.needed)


def price_of(terms: Terms) -> Spend | None:
    """What taking part in a sum costs at most; None for an exact sum, to which nobody adds noise."""
    return None if terms.noise is None else planned_of(terms, terms.shared_noise(terms.noise))


def settle(terms: Terms, present: int, site: Site, entry: str | None) -> None:
    """Corrects the sum's entry in the ledger, because the noise of all sites in the sum counts."""
    if terms.noise is None or entry is None:
        return
    spend = spend_of(terms.shared_noise(terms.noise), present)
    site.state = settle_round(site.name, site.state, site.budget, identity=entry, spend=spend)


def noised(
    update: Reply, terms: Terms, share: Share, *, generator: np.random.Generator
) -> tuple[Integers, Integers, int]:
    """An update as integers within the bound, a share of the noise, and what the update weighs.

    Args:
        update: A ``train`` reply, its tensors clipped.
        terms: Of the sum.
        share: As ``begin`` gave it.
        generator: For the rounding.
    """
    weight = min(int(update.body["num_examples"]), terms.max_examples)
    values = arithmetic.flatten(update.tensors).float().numpy()
    integers = rounded(values, weight, terms.scale(), bits=terms.bits, generator=generator)
    drawn: Array = skellam(values.size, share.noise.share_variance, share.entropy)
    return integers, drawn.astype(RINGS[terms.bits]), weight


def within(delta: Tensors, clip_norm: float) -> Tensors:
    """The update scaled down to the clip norm; zeros in place of one that is not finite."""
    if not arithmetic.all_finite(delta):
        return {name: tensor.new_zeros(tensor.shape) for name, tensor in delta.items()}
    exact = arithmetic.clip({name: tensor.double() for name, tensor in delta.items()}, clip_norm)
    return {name: tensor.to(delta[name].dtype) for name, tensor in exact.items()}
