"""Arithmetic on dictionaries of tensors: the only place where it is written.

All functions return new dictionaries and never change their inputs. Two operands must have the same
names and shapes; a difference raises ``MessageError`` naming the first one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

from silotune.errors import MessageError
from silotune.structs import Tensors


def check_alike(left: Tensors, right: Tensors) -> None:
    """Raises ``MessageError`` unless both hold the same names with the same shapes."""
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())[0]
        raise MessageError(f"tensor names differ: {odd!r} is on one side only")
    for name, tensor in left.items():
        if tensor.shape != right[name].shape:
            raise MessageError(f"tensor {name!r} has shape {tuple(right[name].shape)}, expected {tuple(tensor.shape)}")


def add(left: Tensors, right: Tensors) -> Tensors:
    """left + right."""
    check_alike(left, right)
    return {name: tensor + right[name] for name, tensor in left.items()}


def subtract(left: Tensors, right: Tensors) -> Tensors:
    """left - right."""
    check_alike(left, right)
    return {name: tensor - right[name] for name, tensor in left.items()}


def scale(tensors: Tensors, factor: float) -> Tensors:
    """factor * tensors."""
    return {name: tensor * factor for name, tensor in tensors.items()}


def add_scaled(left: Tensors, right: Tensors, factor: float) -> Tensors:
    """left + factor * right."""
    check_alike(left, right)
    return {name: torch.add(tensor, right[name], alpha=factor) for name, tensor in left.items()}


def combine(function: Callable[..., torch.Tensor], *operands: Tensors) -> Tensors:
    """``function`` of the tensors that have one name, for every name."""
    first, *others = operands
    for other in others:
        check_alike(first, other)
    return {name: function(tensor, *(other[name] for other in others)) for name, tensor in first.items()}


def put_under(group: str, tensors: Tensors) -> Tensors:
    """The tensors under ``group/name``."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def taken_from(group: str, tensors: Tensors) -> Tensors:
    """The tensors that ``put_under`` put into a group, under their own names; empty when there are none."""
    start = f"{group}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def without(group: str, tensors: Tensors) -> Tensors:
    """The tensors that are in no such group."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{group}/")}


def zeros_like(tensors: Tensors) -> Tensors:
    """Zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def clone(tensors: Tensors) -> Tensors:
    """Copies that share no memory with the originals."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def apart(tensors: Tensors) -> Tensors:
    """The tensors on the CPU, contiguous, no two on one storage (which safetensors refuses); copied only if needed."""
    result: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        ready = tensor.detach().cpu().contiguous()
        place = ready.untyped_storage().data_ptr()
        if place in seen:
            ready = ready.clone()
        seen.add(place)
        result[name] = ready
    return result


def norm(tensors: Tensors) -> float:
    """Euclidean norm over all values, accumulated in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def clip(tensors: Tensors, max_norm: float) -> Tensors:
    """The tensors scaled down so that their norm is at most ``max_norm``."""
    size = norm(tensors)
    return scale(tensors, max_norm / size) if size > max_norm else dict(tensors)


def flatten(tensors: Tensors) -> torch.Tensor:
    """One vector [values], names in sorted order."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)]) if tensors else torch.zeros(0)


def unflatten(vector: torch.Tensor, like: Tensors) -> Tensors:
    """The inverse of ``flatten``: shapes and dtypes are taken from ``like``."""
    expected = count(like)
    if vector.numel() != expected:
        raise MessageError(f"vector has {vector.numel()} values, expected {expected}")
    result: Tensors = {}
    start = 0
    for name in sorted(like):
        end = start + like[name].numel()
        result[name] = vector[start:end].reshape(like[name].shape).to(like[name].dtype)
        start = end
    return {name: result[name] for name in like}


def count(tensors: Tensors) -> int:
    """Number of values."""
    return sum(tensor.numel() for tensor in tensors.values())


def num_bytes(tensors: Tensors) -> int:
    """Bytes of the values in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def all_finite(tensors: Tensors) -> bool:
    """True when no value is infinite or not a number."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def same_bits(left: Tensors, right: Tensors) -> bool:
    """Whether both hold the same names with equal values."""
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def largest(tensors: Tensors) -> float:
    """The largest absolute value; 0 where there is none, NaN where a value is not a number."""
    found = [tensor.abs().amax().double() for tensor in tensors.values() if tensor.numel()]
    return float(torch.stack(found).amax()) if found else 0.0


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, names in sorted order (hexadecimal)."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
