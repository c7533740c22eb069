"""What a method adds to a gradient, on whatever device the model is."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from silotune.methods.corrections import Corrector, control_variates, dynamic_regulariser, towards, towards_received

KEPT = {"w": torch.tensor([1.0, 2.0])}
WAYS = {
    "fedprox": towards_received(0.1),
    "scaffold": control_variates("II"),
    "feddyn": dynamic_regulariser(0.1),
    "ditto": towards(0.1)(KEPT),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_a_client_keeps_in_main_memory_goes_to_the_model_s_device(way: Corrector) -> None:
    """Fake tensors have a device and no values, and refuse to mix devices as real ones do: no GPU is needed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {"w": torch.ones(2, device="cuda")}
        received = {"w": torch.zeros(2, device="cuda")}
        term = way.begin(KEPT, {"w": torch.zeros(2)})(weights, received)
        assert term["w"].device.type == "cuda"
    here = way.begin(KEPT, {"w": torch.zeros(2)})({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    assert here["w"].tolist() == pytest.approx(
        {"fedprox": [0.1, 0.1], "scaffold": [-1.0, -2.0], "feddyn": [-0.9, -1.9], "ditto": [0.0, -0.1]}[
            next(name for name, own in WAYS.items() if own is way)
        ]
    )
