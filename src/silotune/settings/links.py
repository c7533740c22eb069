"""The settings of the links between coordinator and clients: compression, and a simulated clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from silotune.settings.base import Fraction, Needs, Positive, Section

Reduction = Literal["all", "top-k", "low-rank"]
ValueFormat = Literal["float32", "bfloat16", "float16", "int8", "int4", "sign"]


class CompressionSection(Section):
    """How the tensors of messages are made smaller on their way to the coordinator."""

    depends = {
        "share": Needs("keep", ("top-k",)),
        "rank": Needs("keep", ("low-rank",)),
        "block": Needs("values", ("int8", "int4", "sign")),
    }

    keep: Reduction = Field("all", description="top-k: the largest values; low-rank: factors of each matrix")
    share: Fraction = Field(0.1, description="of top-k: share of the values that is sent")
    rank: Positive = Field(1, description="of low-rank: rank of each matrix that is sent")
    values: ValueFormat = Field(
        "float32", description="of what is sent; int8 and int4 round at random without bias, sign is one bit a value"
    )
    block: Positive = Field(64, description="of int8, int4 and sign: values that share a scale of two bytes")
    zstd: Annotated[int, Field(ge=0, le=22)] = Field(
        0, description="level of Zstandard for the rest, with silotune[zstd]; 0 for none"
    )


class DownloadSection(CompressionSection):
    """How the tensors of messages are made smaller on their way to the clients."""

    delta: bool = Field(False, description="send the change to what a client received last, where it has that")


class PaceSection(Section):
    """One client's machine and line."""

    speed: Annotated[float, Field(gt=0)] | None = Field(
        None, description="how many times as fast its steps are as those of a client with speed 1"
    )
    upload: Annotated[float, Field(gt=0)] | None = Field(None, description="bytes a second to the coordinator")
    download: Annotated[float, Field(gt=0)] | None = Field(None, description="bytes a second from it")
    available: tuple[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], ...] = Field(
        (), description="stretches [from, to] in seconds of each period in which it works, ascending; default: always"
    )

    @model_validator(mode="after")
    def _ascending(self) -> PaceSection:
        edges = [edge for stretch in self.available for edge in stretch]
        if edges != sorted(edges) or any(begin == end for begin, end in self.available):
            raise ValueError(f"available = {self.available} must be stretches [from, to] that ascend")
        return self


class ClockSection(Section):
    """A simulated clock over the clients of one process: how long rounds take, and which replies they wait for."""

    depends = {"staleness_exponent": Needs("buffer")}

    seconds_per_step: Annotated[float, Field(gt=0)] = Field(1.0, description="of a client with speed 1")
    speed_spread: Annotated[float, Field(ge=0)] = Field(
        0.0, description="clients without a speed get one by the seed: standard deviation of its logarithm"
    )
    upload: Annotated[float, Field(gt=0)] = Field(1.25e6, description="bytes a second, where a client has none")
    download: Annotated[float, Field(gt=0)] = Field(1.25e7, description="bytes a second, where a client has none")
    latency_seconds: Annotated[float, Field(ge=0)] = Field(0.05, description="of a message, each way")
    period_seconds: Annotated[float, Field(gt=0)] = Field(86400.0, description="after which availability repeats")
    clients: dict[str, PaceSection] = Field({}, description="client name -> its machine and line")
    trace: Path | None = Field(
        None, description="CSV with such rows: client, speed, upload, download, available_from, available_to"
    )
    deadline_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of a round; replies that come later are discarded"
    )
    over_sampling: Annotated[float, Field(ge=1)] = Field(
        1.0, description="ask this many times clients_per_round clients; the first clients_per_round replies count"
    )
    buffer: Positive | None = Field(
        None,
        description="asynchronous rounds (FedBuff): a round ends with this many replies, the other clients work on",
    )
    staleness_exponent: Annotated[float, Field(ge=0)] = Field(
        0.5, description="of buffer: an update that is s rounds late is scaled by (1 + s)^-exponent"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> ClockSection:
        if self.buffer is not None and (self.deadline_seconds is not None or self.over_sampling > 1):
            raise ValueError(
                "federation.clock.buffer makes rounds asynchronous: leave deadline_seconds and over_sampling out"
            )
        for name, pace in self.clients.items():
            if pace.available and pace.available[-1][1] > self.period_seconds:
                raise ValueError(
                    f"federation.clock.clients.{name}.available ends after period_seconds = {self.period_seconds:g}"
                )
        return self
