"""The largest epsilon that a site can have reached truthfully: a report above it is a lie about the run's guarantee."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from silotune.errors import MessageError, require
from silotune.federation.coordinator.decisions import MOST_TRIES
from silotune.federation.wire.messages import TrainReport
from silotune.privacy.accountant import Spend, epsilon
from silotune.settings.sections import PrivacySection, TrainingSection
from silotune.training.release import release_of

SPARE_ROUNDS = 10
"""Rounds that a killed run may have begun in addition to its own; sites were charged for these, too."""
_ROUNDING = 1 + 1e-6


@dataclass(frozen=True)
class Reported:
    """What bounds an epsilon in a report.

    Attributes:
        privacy: The run's ``[privacy]`` section.
        training: Its ``[training]`` section.
        rounds: Of the run.
        is_tried_again: Whether a round with too few replies is done again, which costs its sites once more.
    """

    privacy: PrivacySection
    training: TrainingSection
    rounds: int
    is_tried_again: bool = False

    def __post_init__(self) -> None:
        if self.privacy.dp.is_at_site and self.privacy.guarantee.epsilon is None:
            require("dp_accounting", extra="dp")

    def most(self, num_examples: int) -> float:
        """For a site with so many examples: ``privacy.dp.epsilon``, or what all rounds of such a site cost.

        Counted by moments, which is quick, and looser than the accountant that a site may count with.
        """
        if self.privacy.guarantee.epsilon is not None:
            return self.privacy.guarantee.epsilon * _ROUNDING
        spend = release_of(self.privacy, self.training, num_examples=num_examples, rounds=self.rounds)
        rounds = (self.rounds + SPARE_ROUNDS) * (MOST_TRIES if self.is_tried_again else 1)
        return _cost(spend.noise_multiplier, spend.sampling_rate, spend.steps * rounds, self.privacy.guarantee.delta)


def check_epsilon(report: TrainReport, facts: Reported | None) -> None:
    """Refuses an epsilon that no site of the run can have reached.

    Args:
        report: A site's.
        facts: Of the run; None where its sites add no noise of their own.

    Raises:
        MessageError: The epsilon is too large, or the sites of this run add no noise.
    """
    if report.epsilon is None:
        return
    if facts is None or not facts.privacy.dp.is_at_site:
        raise MessageError("a report names an epsilon, and the sites of this run add no noise")
    most = facts.most(report.num_examples)
    if report.epsilon > most:
        raise MessageError(f"a report names epsilon = {report.epsilon:.4g}: at most {most:.4g} can have been spent")


@lru_cache(1024)
def _cost(noise: float, rate: float, steps: int, delta: float) -> float:
    return epsilon([Spend(noise, rate, steps)], delta, accountant="rdp")
