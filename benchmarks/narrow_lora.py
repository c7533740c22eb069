"""LoRA on narrow layers on one core: base and update as one matrix beside peft's layer, forward and backward.

Both are whole layers, called as a model calls them.

    python benchmarks/narrow_lora.py --markdown

A row without a bound is a shape that silotune leaves to peft. Ends with code 1 when a shape that it takes itself is
not faster.
"""

from __future__ import annotations

import copy
import sys

import torch
from measure import Result, in_turn, of_shapes, speed_up
from peft.tuners.lora import Linear, LoraConfig

from silotune.models.fast import narrow_lora

SHAPES = (
    ("stories260K: attention", 1152, 64, 64, 8),
    ("stories260K: MLP", 1152, 64, 172, 8),
    ("stories260K: an instruction alone", 144, 64, 64, 8),
    ("nano: attention", 1152, 128, 128, 8),
    ("nano: MLP", 1152, 128, 384, 8),
    ("nano: MLP, rank 32", 1152, 384, 128, 32),
    ("256 wide: attention", 1152, 256, 256, 8),
    ("nano: a few rows", 171, 128, 128, 8),
    ("nano: MLP, a few rows", 512, 128, 384, 8),
    ("few rows for their rank", 128, 64, 64, 16),
    ("one short text", 64, 64, 64, 8),
    ("too few rows for the width", 128, 128, 384, 8),
    ("288 wide: attention", 1152, 288, 288, 8),
    ("SmolLM: attention", 1152, 576, 576, 8),
)
"""Rows, width in, width out, rank."""
REPETITIONS = 41
LONG_ENOUGH = 1_000_000
"""Values in and out that one timing works through at least, so that it takes milliseconds."""


def compared(name: str, rows: int, width: int, out: int, rank: int) -> Result:
    """One shape: processor seconds of both, taken in turn."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(width, out, bias=False).requires_grad_(False)
    layer = Linear(plain, "default", LoraConfig(r=rank), r=rank, lora_alpha=2 * rank)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    narrow = copy.copy(layer)
    narrow.__class__ = narrow_lora.NarrowLora
    trained = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, along = torch.randn(rows, width, requires_grad=True), torch.randn(rows, out)
    calls = max(1, LONG_ENOUGH // (rows * (width + out)))

    taken = narrow_lora.is_worth_it(rows, width * out, rank)

    def theirs() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, *trained), along)

    def own() -> tuple[torch.Tensor, ...]:
        if taken:
            made = narrow(x)
        else:  # what the layer leaves to peft
            made = narrow_lora.MergedLinear.apply(x, plain.weight, *trained, layer.scaling["default"])
        return torch.autograd.grad(made, (x, *trained), along)

    for left, right in zip(theirs(), own(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * float(left.abs().max()))
    measured = in_turn(theirs, own, repetitions=REPETITIONS, calls=calls)
    what = f"{name}: {rows} rows, {width} to {out}, rank {rank}"
    return Result("narrow LoRA", what, *measured, speed_up(*measured), 1.0 if taken else None)


if __name__ == "__main__":
    sys.exit(of_shapes(__doc__, lambda: [compared(*shape) for shape in SHAPES]))
