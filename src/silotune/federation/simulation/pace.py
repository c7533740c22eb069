"""A simulated clock: when a client's reply would arrive if every institution had its own machine and line.

No process actually waits. A client's time is what its steps and bytes take at its own speed, in the hours in which it
is available. It all follows from the configuration, so two runs give the same seconds.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from silotune.errors import ConfigError, unknown_choice
from silotune.seeds import derive
from silotune.settings.links import ClockSection, PaceSection

TRACE_COLUMNS = ("client", "speed", "upload", "download", "available_from", "available_to")


@dataclass(frozen=True)
class Pace:
    """How fast one client works.

    Attributes:
        seconds_per_step: Of one optimiser step.
        upload: Bytes a second to the coordinator.
        download: Bytes a second from it.
        latency_seconds: Of one message, each way.
        available: Stretches (from, to) of each period in which it works, ascending; empty if it always works.
        period_seconds: Length of that period.
    """

    seconds_per_step: float
    upload: float
    download: float
    latency_seconds: float = 0.0
    available: tuple[tuple[float, float], ...] = ()
    period_seconds: float = 86400.0

    def received(self, start: float, bytes_down: int) -> float:
        """When a request sent at ``start`` has arrived."""
        return self.after(start, self.latency_seconds + bytes_down / self.download)

    def replied(self, start: float, bytes_down: int, bytes_up: int, steps: int) -> float:
        """When the reply to a request sent at ``start`` has arrived."""
        work = steps * self.seconds_per_step
        sent = 2 * self.latency_seconds + bytes_down / self.download + bytes_up / self.upload
        return self.after(start, sent + work)

    def after(self, start: float, seconds: float) -> float:
        """When work of so many seconds that begins at ``start`` is done; it pauses while the client is away."""
        if not self.available:
            return start + seconds
        period, offset = divmod(start, self.period_seconds)
        while True:
            for begin, end in self.available:
                at = max(begin, offset)
                if seconds <= end - at:
                    return period * self.period_seconds + at + seconds
                seconds -= max(0.0, end - at)
            period, offset = period + 1, 0.0


def paces(settings: ClockSection, clients: Sequence[str], *, seed: int) -> dict[str, Pace]:
    """Every client's pace: the table overrides the trace, and the section's own values fill in what neither gives.

    Raises:
        ConfigError: The trace cannot be read, or it lists a client that the run does not have.
    """
    told: dict[str, PaceSection] = {**(_trace(settings.trace) if settings.trace else {}), **settings.clients}
    for name in told:
        if name not in clients:
            raise ConfigError(f"federation.clock: {unknown_choice('client', name, clients)}")
    return {name: _pace(settings, told.get(name, PaceSection()), name, seed) for name in clients}


def _pace(settings: ClockSection, own: PaceSection, name: str, seed: int) -> Pace:
    draw = random.Random(derive(seed, "client-speed", client=name))  # noqa: S311
    speed = own.speed if own.speed is not None else draw.lognormvariate(0.0, settings.speed_spread)
    return Pace(
        settings.seconds_per_step / speed,
        own.upload if own.upload is not None else settings.upload,
        own.download if own.download is not None else settings.download,
        settings.latency_seconds,
        own.available,
        settings.period_seconds,
    )


def _trace(path: Path) -> dict[str, PaceSection]:
    """The clients of a CSV file; several rows of one client are several stretches of availability."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            odd = sorted(set(reader.fieldnames or ()) - set(TRACE_COLUMNS))
            if "client" not in (reader.fieldnames or ()) or odd:
                raise ConfigError(
                    f"federation.clock.trace {str(path)!r}: its columns may be {', '.join(TRACE_COLUMNS)}, with client"
                )
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"federation.clock.trace: cannot read {str(path)!r}: {error}") from None
    told: dict[str, dict[str, object]] = {}
    for row in rows:
        entry = told.setdefault(row["client"], {"available": []})
        entry.update({key: _number(row[key]) for key in ("speed", "upload", "download") if row.get(key)})
        if row.get("available_from") or row.get("available_to"):
            entry["available"] = [*_listed(entry), (row.get("available_from"), row.get("available_to"))]
    try:
        return {name: PaceSection.model_validate(entry) for name, entry in told.items()}
    except ValidationError as error:
        raise ConfigError(f"federation.clock.trace {str(path)!r}: {error.errors()[0]['msg']}") from None


def _number(text: str) -> float | str:
    """A cell's number; other text stays as it is, so that the section refuses it."""
    try:
        return float(text)
    except ValueError:
        return text


def _listed(entry: Mapping[str, object]) -> list[object]:
    found = entry["available"]
    return found if isinstance(found, list) else []
