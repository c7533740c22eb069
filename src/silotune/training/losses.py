"""What an objective gives for a batch: a summed loss and the number of its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from silotune.models.adapters import Adapted
from silotune.settings.sections import TrainingSection
from silotune.training.encode import Encoded

DEFAULTS = TrainingSection()
"""The settings of an objective that is given none."""


@dataclass(frozen=True)
class Loss:
    """A summed loss and the number of terms in it; their quotient is the mean."""

    total: torch.Tensor
    count: int


class LossFunction(Protocol):
    """A loss over one batch of examples, by the settings of the ``[training]`` section that concern it."""

    def __call__(self, adapted: Adapted, examples: Sequence[Encoded], settings: TrainingSection = ...) -> Loss: ...
