"""The orders of a run: how its clients train, and how they score; both follow from the configuration alone.

The coordinator sends them, the submitter signs their hashes, and a site compares them with the run's setup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from silotune.config import Config
from silotune.errors import ConfigError
from silotune.federation.wire.signed_job import SignedJob
from silotune.settings.attacks import NoAttack
from silotune.settings.base import Positive, Section
from silotune.settings.sections import (
    BudgetSection,
    EvaluationSection,
    FederationSection,
    PrivacySection,
    Scoring,
    TrainingSection,
)

MOST_LABELS, LONGEST_LABEL, MOST_NEW_TOKENS, MOST_BATCH = 256, 256, 4096, 65536
"""Of an order to score; a reply holds a number for every pair of labels."""


class TrainOrder(Section):
    """The body of a ``train`` request: the settings of a local round; ``run`` tells runs apart in ledgers."""

    training: TrainingSection
    federation: FederationSection
    seed: int
    rounds: int
    privacy: PrivacySection = PrivacySection()
    run: str = ""
    job: SignedJob | None = None


def _each_once(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) != len(labels):
        raise ValueError("a label stands twice")
    return labels


_Label = Annotated[str, Field(max_length=LONGEST_LABEL)]


class EvaluateOrder(Section):
    """The body of an ``evaluate`` request: how to score the client's own examples."""

    labels: Annotated[tuple[_Label, ...], Field(max_length=MOST_LABELS), AfterValidator(_each_once)]
    batch_size: Annotated[Positive, Field(le=MOST_BATCH)]
    scoring: Scoring = "likelihood"
    max_new_tokens: Annotated[Positive, Field(le=MOST_NEW_TOKENS)] = 16
    job: SignedJob | None = None


def train_order(
    config: Config, *, run: str, training: TrainingSection | None = None, federation: FederationSection | None = None
) -> TrainOrder:
    """What every client is told of its local rounds; not budget, simulated attack, clock and the others' ranks.

    Args:
        config: Of the run.
        run: Its identity in ledgers.
        training: In place of the configuration's, for another mode.
        federation: The same.
    """
    not_for_clients: dict[str, Any] = {
        "budget": BudgetSection(),
        "attack": NoAttack(),
        "clock": None,
        "ranks": {},
        "memory_mb": {},
        "policies": {},
    }
    asked = (federation or config.federation).model_copy(update=not_for_clients)
    return TrainOrder(
        training=training or config.training,
        federation=asked,
        seed=config.seed,
        rounds=asked.rounds,
        privacy=config.privacy,
        run=run,
    )


def evaluate_order(settings: EvaluationSection, labels: Sequence[str]) -> EvaluateOrder:
    """How clients score on their own examples: as the gold-standard set is scored.

    Raises:
        ConfigError: The task has more options, or longer ones, than a site scores over.
    """
    if len(labels) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
        raise ConfigError(
            f"clients score over at most {MOST_LABELS} options of {LONGEST_LABEL} characters each: "
            "leave evaluation.per_client out"
        )
    return EvaluateOrder(
        labels=tuple(labels),
        batch_size=settings.batch_size,
        scoring=settings.scoring,
        max_new_tokens=settings.max_new_tokens,
    )
