"""Real kills: a run that dies at any moment and is resumed ends with the bits of one that never did."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from silotune.config import Config
from silotune.experiment.audit import verify_run
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

CODE = """
import gc, json, os, sys, torch, transformers
torch.set_num_threads(1)
from silotune.config import from_mapping
from silotune.experiment.run import resume_experiment, run_experiment
gc.freeze()
for line in sys.stdin:
    verb, given = json.loads(line)
    life = os.fork()
    if life:
        print(life, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]), flush=True)
        continue
    if verb == "run":
        run_experiment(from_mapping(given))
    else:
        resume_experiment(given)
    os._exit(0)
"""
"""Each life is a fresh fork of a process that has done no more than its imports, which would take most of its time."""


class Life:
    """A process that runs or resumes, from a fork on to its end."""

    def __init__(self, parent: subprocess.Popen[bytes], verb: str, given: Any) -> None:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(json.dumps([verb, given]).encode() + b"\n")
        self.pid, self._said = int(parent.stdout.readline()), parent.stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._said], [], [], seconds)[0]:
            self.returncode = int(self._said.readline())
        return self.returncode


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[bytes]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-c", CODE], **pipes) as process:
        yield process


def rounds_done(folder: Path) -> int:
    """Counts rows while the run writes; ``os.walk`` passes over a folder that vanishes under it, ``rglob`` fails."""
    places = [Path(place) for place, _, files in os.walk(folder) if "clients.jsonl" in files]
    return sum((place / "clients.jsonl").read_bytes().count(b"\n") for place in places)


def kill_after(process: Life, folder: Path, rounds: int, delay: float) -> bool:
    """Kills at a moment of ``delay`` seconds after so many rows; False if the run ended before."""
    limit = time.monotonic() + 120
    while process.poll() is None and rounds_done(folder) < rounds:
        assert time.monotonic() < limit
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is not None:
        assert process.returncode == 0
        return False
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    return True


@pytest.mark.end_to_end
@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_three_kills_change_no_bit(
    configuration: Callable[..., Config], tmp_path: Path, optimizer_state: str, parent: subprocess.Popen[bytes]
) -> None:
    sections = {
        "training": {"optimizer_state": optimizer_state, "max_steps": 3},
        "federation": {"modes": ["federated", "isolated", "centralized"], "rounds": 6, "clients_per_round": 2},
        "evaluation": {"keep": "best", "bootstrap_samples": 0},
    }
    whole = run_experiment(configuration(**sections))
    cut = configuration(**sections, record={"name": "cut"})
    folder = tmp_path / "runs" / "cut"
    moments = random.Random()
    seed = moments.randrange(2**32)
    print(f"moments of the kills: seed {seed}")
    moments.seed(seed)
    process = Life(parent, "run", cut.model_dump(mode="json"))
    for rows in sorted(moments.sample(range(1, 24), 3)):
        assert kill_after(process, folder, rows, moments.uniform(0, 0.1)), f"it ended before {rows} rows"
        assert RunFolder.open(folder).read_json("config") == cut.model_dump(mode="json")
        process = Life(parent, "resume", str(folder))
    assert process.wait(200) == 0
    resumed = resume_experiment(folder)
    places = [("federated",), ("centralized",), *(("isolated", name) for name in whole.part("isolated").parts())]
    assert len(places) == 5
    for place in places:
        (left, left_config), (right, right_config) = (run.part(*place).load_adapter() for run in (whole, resumed))
        tiny.assert_same_bits(left, right)
        assert left_config == right_config
        for name in ("metrics", "clients"):
            kept = [
                [
                    {key: value for key, value in row.items() if "seconds" not in key and key not in ("cost", "joules")}
                    for row in run.part(*place).read_rows(name)
                ]
                for run in (whole, resumed)
            ]
            assert kept[0] == kept[1]
        results = [run.part(*place).read_json("result") for run in (whole, resumed)]
        assert results[0]["metrics"] == results[1]["metrics"]
        assert results[0]["round"] == results[1]["round"]
    assert not list(folder.rglob(".*tmp"))
    assert verify_run(folder).has_adapter
