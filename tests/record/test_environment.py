from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from silotune.record import environment


def test_versions_name_the_packages_behind_the_numbers():
    found = environment.versions()
    assert found["cores"] >= 1 and found["python"].startswith("3.")
    assert found["packages"]["torch"]
    assert environment.version_of("no-such-package-of-anyone") is None
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(environment.extras()) == set(project["project"]["optional-dependencies"]) - {"dev"}


def test_peak_memory_sees_what_was_held():
    before = environment.peak_memory_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert environment.peak_memory_bytes() >= min(before + (32 << 20), 64 << 20)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux keeps the mark")
def test_peak_memory_is_not_the_parents():
    block = bytearray(400 << 20)
    block[::4096] = b"x" * len(block[::4096])
    code = "from silotune.record.environment import peak_memory_bytes; print(peak_memory_bytes())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(block) > int(ran.stdout) > 1 << 20


def test_the_high_water_mark_is_read_where_there_is_one(tmp_path):
    table = tmp_path / "status"
    table.write_text("VmPeak:\t 99 kB\nVmHWM:\t  16 kB\n")
    assert environment.high_water_bytes(table) == 16384
    assert environment.high_water_bytes(tmp_path / "none") is None


def test_memory_reads_the_kernels_table(tmp_path):
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       16 kB\nMemAvailable:   8 kB\nHugePages_Total:       0\n")
    assert environment.memory(table) == {"total": 16384, "available": 8192}
    assert environment.memory(tmp_path / "none") == {"total": None, "available": None}


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert environment.disk_free_bytes(tmp_path / "a" / "b") > 0
    assert environment.disk_free_bytes(Path("runs")) > 0


def test_gpus_are_listed_or_none(monkeypatch):
    assert isinstance(environment.gpus(), list)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.gpus() == []
