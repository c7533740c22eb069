"""The whole, as its commands start it: over TLS, with a trainer killed and the coordinator killed, to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kits
import tiny
from silotune.config import from_mapping
from silotune.deploy.jobs import Jobs
from silotune.deploy.kits import read_kit
from silotune.deploy.places import coordinator_folder, site_folder, trainer_socket
from silotune.deploy.site import node_state, status
from silotune.deploy.submit import submit_run
from silotune.experiment.audit import verify_run
from silotune.experiment.run import run_experiment
from silotune.record.runs import RunFolder
from silotune.transports.frames import Frame, ask

pytestmark = pytest.mark.end_to_end
LIMIT = 240.0
SITES = ("client-0", "client-1")


def configuration(tiny_folder: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_folder), "max_length": 128},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"num_train": 48, "num_validation": 12, "num_test": 18, "partition": {"clients": 2, "alpha": 2.0}},
        "training": {
            "batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "objective": "choice", "optimizer_state": "keep",
            "threads": 1,
        },
        "federation": {"modes": ["federated"], "rounds": 4, "timeout_seconds": LIMIT},
        "evaluation": {"bootstrap_samples": 20},
        "record": {"folder": str(folder), "name": "whole", "energy": False},
    }  # fmt: skip


class Processes:
    """The commands of a federation, each in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        kind = "coordinator" if name == "coordinator" else "site"
        command = [sys.executable, "-m", "silotune.cli.main", kind, "start", str(self.folder / name)]
        log = (self.folder / f"{name}.log").open("ab")
        self.running[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def kill(self, name: str) -> None:
        """SIGKILL to a command and all that it started, at once."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            assert process.wait(60) == 0


@pytest.fixture
def processes(tmp_path: Path, tiny_folder: Path) -> Iterator[Processes]:
    made = Processes(kits.make(tmp_path / "f", SITES))
    for name in SITES:
        settings = made.folder / name / "site.toml"
        settings.write_text(settings.read_text().replace('path = "nano"', f"path = {json.dumps(str(tiny_folder))}"))
        (made.folder / name / "policy.toml").write_text(
            (made.folder / name / "policy.toml").read_text().replace("smallest_count = 5", "smallest_count = 0")
        )
    yield made
    made.stop()


def until(what: str, is_so: Callable[[], Any]) -> None:
    limit = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


def test_a_killed_trainer_and_a_killed_coordinator_change_no_bit(
    processes: Processes, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("coordinator", *SITES):
        processes.start(name)
    document = configuration(tiny_folder, tmp_path / "runs")
    whole = run_experiment(from_mapping(document))
    kit = read_kit(processes.folder / "coordinator")
    jobs, site = Jobs(coordinator_folder(kit)), read_kit(processes.folder / SITES[0])
    until("the sites are connected", lambda: all(
        node_state(read_kit(processes.folder / name)).get("status") == "connected" for name in SITES
    ))  # fmt: skip
    name = submit_run(kit, from_mapping(document))
    until("a site works", lambda: works(trainer_socket(site)) or jobs.progress(name)["round"] is not None)
    os.kill(status(site)["trainer"]["process"], signal.SIGKILL)
    until("a round is done", lambda: (jobs.progress(name)["round"] or 0) >= 1)
    processes.kill("coordinator")
    assert jobs.read(name).status == "running"
    processes.start("coordinator")
    until("the run ends", lambda: jobs.read(name).status != "running")
    ended = jobs.read(name)
    assert (ended.status, ended.attempts) == ("finished", 2), ended
    run = RunFolder.open(jobs.run_path(name))
    (left, left_config), (right, right_config) = (each.part("federated").load_adapter() for each in (whole, run))
    tiny.assert_same_bits(left, right)
    assert left_config["r"] == right_config["r"]
    metrics = [each.part("federated").read_json("result")["metrics"] for each in (whole, run)]
    assert metrics[0] == metrics[1]
    found = verify_run(run.path, keys=kit.members().signing_keys(), sites=[site_folder(site)])
    assert found.has_adapter and found.witnesses[SITES[0]] >= 4
    said = status(site)
    assert said["trainer"]["base_loads"] == 1 and said["node"]["status"] == "connected"


def works(path: Path) -> bool:
    try:
        return bool(ask(path, Frame({"verb": "state"}), timeout_seconds=5).header["works_on"])
    except Exception:  # noqa: BLE001  # it is starting
        return False
