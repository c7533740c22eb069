"""The settings that both sides of a run act by. They follow from its configuration alone; no order repeats them."""

from __future__ import annotations

from dataclasses import dataclass

from silotune.config import Config
from silotune.data.tasks import resolve
from silotune.errors import ConfigError
from silotune.record.plain_json import sha256
from silotune.settings.sections import EvaluationSection, FederationSection, PrivacySection, TrainingSection

MOST_LABELS, LONGEST_LABEL = 256, 256
"""Most options that clients score over, and most characters of one: a reply holds a number for every pair of
options."""


@dataclass(frozen=True)
class RunSettings:
    """What the clients of a run do, and what the coordinator believes of it.

    Attributes:
        training: How a local round trains.
        federation: The method, and how messages are compressed.
        privacy: The guarantee and the protection.
        evaluation: How clients score on their own examples.
        labels: The options that they score over; empty for open answers.
    """

    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    labels: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the settings; an order names it where no setup travels, as in a run in one process."""
        sections = (self.training, self.federation, self.privacy, self.evaluation)
        return sha256([*(section.model_dump(mode="json") for section in sections), list(self.labels)])


def run_settings(config: Config) -> RunSettings:
    """The settings of a run's federated mode."""
    labels = tuple(resolve(config.data).options)
    return RunSettings(config.training, config.federation, config.privacy, config.evaluation, labels)


def check_scorable(labels: tuple[str, ...]) -> None:
    """Refuses options that clients cannot score over.

    Raises:
        ConfigError: There are too many options, one is too long, or one stands twice.
    """
    if len(labels) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
        raise ConfigError(
            f"clients score over at most {MOST_LABELS} options of {LONGEST_LABEL} characters each: "
            "leave evaluation.per_client out"
        )
    if len(set(labels)) != len(labels):
        raise ConfigError("an option of the task stands twice: clients cannot score over it")
