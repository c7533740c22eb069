"""Replies of one round as they come in: what a late one weighs."""

from __future__ import annotations

import torch

from silotune.federation.coordinator.replies import Incoming
from silotune.federation.wire.messages import TrainReport
from silotune.structs import Reply

REPORT = {"num_examples": 5, "loss": 0.25, "steps": 2, "tokens": 90, "seconds": 0.1}


def test_a_late_update_shrinks_and_the_change_of_its_control_does_not() -> None:
    sent = {"w": torch.tensor([2.0]), "control/w": torch.tensor([1.0])}
    incoming = Incoming(4, ("late", "prompt"), staleness_exponent=0.5)
    read = TrainReport(**REPORT)
    replies = [Reply("train", 1, "late", sent, REPORT, read=read), Reply("train", 4, "prompt", sent, REPORT, read=read)]
    late, prompt = incoming.updates(iter(replies), lambda name, fields: None)
    assert {name: float(tensor) for name, tensor in late.delta.items()} == {"w": 1.0, "control/w": 1.0}
    assert {name: float(tensor) for name, tensor in prompt.delta.items()} == {"w": 2.0, "control/w": 1.0}
    assert [row["staleness"] for row in incoming.rows] == [3, 0]
