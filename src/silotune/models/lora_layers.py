"""What peft's LoRA layers lack for federated rules: a residual beside the adapter, a core between its factors.

LoRA-SB (Ponkshe et al. 2025, arXiv 2411.19557; federated: Singhal et al. 2025, Fed-SB, arXiv 2502.15436): W + s B R A
where R alone is trained. B and A are orthonormal and drawn from the run's seed, R begins at zero; the paper draws them
from a gradient on examples, which would tell others about the examples of one institution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils import parametrize

from silotune import lora
from silotune.errors import MessageError, ModelError
from silotune.structs import Tensors

ADAPTER = "default"
_RESIDUAL = "silotune_residual"
_CORE_AS_SAVED = f".lora_B.{ADAPTER}.parametrizations.weight.original"


def set_residuals(model: torch.nn.Module, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Gives LoRA layers their residuals (module -> B [out, any], A [any, in]) and takes those of all others away.

    A layer's output gains scale * B A x, as if the base's weight held it: an int4 base can have one too.

    Raises:
        MessageError: A module is no LoRA layer, or a shape does not fit it.
    """
    left = set(pairs)
    for name, layer in _layers(model):
        left.discard(name)
        if name not in pairs:
            if getattr(layer, _RESIDUAL, None) is not None:
                setattr(layer, _RESIDUAL, None)
            continue
        b, a = pairs[name]
        if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features) or b.shape[1] != a.shape[0]:
            raise MessageError(
                f"the residual of {name!r} has shapes {tuple(b.shape)}, {tuple(a.shape)}: not the layer's"
            )
        like = layer.lora_A[ADAPTER].weight
        if not hasattr(layer, _RESIDUAL):
            layer.register_forward_hook(_with_residual)
        setattr(layer, _RESIDUAL, (b.to(like), a.to(like)))
    if left:
        raise MessageError(f"{min(left)!r} has a residual, but the model has no such LoRA layer")


def residuals_of(model: torch.nn.Module) -> Tensors:
    """The residuals that the layers have now, by their names among a global model's tensors."""
    found: Tensors = {}
    for name, layer in _layers(model):
        pair = getattr(layer, _RESIDUAL, None)
        if pair is not None:
            found |= {name + lora.RESIDUAL_B: pair[0], name + lora.RESIDUAL_A: pair[1]}
    return found


def _with_residual(layer: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    pair = getattr(layer, _RESIDUAL)
    if pair is None or layer.disable_adapters:
        return output
    b, a = pair
    linear = torch.nn.functional.linear
    added = linear(linear(inputs[0].to(a.dtype), a), b) * layer.scaling[ADAPTER]  # [..., out]
    return output + added.to(output.dtype)


class _Core(torch.nn.Module):
    """B's weight as the product of a fixed matrix [out, rank] and the trained core [rank, rank]."""

    fixed: torch.Tensor

    def __init__(self, fixed: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed)

    def forward(self, core: torch.Tensor) -> torch.Tensor:
        return self.fixed @ core

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The first core: zero, so that a fresh adapter changes nothing."""
        return weight.new_zeros(weight.shape[1], weight.shape[1])


def add_cores(model: torch.nn.Module) -> None:
    """Fixes both factors of every LoRA layer at orthonormal values, drawn from torch's generator, and trains a core.

    Raises:
        ModelError: The rank exceeds a layer's width.
    """
    for name, layer in _layers(model):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if a.shape[0] > min(layer.out_features, layer.in_features):
            raise ModelError(
                f"adapter.rank = {a.shape[0]} exceeds the width of {name!r}, which federation.lora = 'sb' needs"
            )
        with torch.no_grad():
            a.copy_(_orthonormal(a.mT.shape).mT)
        a.requires_grad_(False)
        fixed = _orthonormal(b.shape).to(b)
        parametrize.register_parametrization(layer.lora_B[ADAPTER], "weight", _Core(fixed))


def trained_name(saved: str) -> str:
    """The name of a trained tensor, from the one that it has in peft's state: a core is called ``lora_R``."""
    return saved.removesuffix(_CORE_AS_SAVED) + lora.CORE if saved.endswith(_CORE_AS_SAVED) else saved


def num_frozen(model: torch.nn.Module) -> int:
    """Values of an adapter's layers that are not trained."""
    return sum(
        parameter.numel() for _, layer in _layers(model) for parameter in layer.lora_A.parameters()
        if not parameter.requires_grad
    )  # fmt: skip


def as_plain_lora(
    model: torch.nn.Module, tensors: Tensors, config: Mapping[str, Any]
) -> tuple[Tensors, dict[str, Any]]:
    """Adapter tensors and ``adapter_config.json`` that plain peft loads, of the same function.

    A residual becomes further columns of B and rows of A (those of all modules filled up to one rank, alpha raised so
    that the scale stays); a core is multiplied into B. Tensors without either come back as they are.
    """
    result = {name: tensor for name, tensor in tensors.items() if not lora.is_residual(name)}
    for name in [name for name in result if name.endswith(lora.CORE)]:
        module = name.removesuffix(lora.CORE)
        layer: Any = model.get_submodule(module)
        fixed = layer.lora_B[ADAPTER].parametrizations.weight[0].fixed
        result[module + lora.A] = layer.lora_A[ADAPTER].weight.detach().to("cpu", copy=True)
        result[module + lora.B] = fixed.cpu() @ result.pop(name)
    pairs = lora.residuals(tensors)
    if not pairs:
        return result, dict(config)
    rank = int(config["r"])
    for module, (b, a) in pairs.items():
        result[module + lora.B] = torch.cat([result[module + lora.B], b], dim=1)
        result[module + lora.A] = torch.cat([result[module + lora.A], a])
    longest = lora.rank_of(result) or rank
    factor = math.sqrt(longest / rank) if config["use_rslora"] else longest / rank
    return lora.padded(result, longest), {**config, "r": longest, "lora_alpha": config["lora_alpha"] * factor}


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's LoRA layers around linear ones, by name."""
    from peft.tuners.lora import ParamWrapper

    for name, module in model.named_modules():
        if ADAPTER in getattr(module, "lora_A", {}) and not isinstance(module, ParamWrapper):
            yield name, module


def _orthonormal(shape: torch.Size) -> torch.Tensor:
    """A matrix [many, few] with orthonormal columns, of one sign convention."""
    q, r = torch.linalg.qr(torch.randn(shape))
    return q * r.diagonal().sign()
