"""The settings of split training: where the model is cut, who trains, and how what crosses the cut is sent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from silotune.settings.base import Positive, Section

Crossed = Literal["none", "bf16", "int8", "int4"]
SplitSchedule = Literal["serial", "client-batch", "hierarchical"]


class SplitSection(Section):
    """Where clients and the compute server part the model's blocks, and how they train it together (docs/split.md)."""

    first: Positive = Field(1, description="blocks behind the embedding that stay with the clients")
    last: Positive = Field(1, description="blocks before the head that stay with the clients")
    train: Literal["both", "server"] = Field(
        "both", description="whose adapter tensors train: the clients' and the server's, or the server's alone"
    )
    schedule: SplitSchedule = Field(
        "serial",
        description="serial: client after client on one server part; client-batch: the clients' batches in one pass of "
        "the server; hierarchical: a server part for each client, averaged each round",
    )
    compress: Crossed = Field(
        "int8", description="of activations and gradients; none is exact, int8 and int4 have a scale for each token"
    )
