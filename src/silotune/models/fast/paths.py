"""Which shortcuts a model in memory takes, as one record that goes with it, and what puts the model on them.

A shortcut leaves the numbers as they are and costs less than the plain way, which is transformers' and peft's own. A
model is on none of them until `training.probe` has found that its loss and gradients are those of the plain way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from silotune.models.fast import attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Fast:
    """The shortcuts of one model in memory; what is False is computed in the plain way.

    Attributes:
        attention: Attention over short texts on a CPU (`fast.attention`).
        narrow_lora: LoRA on narrow layers as one product (`fast.narrow_lora`).
        head: The output head at needed positions only.
        branches: Options as branches of one prompt, and several short examples in one row.
        prefix: What all prompts of a batch begin with goes through the model once.
        last_layer: The last layer at needed positions only (`fast.last_layer`).
        note: What was switched off and why, in one sentence; empty where nothing was.
    """

    attention: bool = False
    narrow_lora: bool = False
    head: bool = False
    branches: bool = False
    prefix: bool = False
    last_layer: bool = False
    note: str = ""

    def names(self) -> tuple[str, ...]:
        """The shortcuts that are taken."""
        return tuple(name for name in SHORTCUTS if getattr(self, name))

    def only(self, *names: str) -> Fast:
        """These of the shortcuts that are taken, and no other."""
        return _with(name for name in self.names() if name in names)


def _with(names: Iterable[str]) -> Fast:
    taken: dict[str, Any] = dict.fromkeys(names, True)
    return Fast(**taken)


SHORTCUTS = tuple(field.name for field in fields(Fast) if field.name != "note")
PLAIN = Fast()
"""None of them: `model.fast = "off"`, and every model that was not probed."""
ALL = _with(SHORTCUTS)
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
)
"""The names that configurations give to the largest number of ids that some of their layers see."""


def put_on(base: PreTrainedModel, model: torch.nn.Module, fast: Fast) -> None:
    """Gives a model the attention and the LoRA layers that a record names, and takes those away that it does not.

    Args:
        base: The model of transformers.
        model: The same with its adapter.
        fast: The shortcuts; the others are taken as each batch is computed, and change nothing in the model.
    """
    (attention.use_for_short_texts if fast.attention else attention.leave_short_texts)(base)
    if model is base:  # all weights are trained, and peft, which takes seconds to import, is not needed
        return
    from silotune.models.fast.narrow_lora import leave_narrow_layers, use_for_narrow_layers

    (use_for_narrow_layers if fast.narrow_lora else leave_narrow_layers)(model)


def longest_alike(config: PreTrainedConfig) -> int | None:
    """Ids up to which every id of a text sees all before it, at positions that do not depend on the text's length.

    Up to there a text may be computed in parts, or beside others in a row. Beyond, a layer with a window or with chunks
    would be opened by an explicit mask, or counts columns where it should count positions, and a rotary embedding that
    is scaled by the length of the text gives the parts of a text other angles than the whole.

    Returns:
        The least of these bounds that the configuration names; None where it names none.
    """
    named = [getattr(config, name, None) for name in WINDOWS]
    return min([*(bound for bound in named if bound), *_rescaled(config)], default=None)


def _rescaled(config: PreTrainedConfig) -> Iterator[int]:
    """Lengths above which rotary embeddings are scaled otherwise."""
    rotary: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for part in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            own = part.get("original_max_position_embeddings")
            own = own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            yield int(own)
