"""Names, shapes and products of LoRA's tensors: B [out, rank] times A [rank, in] is what a module adds to its base.

Beside the two factors a module may have a residual pair of any rank, which no client trains (FedEx-LoRA, FLoRA), or
a core R [rank, rank] that stands between two fixed factors (LoRA-SB).

A mixture of experts may keep the weights of all its experts in one tensor. peft stacks their factors,
A [experts x rank, in] and B [out, rank x experts], so that neither a rank nor a product can be read off their shapes:
such pairs are trained, sent and averaged factor by factor, always whole.
"""

from __future__ import annotations

import torch

from silotune.structs import Tensors

EXPERTS, WRAPPED = ".experts", ".base_layer"
"""What the name of a module with fused experts ends with; peft puts one layer around it for each tensor adapted."""
A, B, CORE = ".lora_A.weight", ".lora_B.weight", ".lora_R.weight"
RESIDUAL_A, RESIDUAL_B = ".lora_residual_A.weight", ".lora_residual_B.weight"


def is_a(name: str) -> bool:
    """Whether a tensor is a module's A."""
    return name.endswith(A)


def is_b(name: str) -> bool:
    """Whether a tensor is a module's B."""
    return name.endswith(B)


def is_residual(name: str) -> bool:
    """Whether a tensor is a factor of a module's residual."""
    return name.endswith((RESIDUAL_A, RESIDUAL_B))


def is_of_experts(name: str) -> bool:
    """Whether a tensor is a factor of weights that hold several experts of a mixture."""
    if not name.endswith((A, B)):
        return False
    module = name.removesuffix(A).removesuffix(B)
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    return module.endswith(EXPERTS)


def modules(tensors: Tensors) -> list[str]:
    """Names of the linear layers of which both factors are there, in the tensors' order."""
    return [name[: -len(A)] for name in tensors if is_a(name) and _has_rank(name) and name[: -len(A)] + B in tensors]


def residuals(tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> its residual (B [out, any], A [any, in])."""
    names = [name[: -len(RESIDUAL_A)] for name in tensors if name.endswith(RESIDUAL_A)]
    return {name: (tensors[name + RESIDUAL_B], tensors[name + RESIDUAL_A]) for name in names}


def without_residuals(tensors: Tensors) -> Tensors:
    """The tensors that a client trains or keeps: all but the residuals."""
    return {name: tensor for name, tensor in tensors.items() if not is_residual(name)}


def rank_of(tensors: Tensors) -> int | None:
    """The rank of the factors, which all linear layers share; None where there are no such factors."""
    found = [tensor.shape[0] if is_a(name) else tensor.shape[1] for name, tensor in tensors.items() if _has_rank(name)]
    return max(found, default=None)


def cut(tensors: Tensors, rank: int | None) -> Tensors:
    """The factors' first ``rank`` rows of A and columns of B, other tensors as they are; None cuts nothing."""
    if rank is None:
        return dict(tensors)
    return {
        name: (tensor[:rank] if is_a(name) else tensor[:, :rank]).contiguous() if _has_rank(name) else tensor
        for name, tensor in tensors.items()
    }


def padded(tensors: Tensors, rank: int | None) -> Tensors:
    """The factors filled up with zeros to ``rank``, other tensors as they are; None fills nothing up.

    Where a row of A and the same column of B are both zero, neither has a gradient: what is filled up stays zero.
    """
    if rank is None:
        return dict(tensors)
    return {
        name: _padded(tensor, rank, dim=0 if is_a(name) else 1) if _has_rank(name) else tensor
        for name, tensor in tensors.items()
    }


def compressed(
    b: torch.Tensor, a: torch.Tensor, *, rank: int | None = None, floor: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product b a as the shortest pair of equally large factors, by a singular value decomposition in float64.

    Args:
        b: [out, any].
        a: [any, in].
        rank: Singular values to keep, the largest ones (Eckart and Young 1936); None for all above ``floor``.
        floor: Singular values up to it are left out.

    Returns:
        B [out, kept] and A [kept, in] in float64; the product itself is never formed.
    """
    left, left_rest = torch.linalg.qr(b.double())  # [out, m], [m, any]
    right, right_rest = torch.linalg.qr(a.double().mT)  # [in, n], [n, any]
    u, values, v = torch.linalg.svd(left_rest @ right_rest.mT, full_matrices=False)
    kept = min(int((values > floor).sum()), values.numel() if rank is None else rank)
    roots = values[:kept].sqrt()
    return left @ (u[:, :kept] * roots), (roots[:, None] * v[:kept]) @ right.mT


def _has_rank(name: str) -> bool:
    """Whether a tensor is a factor whose rows or columns are the adapter's rank."""
    return name.endswith((A, B)) and not is_of_experts(name)


def _padded(tensor: torch.Tensor, rank: int, *, dim: int) -> torch.Tensor:
    lacking = rank - tensor.shape[dim]
    if lacking <= 0:
        return tensor
    shape = [lacking if place == dim else size for place, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
