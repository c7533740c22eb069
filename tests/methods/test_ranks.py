from __future__ import annotations

import pytest
import torch

from silotune import lora
from silotune.errors import ConfigError
from silotune.methods.ranks import client_ranks, largest_rank

ADAPTER = {"m" + lora.A: torch.zeros(8, 60), "m" + lora.B: torch.zeros(40, 8), "head.weight": torch.zeros(10, 10)}


def test_by_hand() -> None:
    """100 values of head and 100 a rank, 16 bytes each: rank 3 takes 6,400 bytes; with sgd 12 bytes, 4,800."""
    assert largest_rank(ADAPTER, memory_bytes=6400, optimizer="adamw") == 3
    assert largest_rank(ADAPTER, memory_bytes=6399, optimizer="adamw") == 2
    assert largest_rank(ADAPTER, memory_bytes=4800, optimizer="sgd") == 3
    assert largest_rank(ADAPTER, memory_bytes=1e9, optimizer="adamw") == 8
    assert largest_rank(ADAPTER, memory_bytes=0, optimizer="adamw") == 0


def test_said_and_measured() -> None:
    assert client_ranks(ADAPTER, {"a": 5}, {"b": 0.0064}, optimizer="adamw") == {"a": 5, "b": 3}
    with pytest.raises(ConfigError, match="'b' do not hold an adapter of rank 1"):
        client_ranks(ADAPTER, {}, {"b": 0.0001}, optimizer="adamw")
