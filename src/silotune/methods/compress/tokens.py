"""How the states of tokens are made smaller where they cross the cut of split training: a scale for each token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from silotune.methods.compress.formats import FORMATS, Format
from silotune.settings.links import ValueFormat
from silotune.settings.split import Crossed

VALUES: Mapping[Crossed, ValueFormat] = {"none": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}


def format_of(compress: Crossed) -> Format:
    """The pair of encoder and decoder that ``federation.split.compress`` names."""
    return FORMATS[VALUES[compress]]


def as_received(states: torch.Tensor, compress: Crossed) -> torch.Tensor:
    """States [tokens, width] as they arrive."""
    format_, width = format_of(compress), states.shape[1]
    data = format_.encode(states.detach().float().cpu().reshape(-1), width, None)
    return format_.decode(data, states.numel(), width).view_as(states)
