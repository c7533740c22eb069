"""LoRA's rank by client: as the configuration says, or as large as its memory or its policy allows."""

from __future__ import annotations

from collections.abc import Mapping

from silotune import lora
from silotune.errors import ConfigError
from silotune.structs import Tensors

MEGABYTE = 1_000_000


def largest_rank(adapter: Tensors, *, most_values: float) -> int:
    """The largest rank, up to the adapter's own, at which it has so many values at most; 0 where rank 1 has more.

    Args:
        adapter: The adapter at its full rank.
        most_values: Trained values that are allowed.
    """
    full = lora.rank_of(adapter)
    if full is None:
        return 0
    sizes = {rank: sum(tensor.numel() for tensor in lora.cut(adapter, rank).values()) for rank in (0, 1)}
    return max(0, min(full, int((most_values - sizes[0]) // (sizes[1] - sizes[0]))))


def client_ranks(
    adapter: Tensors,
    ranks: Mapping[str, int],
    *,
    memory_mb: Mapping[str, float],
    most_values: Mapping[str, int],
    bytes_a_value: int,
) -> dict[str, int]:
    """The rank of every client that has one of its own.

    Args:
        adapter: The adapter at its full rank.
        ranks: Client -> its rank.
        memory_mb: Client -> megabytes that weights, gradients and moments of its adapter may take together.
        most_values: Client -> values that its policy allows an adapter to have.
        bytes_a_value: Of a trained value: itself, its gradient, and the optimiser's moments.

    Raises:
        ConfigError: A client's memory or policy does not allow rank 1.
    """
    found = dict(ranks)
    for name, megabytes in memory_mb.items():
        found[name] = largest_rank(adapter, most_values=MEGABYTE * megabytes / bytes_a_value)
        if found[name] < 1:
            raise ConfigError(
                f"federation.memory_mb: {megabytes:g} MB of {name!r} do not hold an adapter of rank 1 while it trains; "
                "give it more, or aim adapter.targets at fewer modules"
            )
    for name, values in most_values.items():
        found[name] = largest_rank(adapter, most_values=values)
        if found[name] < 1:
            raise ConfigError(
                f"federation.policies: {name!r} allows an adapter of {values} values, which rank 1 exceeds; aim "
                "adapter.targets at fewer modules, or ask for largest_adapter to be raised"
            )
    return found
