"""Who spent what: CPU time and energy of a process, told apart by client, and the most memory held.

A meter reads the totals whenever a client starts or ends, and shares what was spent since the last reading
equally among the clients that were at work; what is spent while none is belongs to the coordinator. A client that works
alone so gets all CPU time, torch's own threads included; clients side by side get equal parts of each
stretch of time that they share. Nothing is lost or counted twice, however many there are.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from silotune.record.energy import Gauge, NoGauge
from silotune.record.environment import high_water_bytes, peak_memory_bytes
from silotune.structs import Spent

NOTHING = Spent()


class Meter:
    """Counts from its first use; may be used from several threads.

    Attributes:
        gauge: Where joules come from.
        memory: The most memory held.
    """

    def __init__(self, gauge: Gauge | None = None) -> None:
        self.gauge: Gauge = gauge or NoGauge()
        self.memory = PeakMemory()
        self._lock = threading.Lock()
        self._at_work: list[Account] = []
        self._rest = Account()
        self._last: Spent | None = None  # a first reading would wait until the gauge is open

    @contextmanager
    def client(self) -> Iterator[Account]:
        """An account that what the block spends is written to; when the block fails, it falls to the coordinator."""
        account = Account()
        with self._lock:
            self._settle()
            self._at_work.append(account)
        is_done = False
        try:
            yield account
            is_done = True
        finally:
            with self._lock:
                self._settle()
                self._at_work = [other for other in self._at_work if other is not account]
                if not is_done:
                    self._rest.spent += account.spent

    def coordinator(self) -> Spent:
        """What was spent so far while no client was at work, and by clients that failed."""
        with self._lock:
            self._settle()
            return self._rest.spent

    def _settle(self) -> None:
        """Shares what was spent since the last reading among those at work; the lock is held."""
        totals = Spent(time.process_time(), self.gauge.joules())
        spent, self._last = totals - (self._last or totals), totals
        takers = self._at_work or [self._rest]
        for account in takers:
            account.spent += spent / len(takers)


class Account:
    """What one client has spent; ``spent`` grows until its block ends."""

    def __init__(self) -> None:
        self.spent = NOTHING


class PeakMemory:
    """The most memory that the process held since ``restart``, and since it began.

    Linux keeps the high-water mark of resident memory and lets a process take it back to the present; elsewhere the
    figure is the most since the process began, which is an upper bound.
    """

    def __init__(self) -> None:
        self._highest = 0

    def restart(self) -> None:
        """Counts from now on."""
        self._highest = self.ever_bytes()
        with suppress(OSError):  # no Linux
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if _cuda_is_used():
            import torch

            torch.cuda.reset_peak_memory_stats()

    def now_bytes(self) -> int:
        """Resident memory at most since ``restart``."""
        return high_water_bytes() or peak_memory_bytes()

    def ever_bytes(self) -> int:
        """Resident memory at most since this process began."""
        return max(self._highest, peak_memory_bytes(), self.now_bytes())

    def gpu_bytes(self) -> int | None:
        """GPU memory that torch had allocated at most since ``restart``; None without a GPU in use."""
        if not _cuda_is_used():
            return None
        import torch

        return int(torch.cuda.max_memory_allocated())


def _cuda_is_used() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
