"""CPU time and memory of this process together with the processes that work for it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

from silotune.record.environment import high_water_bytes

_CPU_CLOCK = 2  # of clock_getcpuclockid(3): all of a process's threads


class Family:
    """This process and its helpers. A helper that has ended keeps what it had spent when it was last looked at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent: dict[int, float] = {}
        self._running: set[int] = set()

    def join(self, pid: int) -> None:
        """Counts a process from now on."""
        with self._lock:
            self._running.add(pid)

    def leave(self, pid: int) -> None:
        """To be called before a helper is ended: afterwards nothing can be read of it."""
        self.cpu_seconds()
        with self._lock:
            self._running.discard(pid)

    def cpu_seconds(self) -> float:
        """Of all threads of all of them."""
        with self._lock:
            for pid in self._running:
                with suppress(OSError):  # it has ended
                    self._spent[pid] = time.clock_gettime(~pid << 3 | _CPU_CLOCK)
            return time.process_time() + sum(self._spent.values())

    def helpers_high_water_bytes(self) -> int:
        """Most resident memory of each helper that runs, added up: an upper bound of what they held at one time."""
        with self._lock:
            return sum(high_water_bytes(Path(f"/proc/{pid}/status")) or 0 for pid in self._running)

    def restart_high_water(self) -> None:
        """Takes the marks back to the present, on Linux."""
        with self._lock:
            for pid in ("self", *self._running):
                with suppress(OSError):
                    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
