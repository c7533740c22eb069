"""The logs of processes that run for months stay short."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from silotune.deploy import processes
from silotune.deploy.processes import Child


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    monkeypatch.setattr(processes, "_MOST_BYTES_OF_LOG", 10)
    return Child("a child", ("nothing",), tmp_path / "logs" / "child.log")


def test_a_long_log_is_put_aside_while_its_process_writes_on(child: Child) -> None:
    child.log.parent.mkdir()
    program = "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)"
    with child.log.open("ab") as log:
        writer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=log, text=True)
    assert writer.stdin is not None
    for text in ("a first long line", "a second"):
        writer.stdin.write(f"{text}\n")
        writer.stdin.flush()
        while f"{text}\n" not in child.log.read_text():
            assert writer.poll() is None
        child.shorten_log()
    writer.stdin.close()
    writer.wait(timeout=10)
    assert child.log.read_text() == "a second\n", "no hole of zeros before it, and short enough to stay"
    old = child.log.with_suffix(".old")
    assert old.read_text() == "a first long line\n" and old.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_costs_the_log_and_not_the_process(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    child.log.parent.mkdir()
    child.log.write_text("more than ten bytes\n")
    child.shorten_log()
    assert child.log.read_text() == "" and not child.log.with_suffix(".old").exists()


def test_a_log_that_is_not_there_or_short_is_left_alone(child: Child) -> None:
    child.shorten_log()
    child.log.parent.mkdir()
    child.log.write_text("short\n")
    child.shorten_log()
    assert child.log.read_text() == "short\n"
