"""What the sites of a test act by, and the order in what they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from silotune.federation.wire.orders import Order
from silotune.federation.wire.run_setup import RunSettings
from silotune.settings.sections import FederationSection, PrivacySection, TrainingSection

ORDER = Order(seed=3).body()
"""The body of a request that uses examples, of a run with the seed 3."""


def acting(
    training: TrainingSection | None = None,
    *,
    privacy: PrivacySection | None = None,
    labels: Sequence[str] = (),
    section: FederationSection | None = None,
    **federation: Any,
) -> RunSettings:
    """The settings of a run; those of its federation by keyword, or as a whole ``section``."""
    return RunSettings(
        training=training or TrainingSection(),
        federation=section or FederationSection(**federation),
        privacy=privacy or PrivacySection(),
        labels=tuple(labels),
    )
