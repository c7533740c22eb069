"""LoRA on narrow layers on a CPU: base and update as one matrix, the same numbers as peft's layer, sooner.

y = W x + s B A x is five operations on the batch forward and seven backward, of which all but two are products with a
side of length rank, or no products at all. Over a matrix of up to `MOST_VALUES` values it is faster to add s B A to W
(no more work than a few rows of the batch) and to multiply once; then with G = (dL/dy)' x, the gradient of the whole
matrix, dA = s B' G and dB = s G A'. Wider layers keep peft's way: there G costs more than it saves.
"""

from __future__ import annotations

from typing import Any

import torch

from silotune.models.late import import_bitsandbytes

import_bitsandbytes()  # before peft does: every run imports this module first of all that import peft
from peft.tuners.lora import Linear  # noqa: E402

MOST_VALUES = 3 << 14
"""Values of a base matrix up to which one product is the faster way (``benchmarks/narrow_lora.py``)."""
ROWS_A_RANK, VALUES_A_ROW = 8, 96
"""Rows of the batch for each rank, and values of the matrix for each row, at which adding B A to the base pays."""


class NarrowLora(Linear):
    """peft's layer with a faster way to compute its output; inputs that this way is not made for go peft's own way."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        name = self._single()
        if args or kwargs or name is None or not self._is_fit(name, x):
            given: torch.Tensor = super().forward(x, *args, **kwargs)
            return given
        base, a, b = self._parts(name)
        made: torch.Tensor = MergedLinear.apply(x, base.weight, a.weight, b.weight, self.scaling[name])
        return made if base.bias is None else made + base.bias

    def _parts(self, name: str) -> tuple[Any, Any, Any]:
        return self.base_layer, self.lora_A[name], self.lora_B[name]

    def _single(self) -> str | None:
        """The one active adapter; None where it is merged, switched off, one of several, or more than plain LoRA."""
        at_work = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = len(at_work) == 1 and not (self.merged or self.disable_adapters or at_work[0] in self.lora_variant)
        return at_work[0] if is_plain else None

    def _is_fit(self, name: str, x: torch.Tensor) -> bool:
        """Whether this batch is of the right kind and size, and no hook is set on the layer's parts."""
        parts = self._parts(name)
        base, a, _ = parts
        dropout = self.lora_dropout[name]
        return (
            x.device.type == "cpu"
            and x.dtype == a.weight.dtype == torch.float32
            and is_worth_it(x.numel() // x.shape[-1], base.weight.numel(), len(a.weight))
            and (isinstance(dropout, torch.nn.Identity) or not dropout.training)
            and not torch.is_autocast_enabled("cpu")
            and not any(_is_watched(part) for part in parts)
        )


def _is_watched(part: torch.nn.Module) -> bool:
    forward, backward = part._forward_hooks or part._forward_pre_hooks, part._backward_hooks or part._backward_pre_hooks
    return bool(forward or backward)


def is_worth_it(rows: int, values: int, rank: int) -> bool:
    """Whether one product is the faster way for so many rows of a batch and values of the base matrix."""
    return values <= MOST_VALUES and rows >= ROWS_A_RANK * rank and rows * VALUES_A_ROW >= values


def use_for_narrow_layers(model: torch.nn.Module) -> None:
    """Lets all plain LoRA layers of a peft model that are narrow enough, in float32, multiply once."""
    for module in model.modules():
        if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear:
            continue
        weight = module.base_layer.weight
        biased = any(part.bias is not None for part in module.lora_B.values())
        if weight.dtype == torch.float32 and weight.numel() <= MOST_VALUES and not (biased or weight.requires_grad):
            module.__class__ = NarrowLora


def leave_narrow_layers(model: torch.nn.Module) -> None:
    """Gives the layers of a peft model peft's own way back."""
    for module in model.modules():
        if type(module) is NarrowLora:
            module.__class__ = Linear  # type: ignore[assignment]  # the wider class


def rows_for_one(model: torch.nn.Module) -> int:
    """Rows of a batch from which at least one layer of a model multiplies once; 0 where none ever does."""
    layers: list[Any] = [module for module in model.modules() if type(module) is NarrowLora]
    needed = [
        max(ROWS_A_RANK * len(part.weight), -(-layer.base_layer.weight.numel() // VALUES_A_ROW))
        for layer in layers
        for part in layer.lora_A.values()
    ]
    return min(needed, default=0)


class MergedLinear(torch.autograd.Function):
    """x (W + s B A)' for x [..., in], fixed W [out, in], A [rank, in], B [out, rank].

    The sum is made anew for the backward pass, so that only what was given is kept, and gradients of gradients exist.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return torch.nn.functional.linear(x, torch.addmm(weight, b, a, alpha=scale))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ torch.addmm(weight, b, a, alpha=ctx.scale)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            whole = gradient.flatten(0, -2).mT @ x.flatten(0, -2) * ctx.scale  # [out, in]
            of_a = b.mT @ whole if ctx.needs_input_grad[2] else None
            of_b = whole @ a.mT if ctx.needs_input_grad[3] else None
        return of_x, None, of_a, of_b, None
