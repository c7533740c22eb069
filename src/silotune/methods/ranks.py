"""LoRA's rank by client: as the configuration says, or as large as the client's memory allows."""

from __future__ import annotations

from collections.abc import Mapping

from silotune import lora
from silotune.errors import ConfigError
from silotune.structs import Tensors

MEGABYTE = 1_000_000
BYTES_A_VALUE: Mapping[str, int] = {"adamw": 16, "sgd": 12}
"""Of a trained float32 value: itself, its gradient, and the optimiser's two moments (of sgd one)."""


def largest_rank(adapter: Tensors, *, memory_bytes: float, optimizer: str) -> int:
    """The largest rank, up to the adapter's own, whose training state fits; 0 where not even rank 1 does.

    Args:
        adapter: The adapter at its full rank.
        memory_bytes: What weights, gradients and moments of the trained tensors may take together.
        optimizer: A name in ``BYTES_A_VALUE``.
    """
    full = lora.rank_of(adapter) or 0
    sizes = {rank: sum(tensor.numel() for tensor in lora.cut(adapter, rank).values()) for rank in (0, 1)}
    values = memory_bytes / BYTES_A_VALUE[optimizer]
    return max(0, min(full, int((values - sizes[0]) // (sizes[1] - sizes[0]))))


def client_ranks(
    adapter: Tensors, ranks: Mapping[str, int], memory_mb: Mapping[str, float], *, optimizer: str
) -> dict[str, int]:
    """The rank of every client that has one of its own.

    Raises:
        ConfigError: A client's memory does not hold rank 1.
    """
    found = dict(ranks)
    for name, megabytes in memory_mb.items():
        found[name] = largest_rank(adapter, memory_bytes=MEGABYTE * megabytes, optimizer=optimizer)
        if found[name] < 1:
            raise ConfigError(
                f"federation.memory_mb: {megabytes:g} MB of {name!r} do not hold an adapter of rank 1 while it trains; "
                "give it more, or aim adapter.targets at fewer modules"
            )
    return found
