"""What an objective gives for a batch: a summed loss and the number of its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from silotune.models.adapters import Adapted
from silotune.training.encode import Encoded


@dataclass(frozen=True)
class Loss:
    """A summed loss and the number of terms in it; their quotient is the mean."""

    total: torch.Tensor
    count: int


class LossFunction(Protocol):
    """A loss over one batch of examples, by the objective's own settings."""

    def __call__(self, adapted: Adapted, examples: Sequence[Encoded], settings: Any) -> Loss: ...
