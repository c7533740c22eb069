"""The meter of a run: what this machine spends on it, and whether anybody can meter what its budget bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from silotune.config import Config
from silotune.errors import ConfigError
from silotune.models.load import pick_device
from silotune.record.cost import Meter
from silotune.record.energy import open_gauge


@contextmanager
def metered(config: Config) -> Iterator[Meter]:
    """A meter for the run; its gauge opens while the model is loaded."""
    device = pick_device(config.model.device)
    gpu = (device.index or 0) if device.type == "cuda" else None
    gauge = open_gauge(config.record.country, is_wanted=config.record.energy, gpu=gpu)
    try:
        yield Meter(gauge)
    finally:
        gauge.close()


def check_budget(config: Config, meter: Meter) -> None:
    """A budget of joules that nobody meters would never be reached.

    Raises:
        ConfigError: There is no meter.
    """
    if config.federation.budget.joules is not None and meter.gauge.source() == "unavailable":
        raise ConfigError(
            "federation.budget.joules needs a meter: pip install 'silotune[energy]', and leave record.energy on"
        )
