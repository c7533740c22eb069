"""Attention over short texts on a CPU, for training: the same numbers as torch's kernel, sooner.

torch's flash kernel for CPUs computes the scores anew in its backward pass, and wants the keys and values of grouped
heads (Ainslie et al. 2023, arXiv 2305.13245) repeated for every head. Over up to `LONGEST` keys it is faster to keep
the weights, to fold the heads of a group into the queries, and to take plain batched products, a few examples at a time
so that scores stay in the cache. Where each head is a group of its own, torch's kernel is as fast and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

NAME = "silotune"
"""The name of this attention in transformers; inputs that it is not made for go to ``sdpa``."""
LONGEST = 256
"""The most keys that it is used for: above, torch's kernel is faster (``benchmarks/attention.py``)."""
MOST_WEIGHTS = 1 << 22
"""The most attention weights of one layer that it keeps, 16 MiB."""
AT_ONCE = 1 << 19
"""Attention weights that are worked on at a time, 2 MiB: few enough for the cache of a core."""
NARROW = 8
"""Width of a head up to which products with the head's width first are the faster ones."""
_SPECIAL = ("position_bias", "cache", "softcap", "s_aux", "head_mask")


def can_use(model: Any) -> bool:
    """Whether a model's attention is ``sdpa`` and can be replaced: some architectures write theirs out in code."""
    return bool(model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation())


def use_for_short_texts(model: Any) -> None:
    """Gives a model on the CPU this attention in place of ``sdpa``; any other that it has stays."""
    if not can_use(model):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def leave_short_texts(model: Any) -> None:
    """Gives a model ``sdpa`` back where it has this attention; any other stays."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers.

    Args:
        module: The attention layer.
        query: [examples, heads, queries, width].
        key: [examples, groups, keys, width].
        value: As ``key``.
        attention_mask: Additive, or True where a query sees a key: [examples or 1, 1, queries, keys]; None for causal
            attention, or for all keys where the layer is not causal.
        **given: ``scaling``, ``dropout``, ``is_causal``, and what only some architectures have.

    Returns:
        [examples, queries, heads, width], and no weights.
    """
    is_special = any(given.get(name) is not None for name in _SPECIAL)
    if is_special or given.get("dropout") or not is_short(query, key, value, attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        made, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return made, None
    causal, scale = given.get("is_causal"), given.get("scaling")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    short: torch.Tensor = ShortAttention.apply(
        query, key, value, _additive(attention_mask, query, key, causal=causal), scale
    )
    return short.transpose(1, 2).contiguous(), None


def is_short(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `ShortAttention` is made for these tensors, and gradients through them are wanted."""
    examples, heads, queries, width = query.shape
    keys = key.shape[2]
    return (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and key.shape == value.shape
        and (key.shape[1] < heads or width <= NARROW)
        and keys <= LONGEST
        and examples * heads * queries * keys <= MOST_WEIGHTS
        and (mask is None or (mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == keys))
    )


def _additive(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, *, causal: bool
) -> torch.Tensor | None:
    """What is added to the scores [examples, 1, queries, keys]; None where every query sees every key."""
    (examples, _, queries, _), keys = query.shape, key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]  # as torch counts: from the first key
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(mask.logical_not(), torch.finfo(torch.float32).min)
    return mask.expand(examples, 1, queries, keys)


class ShortAttention(torch.autograd.Function):
    """softmax(scale Q K' + mask) V, a few examples at a time; heads of a group are further queries of its keys."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        examples, heads, queries, width = query.shape
        groups, keys = key.shape[1:3]
        folded = (query * scale).reshape(examples, groups, -1, width).contiguous()  # queries of all heads in a group
        weights = query.new_empty(examples, groups, folded.shape[2], keys)
        made = torch.empty_like(folded)
        for part in _parts(weights):
            scores = weights[part]
            at_once = scores.flatten(0, 1)
            torch.bmm(folded[part].flatten(0, 1), key[part].flatten(0, 1).mT, out=at_once)
            if mask is not None:
                scores.view(len(scores), groups, -1, queries, keys).add_(mask[part, None])
            torch.softmax(at_once, -1, out=at_once)
            _product(at_once, value[part].flatten(0, 1), out=made[part].flatten(0, 1))
        ctx.save_for_backward(folded, key, value, weights)
        ctx.scale = scale
        return made.view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded, key, value, weights = ctx.saved_tensors
        along = gradient.reshape(folded.shape)
        of_query, of_key, of_value = torch.empty_like(folded), key.new_empty(key.shape), value.new_empty(value.shape)
        for part in _parts(weights):
            given, own, keys, values = (each[part].flatten(0, 1) for each in (weights, along, key, value))
            _product(given.mT, own, out=of_value[part].flatten(0, 1))
            of_weights = torch.bmm(own, values.mT)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, given, -1, torch.float32)
            _product(of_scores.mT, folded[part].flatten(0, 1), out=of_key[part].flatten(0, 1))
            _product(of_scores, keys, out=of_query[part].flatten(0, 1))
        return of_query.mul_(ctx.scale).view(gradient.shape), of_key, of_value, None, None


def _parts(weights: torch.Tensor) -> Iterator[slice]:
    """Examples that are taken at once: as many as have `AT_ONCE` weights."""
    step = max(1, AT_ONCE // weights[0].numel())
    for start in range(0, len(weights), step):
        yield slice(start, start + step)


def _product(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """left [groups, n, m] times right [groups, m, width] into ``out``."""
    if right.shape[-1] > NARROW:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(right.mT, left.mT).mT)
