from __future__ import annotations

import pytest
import torch

from silotune import lora
from silotune.errors import ConfigError
from silotune.methods.ranks import client_ranks, largest_rank

ADAPTER = {"m" + lora.A: torch.zeros(8, 60), "m" + lora.B: torch.zeros(40, 8), "head.weight": torch.zeros(10, 10)}


def test_by_hand() -> None:
    """100 values of head and 100 a rank."""
    assert [largest_rank(ADAPTER, most_values=values) for values in (400, 399, 1e9, 0)] == [3, 2, 8, 0]


def ranks(said: dict[str, int], memory_mb: dict[str, float], values: dict[str, int], bytes_a_value: int = 16) -> dict:
    return client_ranks(ADAPTER, said, memory_mb=memory_mb, most_values=values, bytes_a_value=bytes_a_value)


def test_said_and_measured_and_allowed() -> None:
    """16 bytes a value: rank 3 takes 6,400 bytes; with sgd 12 bytes, 4,800."""
    assert ranks({"a": 5}, {"b": 0.0064}, {"c": 399}) == {"a": 5, "b": 3, "c": 2}
    assert ranks({}, {"b": 0.006399}, {}) == {"b": 2} and ranks({}, {"b": 0.0048}, {}, 12) == {"b": 3}
    with pytest.raises(ConfigError, match="'b' do not hold an adapter of rank 1"):
        ranks({}, {"b": 0.0001}, {})
    with pytest.raises(ConfigError, match="'c' allows an adapter of 199 values, which rank 1 exceeds"):
        ranks({}, {}, {"c": 199})


def test_fused_experts_are_whole_at_every_rank() -> None:
    name = "layers.0.mlp.experts.base_layer"
    experts = {f"{name}{lora.A}": torch.zeros(32, 6), f"{name}{lora.B}": torch.zeros(5, 32)}
    both = {f"q{lora.A}": torch.zeros(8, 6), f"q{lora.B}": torch.zeros(4, 8), **experts}
    assert lora.rank_of(both) == 8 and lora.rank_of(experts) is None
    assert lora.modules(both) == ["q"]
    cut = lora.cut(both, 2)
    assert cut[f"q{lora.A}"].shape == (2, 6) and cut[f"{name}{lora.A}"].shape == (32, 6)
    assert {key: tensor.shape for key, tensor in lora.padded(cut, 8).items()} == {
        key: tensor.shape for key, tensor in both.items()
    }
    assert largest_rank(both, most_values=11 * 32 + 3 * 10) == 3
    assert largest_rank(experts, most_values=10**6) == 0
