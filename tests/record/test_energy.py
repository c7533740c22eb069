"""Energy through codecarbon: measured on a tree of counters, estimated, unavailable; no network, no files, no noise."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from silotune.record.energy import Codecarbon, NoGauge, open_gauge

codecarbon = pytest.importorskip("codecarbon")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, an empty home and working folder, and codecarbon's memory of the hardware forgotten."""
    from codecarbon.core import hardware_cache

    def refused(*args: object, **options: object) -> None:
        raise AssertionError("codecarbon asked the network")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(hardware_cache, "_plans", {})
    yield
    assert [path.name for path in tmp_path.iterdir() if path.name != "powercap"] == []


def spin(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_without_counters_the_figure_is_an_estimate(capfd: pytest.CaptureFixture[str]) -> None:
    gauge = Codecarbon("ESP")
    first = gauge.joules()
    spin(0.3)
    second = gauge.joules()
    assert first is not None and second is not None and second > first
    if gauge.source() == "measured":
        pytest.skip("this machine has energy counters")
    assert gauge.source() == "estimated" and "modelled" in gauge.method()
    cleaner, dirtier = gauge.co2_kg(3.6e6), open_gauge("POL").co2_kg(3.6e6)
    assert cleaner is not None and dirtier is not None and 0.02 < cleaner < dirtier < 1.5, "kg a kWh"
    assert gauge.co2_kg(None) is None
    gauge.close()
    gauge.close()
    assert gauge.joules() is not None, "a figure that was read stays"
    captured = capfd.readouterr()
    assert "codecarbon" not in (captured.out + captured.err).lower()


def counters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree as Linux has it below /sys/class/powercap: one package, in the place where codecarbon looks."""
    from codecarbon.core import cpu
    from codecarbon.external import hardware

    place, reader = str(folder / "powercap"), cpu.IntelRAPL
    monkeypatch.setattr(cpu, "_get_candidate_bases", lambda asked: [place])
    monkeypatch.setattr(hardware, "IntelRAPL", lambda **options: reader(**{**options, "rapl_dir": place}))
    package = folder / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    for name, text in {"name": "package-0", "energy_uj": "1000000", "max_energy_range_uj": "262143328850"}.items():
        (package / name).write_text(f"{text}\n")
    return package


def test_counters_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = counters(tmp_path, monkeypatch)
    monkeypatch.setattr("silotune.record.energy._busy_seconds", time.process_time)  # nothing else is at work
    gauge = Codecarbon("ESP")
    before = gauge.joules()
    spin(0.2)
    (package / "energy_uj").write_text("43000000\n")
    after = gauge.joules()
    assert gauge.source() == "measured" and "intel_rapl" in gauge.method()
    assert after is not None and before is not None
    assert after - before == pytest.approx(42.0, rel=0.02), "42 J by the counter, and no modelled memory on top"
    gauge.close()


def test_only_this_processs_share_of_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = counters(tmp_path, monkeypatch)
    monkeypatch.setattr("silotune.record.energy._busy_seconds", lambda: 4 * time.process_time())
    gauge = Codecarbon("ESP")
    before = gauge.joules() or 0.0
    spin(0.2)
    (package / "energy_uj").write_text("41000000\n")
    assert (gauge.joules() or 0.0) - before == pytest.approx(10.0, rel=0.02), "a quarter of 40 J"
    gauge.close()


def test_without_codecarbon_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    gauge = open_gauge("ESP")
    assert gauge.joules() is None and gauge.co2_kg(1.0) is None
    assert gauge.source() == "unavailable" and "silotune[energy]" in gauge.method()
    gauge.close()


def test_a_codecarbon_that_fails_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", broken)
    gauge = open_gauge("ESP")
    assert gauge.joules() is None and gauge.source() == "unavailable"
    assert gauge.method() == "codecarbon failed (ZeroDivisionError)"
    gauge.close()


def test_a_gpu_that_cannot_be_read_makes_the_figure_unavailable() -> None:
    gauge = open_gauge("ESP", gpu=0)
    if gauge.source() != "unavailable":
        pytest.skip("this machine has a GPU")
    assert gauge.joules() is None and "GPU" in gauge.method()
    gauge.close()


def test_energy_can_be_switched_off() -> None:
    gauge = open_gauge("ESP", is_wanted=False)
    assert gauge == NoGauge("switched off: record.energy = false")
    assert (gauge.joules(), gauge.source(), gauge.co2_kg(1.0)) == (None, "unavailable", None)
    gauge.close()


def test_a_users_own_settings_of_codecarbon_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv,api")
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("CODECARBON_ELECTRICITYMAPS_API_TOKEN", "token")
    monkeypatch.setenv("CODECARBON_LOG_LEVEL", "debug")
    gauge = Codecarbon("ESP")
    assert gauge.joules() is not None
    gauge.close()
    assert logging.getLogger("codecarbon").level == logging.CRITICAL
