"""The table of LoRA-aware aggregation: each name says which parts travel and what keeps the product BA whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from silotune.methods.products import Fold, into_base, into_factors, into_residual
from silotune.methods.schedule import Schedule, in_turns, whole, without_a, without_own_b
from silotune.settings.sections import LoraRule


@dataclass(frozen=True)
class LoraAggregation:
    """How LoRA's factors become one model.

    Attributes:
        schedule: Which tensors train and travel in a round.
        fold: Puts the mean product into the model after the server step; None where averaging is all.
        has_core: The adapter is B R A with fixed factors, and R alone is trained.
    """

    schedule: Schedule = whole
    fold: Fold | None = None
    has_core: bool = False


LORA_RULES: Mapping[LoraRule, LoraAggregation] = {
    "factors": LoraAggregation(),
    "exact-residual": LoraAggregation(fold=into_residual),
    "stack": LoraAggregation(fold=into_base),
    "svd": LoraAggregation(fold=into_factors),
    "freeze-a": LoraAggregation(without_a),
    "alternate": LoraAggregation(in_turns),
    "share-a": LoraAggregation(without_own_b),
    "sb": LoraAggregation(has_core=True),
}
"""Name -> rule; the names are those of ``sections.LoraRule`` (a test compares them)."""
