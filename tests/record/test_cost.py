from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from silotune.record.cost import Meter, PeakMemory
from silotune.record.energy import NoGauge, weakest
from silotune.structs import Spent


@dataclass
class Clock:
    """Process time and energy that only move when a test says so."""

    seconds: float = 0.0

    def process_time(self) -> float:
        return self.seconds

    def joules(self) -> float:
        return 10 * self.seconds


class Gauge(NoGauge):
    def __init__(self, clock: Clock) -> None:
        super().__init__("a test")
        object.__setattr__(self, "joules", clock.joules)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "process_time", made.process_time)
    return made


def test_a_client_alone_gets_all_and_the_coordinator_the_rest(clock: Clock) -> None:
    meter = Meter(Gauge(clock))
    assert meter.coordinator() == Spent(0.0, 0.0)
    clock.seconds += 1
    with meter.client() as first:
        clock.seconds += 2
    clock.seconds += 4
    with meter.client() as second:
        clock.seconds += 8
    assert (first.spent, second.spent) == (Spent(2.0, 20.0), Spent(8.0, 80.0))
    assert meter.coordinator() == Spent(5.0, 50.0)


def test_clients_side_by_side_share_each_stretch_and_nothing_is_lost(clock: Clock) -> None:
    meter = Meter(Gauge(clock))
    meter.coordinator()
    with meter.client() as first:
        clock.seconds += 1
        with meter.client() as second:
            clock.seconds += 4
        clock.seconds += 8
    assert (first.spent, second.spent) == (Spent(11.0, 110.0), Spent(2.0, 20.0))
    assert meter.coordinator() == Spent(0.0, 0.0)


def test_what_a_failing_client_spent_falls_to_the_coordinator(clock: Clock) -> None:
    meter = Meter(Gauge(clock))
    meter.coordinator()
    with pytest.raises(KeyError), meter.client():
        clock.seconds += 3
        raise KeyError
    assert meter.coordinator() == Spent(3.0, 30.0)


def test_threads_add_up_to_the_process(clock: Clock) -> None:
    meter = Meter(Gauge(clock))
    meter.coordinator()
    accounts = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        with meter.client() as account:
            clock.seconds += 0.25
        accounts.append(account)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum((account.spent for account in accounts), meter.coordinator())
    assert total.core_seconds == pytest.approx(clock.seconds)
    assert total.joules == pytest.approx(10 * clock.seconds)


def test_real_time_is_counted_and_no_gauge_gives_no_joules() -> None:
    meter = Meter()
    with meter.client() as account:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    assert account.spent.core_seconds >= 0.05 and account.spent.joules is None
    assert meter.coordinator().joules is None


def test_a_sum_is_known_only_where_every_part_is() -> None:
    assert Spent(1.0, 2.0) + Spent(3.0, None) == Spent(4.0, None)
    assert Spent(3.0, 2.0) - Spent(1.0, 0.5) == Spent(2.0, 1.5)
    assert Spent(3.0, None) / 2 == Spent(1.5, None)
    assert weakest(["measured", "estimated", "measured"]) == "estimated"
    assert weakest(["measured", "unavailable"]) == weakest([]) == "unavailable"
    assert weakest(["measured"]) == "measured"


def test_peak_memory_forgets_what_was_held_before() -> None:
    memory = PeakMemory()
    block = bytearray(96 << 20)
    block[::4096] = b"x" * len(block[::4096])
    held = memory.now_bytes()
    del block
    memory.restart()
    if memory.now_bytes() >= held:
        pytest.skip("this system does not take its high-water mark back")
    assert memory.now_bytes() < held - (48 << 20)
    assert memory.ever_bytes() >= held - (4 << 20)  # the kernel counts in batches
    assert memory.gpu_bytes() is None
