"""The whole, as its commands start it: over TLS, with kills and full disks everywhere, to the bits of a quiet run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kits
import tiny
from silotune.config import from_mapping
from silotune.deploy.coordinator import public_keys
from silotune.deploy.flower import grid as link
from silotune.deploy.kits import Kit, coordinator_folder, link_socket, read_kit, site_folder, trainer_socket
from silotune.deploy.processes import ENVIRONMENT, Child, holder
from silotune.deploy.queue import Jobs
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
        "federation": {
            "modes": ["federated"], "rounds": 4, "timeout_seconds": LIMIT, "min_replies": 2, "below_minimum": "wait",
        },
        "evaluation": {"bootstrap_samples": 20},
        "record": {"folder": str(folder), "name": "whole", "energy": False},
    }  # fmt: skip


class Processes:
    """The commands of a federation, each in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def kit(self) -> Kit:
        return read_kit(self.folder / "coordinator")

    @property
    def submitter(self) -> Kit:
        return read_kit(self.folder / "researcher")

    def site(self, name: str) -> Kit:
        return read_kit(self.folder / name)

    def start(self, name: str) -> None:
        kind = "coordinator" if name == "coordinator" else "site"
        command = [sys.executable, "-m", "silotune.cli.main", kind, "start", str(self.folder / name)]
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def kill(self, name: str) -> None:
        """SIGKILL to a command and all that it started, at once."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self, *names: str) -> None:
        stopped = [self.running.pop(name) for name in names or tuple(self.running)]
        for process in stopped:
            process.terminate()
        for process in stopped:
            assert process.wait(60) == 0

    def connected(self) -> bool:
        return all(node_state(self.site(name)).get("status") == "connected" for name in SITES)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Processes]:
    made = Processes(kits.make(tmp_path_factory.mktemp("f"), SITES))
    for name in SITES:
        settings = made.folder / name / "site.toml"
        settings.write_text(settings.read_text().replace('path = "nano"', f"path = {json.dumps(str(tiny_folder))}"))
        (made.folder / name / "policy.toml").write_text(
            (made.folder / name / "policy.toml").read_text().replace("smallest_count = 5", "smallest_count = 0")
        )
    for name in ("coordinator", *SITES):
        made.start(name)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def document(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return configuration(tiny_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(processes: Processes, document: dict[str, Any]) -> RunFolder:
    """The run in one process, undisturbed."""
    return run_experiment(from_mapping(document))


def until(what: str, is_so: Callable[[], Any]) -> Any:
    limit = time.monotonic() + LIMIT
    while not (found := is_so()):
        assert time.monotonic() < limit, what
        time.sleep(0.05)
    return found


@contextmanager
def no_room(*processes: int) -> Iterator[None]:
    """No file of these processes can grow, as on a full disk."""
    before = [resource.prlimit(process, resource.RLIMIT_FSIZE) for process in processes]
    for process, (_, hard) in zip(processes, before, strict=True):
        resource.prlimit(process, resource.RLIMIT_FSIZE, (0, hard))
    yield
    for process, limits in zip(processes, before, strict=True):
        if Path(f"/proc/{process}").exists():
            resource.prlimit(process, resource.RLIMIT_FSIZE, limits)


def children(process: int) -> dict[str, int]:
    """Module -> process, of those that a command started."""
    found = {}
    for number in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split():
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if len(words) > 2:  # one that has ended and nobody has looked at has none
            found[words[2].decode()] = int(number)
    return found


def same(run: RunFolder, whole: RunFolder) -> None:
    (left, left_config), (right, right_config) = (each.part("federated").load_adapter() for each in (whole, run))
    tiny.assert_same_bits(left, right)
    assert left_config["r"] == right_config["r"]
    metrics = [each.part("federated").read_json("result")["metrics"] for each in (whole, run)]
    assert metrics[0] == metrics[1]


def rounds_of(jobs: Jobs, name: str) -> int:
    """The last round in a job's record; 0 where it has none, as while it begins again for want of a checkpoint."""
    return jobs.progress(name)["round"] or 0


def test_a_killed_trainer_a_full_disk_and_a_killed_coordinator_change_no_bit(
    processes: Processes, whole: RunFolder, document: dict[str, Any]
) -> None:
    kit, site = processes.kit, processes.site(SITES[0])
    jobs = Jobs(coordinator_folder(kit))
    until("the sites are connected", processes.connected)
    name = submit_run(kit, from_mapping(document), submitter=processes.submitter)
    until("a site works", lambda: works(trainer_socket(site)) or jobs.progress(name)["round"] is not None)
    os.kill(status(site)["trainer"]["process"], signal.SIGKILL)
    until("a round is done", lambda: rounds_of(jobs, name) >= 1)
    process = holder(coordinator_folder(kit))
    assert process is not None
    with no_room(process, children(process)["silotune.deploy.queued_run"]):
        until("the job has no room", lambda: "silotune.deploy.queued_run" not in children(process))
        time.sleep(0.5)
        assert jobs.read(name).status == "running" and processes.running["coordinator"].poll() is None
    failed = until("it is written down", lambda: (state := jobs.read(name)).status == "failed" and state)
    assert "no space left" in failed.reason
    done = rounds_of(jobs, name)
    again = [sys.executable, "-m", "silotune.cli.main", "resume", name, "--kit", str(kit.folder)]
    assert f"{name}: queued" in subprocess.run(again, check=True, capture_output=True, text=True).stdout
    until("another round is done", lambda: rounds_of(jobs, name) > done or jobs.read(name).status == "finished")
    processes.kill("coordinator")
    assert jobs.read(name).status == "running"
    processes.start("coordinator")
    until("the run ends", lambda: jobs.read(name).status != "running")
    ended = jobs.read(name)
    assert (ended.status, ended.attempts) == ("finished", 3), ended
    run = RunFolder.open(jobs.run_path(name))
    same(run, whole)
    found = verify_run(run.path, keys=kit.members().signing_keys(), sites=[site_folder(site)])
    assert found.has_adapter and found.witnesses[SITES[0]] >= 4
    said = status(site)
    assert said["trainer"]["base_loads"] == 1 and said["node"]["status"] == "connected"
    processes.stop("coordinator")


LIVES = (
    ("preparing", 1), ("asking", 2), ("waiting", 2), ("receiving", 1), ("scoring", 2), ("before a checkpoint", 1),
    ("after a checkpoint", 1), ("recording", 1), ("concluding", 1), ("finished", 1), ("closing the trail", 1),
    ("closing over a manifest", 1), ("countersigning", 1), ("countersigned", 1),
)  # fmt: skip
"""Where the job's process is killed, one life after another; each goes on from what the one before left."""
FULL = "after a checkpoint"
"""In this life a site's disk is full until the round has been tried again."""


def waited(folder: RunFolder) -> str:
    """Why a round was tried again; empty where none was."""
    rows = folder.read_rows("events") if folder.has("events") else []
    return next((row["reason"] for row in rows if row["event"] == "round_waits"), "")


@pytest.fixture
def superlink(processes: Processes) -> Iterator[Kit]:
    """The SuperLink alone: the test itself starts what works on runs."""
    kit = processes.kit
    if "coordinator" in processes.running:
        processes.stop("coordinator")
    child = Child("link", ("silotune.deploy.flower.superlink", str(kit.folder)), processes.folder / "link.log")
    child.start()
    try:
        link.wait_for_link(link_socket(kit), limit_seconds=LIMIT)
        link.register(link_socket(kit), public_keys(kit))
        yield kit
    finally:
        child.stop(limit_seconds=5)


def test_a_job_killed_in_every_phase_and_a_full_disk_at_a_site_change_no_bit(
    processes: Processes, superlink: Kit, whole: RunFolder, document: dict[str, Any]
) -> None:
    jobs, site = Jobs(coordinator_folder(superlink)), processes.site(SITES[1])
    name = submit_run(superlink, from_mapping(document), submitter=processes.submitter)
    folder = RunFolder(jobs.run_path(name))
    tests = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "lives", str(superlink.folder)]
    with (
        processes.log("lives").open("wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": tests},
        ) as lives,
    ):  # fmt: skip
        assert lives.stdin is not None and lives.stdout is not None and lives.stdout.readline() == "ready\n"
        until("the sites are connected", processes.connected)

        def ask_for(phase: str, number: int) -> None:
            assert lives.stdin is not None
            lives.stdin.write(f"{name}\t{phase}\t{number}\n")
            lives.stdin.flush()

        for phase, number in LIVES:
            if phase == FULL:
                with no_room(status(site)["trainer"]["process"]):
                    ask_for(phase, number)
                    waits = until("the round is tried again", lambda: waited(folder))
                assert "client 'client-1' failed in round 1" in waits and "no space left" in waits
            else:
                ask_for(phase, number)
            assert (lives.stdout.readline(), phase) == (f"{-signal.SIGKILL}\n", phase)
        ask_for("-", 0)
        assert lives.stdout.readline() == "0\n", processes.log("lives").read_text()
        lives.stdin.close()
    ended = jobs.read(name)
    assert (ended.status, ended.attempts) == ("finished", len(LIVES) + 1), ended
    same(folder, whole)
    sites = [site_folder(processes.site(each)) for each in SITES]
    found = verify_run(folder.path, keys=superlink.members().signing_keys(), sites=sites)
    assert found.has_adapter and min(found.witnesses.values()) >= 4
    assert found.uncountersigned == () and "summary.json" in found.coverage.covered


def works(path: Path) -> bool:
    try:
        return bool(ask(path, Frame({"verb": "state"}), timeout_seconds=5).header["works_on"])
    except Exception:  # noqa: BLE001  # it is starting
        return False
