"""Simulated clients that work against the others, for study in one process: what they do, and its settings."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Positive, PositiveNumber
from silotune.settings.registry import Choice, Table


class AttackSettings(Choice):
    """What malicious clients of this process do."""


class NoAttack(AttackSettings):
    """Every client is honest."""

    type = "none"


class Malicious(AttackSettings):
    """Clients that work against the others.

    Attributes:
        sign: Of the factor that their updates are multiplied by.
        flips_labels: They learn from wrong labels.
        changes_updates: They change updates after training, on their way.
    """

    sign: ClassVar[float] = 1.0
    flips_labels: ClassVar[bool] = False
    changes_updates: ClassVar[bool] = True

    clients: Positive = Field(1, description="malicious clients, drawn by the run's seed")
    factor: PositiveNumber = Field(10.0, description="malicious updates are multiplied by it; sign-flip: by minus it")


class SignFlip(Malicious):
    """Updates point the other way."""

    type = "sign-flip"
    sign = -1.0


class Scaled(Malicious):
    """Updates are made larger."""

    type = "scaled"


class LabelFlip(Malicious):
    """Clients learn from wrong labels, and their updates are made larger."""

    type = "label-flip"
    flips_labels = True
    changes_updates = False


ATTACKS = Table("federation.attack", NoAttack, SignFlip, Scaled, LabelFlip)
Attack = Annotated[SerializeAsAny[AttackSettings], ATTACKS]
