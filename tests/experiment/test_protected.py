"""A whole experiment under protection: the same result as in the clear, no client's own figures in the folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from silotune.config import Config
from silotune.experiment.run import run_experiment

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize("protection", ["secure_sum", "he"])
def test_a_protected_experiment(configuration: Callable[..., Config], protection: str) -> None:
    told: list[tuple[str, Any]] = []
    settings = {"protection": {"type": protection, **({"max_examples": 64} if protection == "secure_sum" else {})}}
    with_baselines = {"federation": {"modes": ["federated", "centralized", "isolated"]}}
    hidden = run_experiment(
        configuration(privacy=settings, **with_baselines),
        observer=lambda event, fields: told.append((event, dict(fields))),
    )
    again = run_experiment(configuration(privacy=settings))
    clear = run_experiment(configuration(**with_baselines))
    weights = [run.part("federated").load_adapter()[0] for run in (hidden, again, clear)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        torch.testing.assert_close(tensor, weights[2][name], rtol=0, atol=1e-3)
    for part in (("centralized",), ("isolated", "client-0")):  # where nothing travels, nothing is hidden
        tiny.assert_same_bits(*(run.part(*part).load_adapter()[0] for run in (hidden, clear)))
    assert {row["client"] for row in hidden.part("federated").read_rows("clients")} == {"(sum)"}
    assert [fields["statement"][0] for event, fields in told if event == "privacy"][-1].startswith(
        "in a round the coordinator"
    )
    card = (hidden.part("federated").path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "In a round the coordinator sees" in card
    summaries = [run.read_json("summary")["federated"] for run in (hidden, clear)]
    assert summaries[0]["cost"]["tokens"] == summaries[1]["cost"]["tokens"]
    assert 0 < summaries[1]["bytes_up"] < summaries[0]["bytes_up"]
