"""Joules that this process drew, through codecarbon: RAPL and NVML counters, or else its models.

codecarbon (offline tracker, no output of its own) meters the whole machine. What is counted here is this process's
share: of each stretch of time, the share of the machine's busy CPU time that was its own; a GPU's energy in full, and
only where the run computes on it. So runs side by side add up to the machine, not to a multiple of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from silotune.errors import SilotuneError, require

EnergySource = Literal["measured", "estimated", "unavailable"]
JOULES_PER_KWH: Final = 3.6e6
COUNTERS: Final = ("intel_rapl", "windows_emi")
"""Modes of codecarbon's CPU that read an energy counter; all others are models."""
SHORTEST: Final = 0.05
"""Seconds that codecarbon lets pass between two readings at least; work that is shorter is read with what follows."""


LONGEST: Final = 60.0
"""Seconds between two readings at most: a counter that wrapped round twice in between would go unnoticed."""


class Gauge(Protocol):
    """Cumulative energy of this process."""

    def joules(self) -> float | None:
        """Joules since the gauge was opened; None where nothing can be said. Never fails."""

    def source(self) -> EnergySource:
        """Whether ``joules`` was read from counters, comes from a model at least in part, or is not there."""

    def method(self) -> str:
        """How the joules are known, in one line."""

    def co2_kg(self, joules: float | None) -> float | None:
        """Kilograms of CO2 equivalents that go with so much energy."""

    def close(self) -> None:
        """Ends all reading; may be called twice."""


@dataclass(frozen=True)
class NoGauge:
    """Energy is not metered; ``reason`` says why."""

    reason: str = "not metered"

    def joules(self) -> float | None:
        """None."""
        return None

    def source(self) -> EnergySource:
        """``unavailable``."""
        return "unavailable"

    def method(self) -> str:
        """The reason."""
        return self.reason

    def co2_kg(self, joules: float | None) -> float | None:
        """None."""
        return None

    def close(self) -> None:
        """Nothing to do."""


class Codecarbon:
    """A gauge on codecarbon's offline tracker, opened in a thread of its own: it takes a second to know the processor.

    Args:
        country: ISO 3166 code of three letters; decides the CO2 of a joule.
        gpu: Index of the CUDA device that the run computes on; None for none.
    """

    def __init__(self, country: str, *, gpu: int | None = None) -> None:
        self._country, self._gpu = country, gpu
        self._lock = threading.Lock()
        self._machine: Any = None
        self._reason = ""
        self._share = _Share()
        self._before = _Drawn()
        self._joules = 0.0
        self._ready, self._closing = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="energy", daemon=True).start()

    def _watch(self) -> None:
        self._open()
        self._ready.set()
        while self._machine is not None and not self._closing.wait(LONGEST):
            self.joules()

    def _open(self) -> None:
        try:
            self._machine = _Machine(self._country, self._gpu)
        except Exception as error:  # noqa: BLE001  # it may fail anyhow on unknown hardware; a run goes on
            known = isinstance(error, (SilotuneError, LookupError))
            self._reason = str(error) if known else f"codecarbon failed ({type(error).__name__})"
        self._share.restart()

    def joules(self) -> float | None:
        """Joules of all parts that count since the tracker was ready."""
        self._ready.wait()
        with self._lock:
            if self._machine is None:
                return None
            drawn = self._machine.read()
            if drawn != self._before:
                share = self._share.since_last()
                before, self._before = self._before, drawn
                self._joules += share * (drawn.shared - before.shared) + drawn.gpu - before.gpu
            return self._joules

    def source(self) -> EnergySource:
        """``measured`` where the processor has a counter; NVML's GPU counters always are one."""
        self._ready.wait()
        if self._machine is None:
            return "unavailable"
        return "measured" if self._machine.has_counter else "estimated"

    def method(self) -> str:
        """How the energy of each part is known."""
        self._ready.wait()
        if self._machine is None:
            return self._reason
        graphics = "" if self._gpu is None else "; GPU: its energy counter (NVML), the whole device"
        return (
            f"codecarbon {self._machine.version}: {self._machine.about}{graphics}; of the machine's energy the share "
            "of its busy CPU time that was this run's"
        )

    def co2_kg(self, joules: float | None) -> float | None:
        """Kilograms of CO2, by codecarbon's carbon intensity of the country's electricity."""
        self._ready.wait()
        if joules is None or self._machine is None or self._machine.co2_kg_per_joule is None:
            return None
        return joules * float(self._machine.co2_kg_per_joule)

    def close(self) -> None:
        """Stops all threads."""
        self._ready.wait()
        self._closing.set()
        with self._lock:
            if self._machine is not None:
                self._machine.stop()


def open_gauge(country: str, *, is_wanted: bool = True, gpu: int | None = None) -> Gauge:
    """A gauge, whatever is installed: one that says why it has no figures where codecarbon is missing or fails."""
    if not is_wanted:
        return NoGauge("switched off: record.energy = false")
    return Codecarbon(country, gpu=gpu)


def weakest(sources: Iterable[EnergySource]) -> EnergySource:
    """What a sum of figures is: measured only if every one was, unavailable if any one is."""
    order: tuple[EnergySource, ...] = ("unavailable", "estimated", "measured")
    return min(sources, key=order.index, default="unavailable")


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """Joules since the tracker started: what all processes share, and of the GPU that the run computes on."""

    shared: float = 0.0
    gpu: float = 0.0


@dataclass
class _Share:
    """The process's share of the CPU time that the machine was busy, from one reading to the next."""

    own: float = 0.0
    busy: float = 0.0
    last: float = 1.0

    def restart(self) -> None:
        """Counts from now on."""
        self.own, self.busy = time.process_time(), _busy_seconds()

    def since_last(self) -> float:
        """The share since the last call; the one before where too little time has passed to say (10 ms ticks)."""
        own, busy = self.own, self.busy
        self.restart()
        if self.busy - busy >= SHORTEST / 2:
            self.last = min(1.0, (self.own - own) / (self.busy - busy))
        return self.last


def _busy_seconds() -> float:
    """CPU time of all processes since the machine started."""
    try:
        import psutil
    except ImportError:
        return 0.0
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return float(sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


@dataclass
class _Newest:
    """Takes codecarbon's totals: one of its output handlers."""

    total: Any = None

    def out(self, total: Any, delta: Any) -> None:
        """Called by each ``flush``."""
        self.total = total

    def live_out(self, total: Any, delta: Any) -> None:
        """Not used."""

    def task_out(self, data: Any, experiment_name: str) -> None:
        """Not used."""

    def exit(self) -> None:
        """Nothing to do."""


@dataclass
class _Machine:
    """codecarbon's tracker: it writes no file, asks no network and logs nothing."""

    country: str
    gpu: int | None = None
    has_counter: bool = False
    about: str = ""
    version: str = ""
    co2_kg_per_joule: float | None = None
    newest: _Newest = field(default_factory=_Newest)
    tracker: Any = None

    def __post_init__(self) -> None:
        codecarbon = require("codecarbon", extra="energy")
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self.version = str(codecarbon.__version__)
        # CUDA's own variable numbers the devices anew: then codecarbon takes its list from there
        chosen = self.gpu is not None and "CUDA_VISIBLE_DEVICES" not in os.environ
        # What is given here wins over a user's own codecarbon settings, which could write files or ask a server.
        self.tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code=self.country,
            region=None,
            cloud_provider=None,
            cloud_region=None,
            country_2letter_iso_code=None,
            electricitymaps_api_token="",
            emissions_endpoint=None,
            gpu_ids=[self.gpu] if chosen else None,
            output_dir=os.curdir,
            output_methods=[],
            output_handlers=[self.newest],
            tracking_mode="machine",
            log_level="critical",
            allow_multiple_runs=True,
            # readings are taken when they are needed, from one thread at a time: its own timer would race with them
            measure_power_secs=1e6,
            api_call_interval=-1,
            rapl_include_dram=True,
            pue=1.0,
        )
        self.tracker.start()
        self.tracker.flush()
        if self.newest.total is None:
            raise RuntimeError("codecarbon's tracker did not start")
        if self.gpu is not None and self._part("GPU") is None:
            self.tracker.stop()
            raise LookupError("the run computes on a GPU whose energy codecarbon cannot read")
        self._describe()

    def _part(self, kind: str) -> Any:
        """The device of a kind (CPU or GPU) that codecarbon found; only this private attribute tells."""
        return next((part for part in getattr(self.tracker, "_hardware", []) if type(part).__name__ == kind), None)

    def _describe(self) -> None:
        processor = self._part("CPU")
        mode = str(getattr(processor, "_mode", "unknown"))
        self.has_counter = mode in COUNTERS
        name = self.newest.total.cpu_model or "unknown processor"
        if self.has_counter:
            self.about = f"CPU: energy counters ({mode}) of {name}, memory only where they cover it"
        else:
            watts = getattr(processor, "_tdp", None)
            power = "" if watts is None else f" at most {watts:g} W"
            self.about = f"CPU: modelled from its load ({mode}), {name},{power}; memory: modelled from its size"
        energy, emissions = self.newest.total.energy_consumed, self.newest.total.emissions
        if energy > 0:
            self.co2_kg_per_joule = emissions / energy / JOULES_PER_KWH

    def read(self) -> _Drawn:
        """The newest totals; those of the last reading when codecarbon took none."""
        self.tracker.flush()
        total = self.newest.total
        if self.co2_kg_per_joule is None:
            self._describe()
        # a modelled memory would turn a measured figure into an estimated one: it goes with a modelled processor only
        shared = total.cpu_energy + (0.0 if self.has_counter else total.ram_energy)
        gpu = 0.0 if self.gpu is None else total.gpu_energy
        return _Drawn(JOULES_PER_KWH * shared, JOULES_PER_KWH * gpu)

    def stop(self) -> None:
        """Ends codecarbon's threads."""
        self.tracker.stop()
