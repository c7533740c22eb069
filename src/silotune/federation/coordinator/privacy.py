"""The coordinator's part of client-level differential privacy: who is drawn, what it costs, the noised mean.

Where the sites add the noise in shares inside a secure sum, the coordinator only keeps the account.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from silotune.errors import BudgetError, ConfigError
from silotune.federation.coordinator.exchange import RELEASE
from silotune.federation.kinds import EPSILON_RULES
from silotune.privacy.accountant import Spend, epsilon, least_noise, noise_for, spend_of
from silotune.privacy.client_dp import ClientMechanism, private_mean, weight_of, with_bound
from silotune.privacy.distributed import PLANNED_SIZE, shared_noise
from silotune.privacy.ledger import Cap, as_row, check, entry, from_row, spent, union
from silotune.privacy.noise import Entropy, drawn, system
from silotune.privacy.secure_sum.terms import needed_of
from silotune.record.runs import RunFolder
from silotune.settings.aggregation import Capped
from silotune.settings.privacy import Adaptive, ByClient, Distributed
from silotune.settings.sections import FederationSection, PrivacySection
from silotune.structs import BUDGET, ClientUpdate, Failure, Tensors

LEDGER = "ledger"
"""Name of the rows in the run's folder."""
ENTRIES = "entries"
"""Where the rounds' state keeps the same rows."""
_CLIP = "clip_norm"
_ROOM_FOR_SIZE = 1 - 1e-4
"""Noise is planned for this share of an epsilon, so that it also keeps the epsilon for another number of values."""


@dataclass(frozen=True)
class CentralPrivacy:
    """Noise on the sum of a round's updates, by a coordinator that all institutions trust, or in shares by the sites.

    Attributes:
        privacy: The ``[privacy]`` section.
        mechanism: Noise and weights; None where the sites have noised the sum.
        release: What one round costs, at most.
        run: The run's identity in the ledger.
        entropy: Where draws and noise come from.
    """

    privacy: PrivacySection
    mechanism: ClientMechanism | None
    release: Spend
    run: str
    entropy: Entropy = system

    def sample(self, clients: Sequence[str]) -> tuple[str, ...] | None:
        """The round's clients by independent draws; None where the run samples as it does without privacy.

        The run's seed does not draw them, because the sites know it: sampling amplifies privacy only against those who
        do not know who took part.
        """
        dp = self.privacy.dp
        if not isinstance(dp, ByClient) or dp.client_sampling == "fixed":
            return None
        return tuple(clients[place] for place in drawn(len(clients), self.release.sampling_rate, self.entropy))

    def open(self, kept: Mapping[str, Any], number: int, folder: RunFolder) -> dict[str, Any]:
        """Writes the round's cost to the ledger, and gives what the state is to keep.

        Raises:
            BudgetError: The round would pass ``privacy.dp.epsilon``; nothing is written.
        """
        known = union(map(from_row, folder.read_rows(LEDGER)), map(from_row, kept.get(ENTRIES, ())))
        new = entry(self.run, number, self.release)
        delta, accountant = self.privacy.guarantee.delta, self.privacy.guarantee.accountant
        if self.privacy.guarantee.epsilon is None:
            cost = spent([*known, new], delta, accountant=accountant)
        else:
            cap = Cap(self.privacy.guarantee.epsilon, "privacy.dp.epsilon")
            cost = check([*known, new], delta, cap, accountant=accountant)
        folder.append(LEDGER, as_row(new))
        return {**kept, ENTRIES: [as_row(item) for item in (*known, new)], "epsilon": cost}

    def aggregate(
        self, updates: Iterable[ClientUpdate], like: Tensors, kept: Mapping[str, Any]
    ) -> tuple[Tensors, dict[str, Any]]:
        """The noised mean, and what the state is to keep."""
        if self.mechanism is None:
            (summed,) = updates
            return summed.delta, dict(kept)
        bound = float(kept.get(_CLIP, self.privacy.guarantee.clip_norm))
        mean, bound = private_mean(updates, like, self.mechanism, clip_norm=bound, entropy=self.entropy)
        return mean, {**kept, _CLIP: bound}

    def settled(self, kept: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> dict[str, Any]:
        """What the state is to keep once the round's cost is known, which depends on the clients in a noised sum."""
        released = [row[RELEASE] for row in rows if RELEASE in row]
        if not released:
            return dict(kept)
        entries = [*map(from_row, kept[ENTRIES])]
        entries[-1] = replace(entries[-1], spend=Spend(**released[0]))
        folder.append(LEDGER, as_row(entries[-1]))
        cost = spent(entries, self.privacy.guarantee.delta, accountant=self.privacy.guarantee.accountant)
        return {**kept, ENTRIES: [as_row(item) for item in entries], "epsilon": cost}


def noise_in_shares(privacy: PrivacySection, clients: int, rounds: int) -> Spend:
    """What a round of distributed noise costs at most: its cost with the fewest sites that a sum is opened for.

    Args:
        privacy: The ``[privacy]`` section; without a noise multiplier the noise is made to fit its epsilon.
        clients: Of a round.
        rounds: Of the run.

    Raises:
        ConfigError: No noise keeps ``privacy.dp.epsilon``.
        ProtectionError: The noise does not fit the ring, or no honest site's noise is left when sites collude.
    """
    dp, needed = privacy.dp, needed_of(clients, privacy.masks.threshold)
    assert isinstance(dp, Distributed), "noise in shares is of this guarantee alone"

    def release(multiplier: float) -> Spend:
        made = shared_noise(
            multiplier, bits=privacy.masks.ring_bits, clients=clients, needed=needed, colluding=dp.colluding,
            size=PLANNED_SIZE,
        )  # fmt: skip
        return replace(spend_of(made, needed), noise_multiplier=multiplier)

    if dp.noise_multiplier is not None:
        return release(dp.noise_multiplier)
    target = float(dp.epsilon or 0) * _ROOM_FOR_SIZE
    found = least_noise(
        lambda noise: epsilon([replace(release(noise), steps=rounds)], dp.delta) <= target, rounds**0.5 / target
    )
    if found is None:
        raise ConfigError(
            f"no noise keeps privacy.dp.epsilon = {dp.epsilon:g} at delta = {dp.delta:g} over {rounds} rounds; "
            "allow a larger epsilon or fewer rounds"
        )
    return release(found)


def central_privacy(
    privacy: PrivacySection, federation: FederationSection, sizes: Mapping[str, int], *, run: str
) -> CentralPrivacy:
    """The mechanism for these clients; noise that fits ``privacy.dp.epsilon`` over all rounds unless it is given.

    Args:
        privacy: The ``[privacy]`` section.
        federation: The ``[federation]`` section: rounds, clients a round (on average), and what a client weighs.
        sizes: Examples by client; what they weigh together is the divisor of every round.
        run: Its identity in the ledger.
    """
    expected = federation.clients_per_round or len(sizes)
    dp = privacy.guarantee
    if dp.is_in_shares:
        return CentralPrivacy(privacy, None, noise_in_shares(privacy, expected, federation.rounds), run)
    share = expected / len(sizes)
    assert isinstance(dp, ByClient), "the server adds noise under this guarantee alone"
    rate = share if dp.client_sampling == "poisson" else 1.0
    noise = dp.noise_multiplier
    if noise is None:
        asked = float(dp.epsilon or 0)
        noise = noise_for(asked, dp.delta, sampling_rate=rate, steps=federation.rounds, accountant=dp.accountant)
    cap = federation.weighting.cap if isinstance(federation.weighting, Capped) else None
    weight = share * sum(weight_of(size, cap) for size in sizes.values())
    mechanism = ClientMechanism(noise, weight, cap)
    if isinstance(clipping := dp.clipping, Adaptive):
        mechanism = replace(mechanism, quantile=clipping.quantile, clip_learning_rate=clipping.learning_rate)
        mechanism = with_bound(mechanism, expected)
    return CentralPrivacy(privacy, mechanism, Spend(noise, rate, 1), run)


def begin_round(
    privacy: CentralPrivacy | None, clients: Sequence[str], kept: Mapping[str, Any], *, number: int, run: RunFolder
) -> tuple[Mapping[str, Any], tuple[str, ...] | None]:
    """Writes the round's cost down; gives what privacy keeps, and the round's clients where privacy draws them.

    Raises:
        BudgetError: The round would overspend.
    """
    if privacy is None:
        return kept, None
    return privacy.open(kept, number, run), privacy.sample(clients)


def with_epsilon(kept: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What privacy keeps, with the largest epsilon that a client has reported so far, where clients do."""
    known = [row["epsilon"] for row in rows if row.get("epsilon") is not None]  # a protected sum's row has none
    if not known:
        return kept
    return {**kept, "epsilon": max(*known, kept.get("epsilon", 0.0))}


def refuse_overspending(clients: Sequence[str], failures: Sequence[Failure]) -> None:
    """Raises where no client's budget, the run's or its owner's, allows the round; ignores other failures.

    Args:
        clients: Of the round.
        failures: In it.

    Raises:
        BudgetError: Every client refused because of its budget.
    """
    spent = over_budget(failures)
    if spent and {failure.client for failure in spent} >= set(clients):
        first = spent[0]
        raise BudgetError(f"no client's privacy budget allows round {first.round_number}: {first.reason}")


def over_budget(failures: Sequence[Failure]) -> list[Failure]:
    """The failures of clients whose budget, the run's or the owner's, does not allow the round."""
    return [failure for failure in failures if failure.stage == BUDGET or failure.rule in EPSILON_RULES]
