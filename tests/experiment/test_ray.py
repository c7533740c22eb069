"""Flower's simulation on Ray: the same run as in this process, to the same bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from silotune.config import Config
from silotune.experiment.run import run_experiment
from silotune.record.runs import RunFolder

CODE = """
import json, sys, torch
torch.set_num_threads(1)
from silotune.config import from_mapping
from silotune.experiment.run import run_experiment
run_experiment(from_mapping(json.loads(sys.argv[1])))
"""


@pytest.mark.end_to_end
def test_ray_gives_the_bits_of_one_process(configuration: Callable[..., Config], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sections = {"training": {"optimizer_state": "keep", "max_steps": 2, "threads": 1}, "record": {"energy": False}}
    near = run_experiment(configuration(**sections))
    federation = {"modes": ["federated"], "rounds": 2, "engine": "ray", "ray_cpus": 2}
    config = configuration(**{**sections, "federation": federation, "record": {"energy": False, "name": "far"}})
    done = subprocess.run(
        [sys.executable, "-c", CODE, config.model_dump_json()], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    far = RunFolder.open(tmp_path / "runs" / "far")
    adapters = [run.part("federated").load_adapter()[0] for run in (near, far)]
    tiny.assert_same_bits(*adapters)
    rows = [run.part("federated").read_rows("metrics") for run in (near, far)]
    assert [row["bytes_up"] for row in rows[0]] == [row["bytes_up"] for row in rows[1]]
