"""The package under examples/plugin, installed by pip as a user would, and a run with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.end_to_end
def test_the_example_package_is_installed_listed_and_run(tmp_path: Path) -> None:
    place = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*pip, "--no-deps", "--target", str(place), str(ROOT / "examples" / "plugin")], check=True)
    paths = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}

    def silotune(*arguments: str) -> str:
        main = "import sys; from silotune.cli.main import main; main()"
        command = [sys.executable, "-c", main, *arguments]
        return subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout

    (row,) = json.loads(silotune("plugins", "--json"))
    assert row == {
        "kind": "algorithm", "name": "nesterov", "package": "silotune-nesterov", "version": "0.1.0",
        "place": "silotune_nesterov:Nesterov", "fault": "",
    }  # fmt: skip
    small = ["data.num_train=40", "data.num_test=10", "federation.rounds=2", "training.max_steps=1", "record.name=own"]
    small += ['federation.modes=["federated"]', "evaluation.keep=last", "federation.algorithm=nesterov"]
    silotune("run", "quickstart", *(part for text in small for part in ("--set", text)))
    kept = json.loads((tmp_path / "runs" / "own" / "config.json").read_text())
    assert kept["federation"]["algorithm"]["type"] == "nesterov"
    again = silotune("evaluate", str(tmp_path / "runs" / "own"), "--json")
    assert json.loads(again)["num_examples"] == 10
