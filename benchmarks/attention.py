"""Attention over short texts on one core: silotune's batched products beside torch's kernel, forward and backward.

    python benchmarks/attention.py --markdown

Both get an explicit mask, and torch's kernel gets keys and values as transformers repeats them for it. A row without a
bound is a shape that silotune leaves to torch. Ends with code 1 when a shape that it takes itself is not faster.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from measure import Result, in_turn, of_shapes, speed_up

from silotune.models.fast import attention

SHAPES = (
    ("stories260K behind an instruction", 16, 8, 4, 72, 215, 8),
    ("SmolLM, short prompts", 16, 9, 3, 60, 60, 64),
    ("TinyLlama, short prompts", 4, 32, 4, 100, 100, 64),
    ("Llama 3.2, short prompts", 4, 32, 8, 100, 100, 64),
    ("Qwen 2.5, behind an instruction", 4, 14, 2, 60, 200, 64),
    ("heads of 128", 4, 32, 8, 100, 100, 128),
    ("at the limit of keys", 2, 9, 3, 256, 256, 64),
    ("nano: a head a group", 16, 6, 6, 64, 64, 48),
)
"""Examples, heads, groups, queries, keys, width of a head."""
REPETITIONS = 25


def compared(name: str, *sizes: int) -> Result:
    """One shape: processor seconds of both, taken in turn."""
    examples, heads, groups, queries, keys, width = sizes
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(examples, queries, heads, width, generator=draw).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(examples, groups, keys, width, generator=draw).requires_grad_() for _ in range(2))
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(examples, 1, queries, keys)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=heads // groups)
    along = torch.randn(examples, queries, heads, width, generator=draw)

    def theirs() -> tuple[torch.Tensor, ...]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        made, _ = sdpa_attention_forward(module, query, key, value, mask)
        return torch.autograd.grad(made, (query, key, value), along)

    def own() -> tuple[torch.Tensor, ...]:
        short = attention.ShortAttention.apply(query, key, value, mask, width**-0.5).transpose(1, 2).contiguous()
        return torch.autograd.grad(short, (query, key, value), along)

    for left, right in zip(theirs(), own(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    times = in_turn(theirs, own, repetitions=REPETITIONS)
    bound = 1.0 if attention.is_short(query, key, value, mask) else None
    what = f"{name}: {examples} x {heads} heads in {groups} groups, {queries} queries, {keys} keys, width {width}"
    return Result("attention", what, *times, speed_up(*times), bound)


if __name__ == "__main__":
    sys.exit(of_shapes(__doc__, lambda: [compared(*shape) for shape in SHAPES]))
