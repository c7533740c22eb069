"""What differential privacy changes in a client's round: before training, during training, and in what is sent."""

from __future__ import annotations

from typing import Any

from silotune.errors import DataError, ProtectionError
from silotune.federation.site.ledger import Opened, open_round
from silotune.federation.site.noised_sum import within
from silotune.federation.site.state import Site
from silotune.privacy.accountant import Spend
from silotune.privacy.client_dp import private_update
from silotune.settings.sections import PrivacySection, TrainingSection
from silotune.structs import Tensors
from silotune.training.private import DpSgd
from silotune.training.release import release_of


def begin(
    privacy: PrivacySection, training: TrainingSection, site: Site, *, rounds: int, place: tuple[str, int]
) -> Opened | None:
    """Writes the round's cost to the site's ledger before anything is trained; None where the site adds no noise.

    Args:
        privacy: The run's ``[privacy]`` section.
        training: Its ``[training]`` section.
        site: Whose state moves on.
        rounds: Of the run.
        place: The run's identity and the round.

    Raises:
        BudgetError: The round would overspend.
        DataError: There are no examples.
    """
    if not privacy.dp.is_at_site:
        return None
    if not site.examples:
        raise DataError("a client has no examples to train on")

    def release(noise: float | None) -> Spend:
        return release_of(privacy, training, num_examples=len(site.examples), rounds=rounds, noise=noise)

    run, number = place
    opened = open_round(site.name, site.state, site.budget, privacy, run=run, round_number=number, release=release)
    site.state = opened.state
    return opened


def dp_sgd(privacy: PrivacySection, opened: Opened | None) -> DpSgd | None:
    """The noise that protects single examples in the steps of the round; None where there is none."""
    if opened is None or not privacy.dp.is_by_example:
        return None
    return DpSgd(opened.spend.noise_multiplier, privacy.guarantee.clip_norm)


def released(privacy: PrivacySection, opened: Opened | None, delta: Tensors) -> Tensors:
    """The update as it may leave the site or, with noise in shares, as it may enter the sum."""
    if privacy.dp.is_in_shares:
        return within(delta, privacy.guarantee.clip_norm)
    if opened is None or privacy.dp.is_by_example:
        return delta
    return private_update(delta, clip_norm=privacy.guarantee.clip_norm, noise_multiplier=opened.spend.noise_multiplier)


def check_way(privacy: PrivacySection, way: str) -> None:
    """Refuses an update that would not leave in the way its order says: alone, or in a secure or encrypted sum.

    Raises:
        ProtectionError: The order asks for another protection, or for noise that this way does not carry.
    """
    if privacy.protection.type != way:
        raise ProtectionError(
            f"the order says privacy.protection = {privacy.protection.type!r}, so its updates cannot leave with {way!r}"
        )
    if privacy.dp.is_in_shares and way != "secure_sum":
        raise ProtectionError(f"privacy.dp = {privacy.dp.type!r} noises sums: no update leaves but inside a secure sum")


def withheld(privacy: PrivacySection, opened: Opened | None) -> dict[str, Any]:
    """Figures that replace those of a reply that carry no noise, and the epsilon that the run has cost so far.

    These figures are the mean loss, the count of tokens, and time and energy, which depend on the tokens.
    """
    if not privacy.dp.is_promised:
        return {}
    costs = {"seconds": None, "core_seconds": None, "joules": None, "energy_source": "unavailable"}
    kept = {"loss": None, "tokens": 0, "epsilon": None if opened is None else opened.epsilon}
    return kept if privacy.guarantee.report_costs else {**kept, **costs}
