"""A federation of provisioned kits whose trainers live in this process, for tests of what a submitted run does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

import kits
from line import line
from silotune.config import Config, from_mapping
from silotune.data.mixture import load_examples
from silotune.deploy.coordinator import public_keys
from silotune.deploy.flower import grid as link
from silotune.deploy.kits import Kit, coordinator_folder, link_socket, read_kit, site_folder, trainer_socket
from silotune.deploy.processes import Child
from silotune.deploy.queue import Jobs
from silotune.deploy.queued_run import over, work_on
from silotune.deploy.submit import submit_run
from silotune.deploy.trainer import equip, guard_of, holdings_of
from silotune.experiment.run import Vouched, federate
from silotune.experiment.site import Resident, SiteDesk, setup_of
from silotune.record.runs import RunFolder
from silotune.settings.sections import DataSection
from silotune.transports.frames import Frame, listen, work_frame
from silotune.transports.trainer_host import TrainerHost

NAMES = ("client-0", "client-1", "client-2")


def document(model: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of seconds over three sites; sections are updated by keyword."""
    made: dict[str, Any] = {
        "model": {"name": str(model), "max_length": 128},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"num_train": 24, "num_validation": 6, "num_test": 6, "partition": {"clients": 3, "scheme": "iid"}},
        "training": {"batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "objective": "choice", "threads": 1},
        "federation": {"modes": ["federated"], "rounds": 2, "timeout_seconds": 60},
        "evaluation": {"bootstrap_samples": 0},
        "record": {"folder": str(folder), "energy": False},
    }
    for name, values in sections.items():
        made[name] = {**made[name], **values} if isinstance(made.get(name), dict) else values
    return made


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, this process is a coordinator's that asks again at once whether its sites have answered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silotune.transports.flower.POLL_SECONDS", 0.0)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        yield


@contextmanager
def quickly() -> Iterator[None]:
    """Inside, nobody collects the garbage of a whole test process or generates the same examples for each site."""
    known: dict[str, Any] = {}

    def remembered(section: DataSection, *, seed: int) -> Any:
        key = f"{seed} {section.model_dump_json()}"
        if key not in known:
            known[key] = load_examples(section, seed=seed)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silotune.transports.trainer_host.gc.collect", lambda: 0)
        patch.setattr("silotune.experiment.site.load_examples", remembered)
        yield


class OneAtATime(TrainerHost):
    """A trainer that shares this process's random generator with others: they take turns."""

    lock = threading.Lock()

    def answer(self, frame: Frame) -> Frame:
        with self.lock:
            return super().answer(frame)


class Deployed:
    """Kits below a folder, and the trainers of the sites.

    Args:
        folder: Where kits and state lie.
        model: Folder of the base model.
        names: Of the sites.
        plan: Further lines of ``federation.toml``.
    """

    def __init__(self, folder: Path, model: Path, names: Sequence[str] = NAMES, *, plan: str = "") -> None:
        self.folder, self.names = kits.make(folder, names, plan=plan), tuple(names)
        self.resident = Resident()  # the trainers take turns with one base
        self.kit, self.submitter = read_kit(folder / "coordinator"), read_kit(folder / "researcher")
        self.hosts = {name: self._host(name, model) for name in names}
        self.seen: list[tuple[str, bytes, Frame]] = []

    def site(self, name: str) -> Kit:
        return read_kit(self.folder / name)

    def allow(self, name: str, text: str) -> None:
        """Puts lines over a site's policy; the kit's own submitter stays."""
        kept = [row for row in (self.folder / name / "policy.toml").read_text().splitlines() if "submitters" in row]
        (self.folder / name / "policy.toml").write_text("\n".join([*kept, text, ""]))

    def _host(self, name: str, model: Path) -> TrainerHost:
        place = self.folder / name
        settings = place / "site.toml"
        settings.write_text(settings.read_text().replace('path = "nano"', f"path = {json.dumps(str(model))}"))
        self.allow(name, "")
        return self.restarted(name)

    def restarted(self, name: str) -> TrainerHost:
        """A new trainer of a site, which remembers what is on the disk alone."""
        kit = self.site(name)
        site_folder(kit).mkdir(mode=0o700, exist_ok=True)
        holdings = holdings_of(kit)
        guard = guard_of(kit, holdings)
        desk = SiteDesk(holdings, partial(equip, kit, guard), resident=self.resident)
        return OneAtATime(desk, site_folder(kit) / "rounds", guard=guard)

    def work(self, envelope: Mapping[str, str], setup: bytes, data: bytes) -> Frame:
        frame = self.hosts[envelope["client"]].answer(work_frame(envelope["job"], setup, data))
        self.seen.append((envelope["client"], data, frame))
        return frame

    def run(self, config: Config, *, seed: int = 0) -> RunFolder:
        """Submits a run and works on it over a line in memory; replies come in an order by ``seed``."""
        name = submit_run(self.kit, config, submitter=self.submitter)
        return self.work_on(name, Jobs(coordinator_folder(self.kit)).run_path(name), seed=seed)

    def work_on(self, name: str, path: Path, *, up: Sequence[str] | None = None, seed: int = 0) -> RunFolder:
        """Works on a job in this folder, with those sites alone that are up."""
        jobs = Jobs(coordinator_folder(self.kit))
        config, signed = jobs.config(name), jobs.signed(name)
        members, setup = self.kit.members().active(), setup_of(config)
        return federate(
            config,
            {site: (members[site].signing_public,) for site in sorted(members)},
            connect=over(line(self.work, seed=seed, names=up or self.names), self.names, name, config, setup),
            path=path,
            vouched=Vouched(signed.job.id, signed),
        )

    def submitted(self, asked: Mapping[str, Any]) -> RunFolder:
        """Submits a run and works on it to its end over the SuperLink (``over_tls``); the run folder."""
        jobs = Jobs(coordinator_folder(self.kit))
        name = submit_run(self.kit, from_mapping(asked), submitter=self.submitter)
        work_on(self.kit, name)
        assert jobs.read(name).status == "finished", jobs.read(name).reason
        return RunFolder.open(jobs.run_path(name))


@contextmanager
def over_tls(made: Deployed) -> Iterator[None]:
    """Inside, a real SuperLink and the nodes' processes are up; the trainers are threads of this process."""
    socket = link_socket(made.kit)
    coordinator_folder(made.kit).mkdir(exist_ok=True)
    coordinator_folder(made.kit).chmod(0o700)
    children = [Child("link", ("silotune.deploy.flower.superlink", str(made.kit.folder)), made.folder / "link.log")]
    for name, host in made.hosts.items():
        kit = made.site(name)
        threading.Thread(target=host.serve, args=(listen(trainer_socket(kit)),), daemon=True).start()
        children.append(Child(name, ("silotune.deploy.node", str(kit.folder)), made.folder / f"{name}.log"))
    try:
        children[0].start()
        link.wait_for_link(socket, limit_seconds=120)
        link.register(socket, public_keys(made.kit))
        for child in children[1:]:
            child.start()
        yield
    finally:
        for child in reversed(children):
            child.stop(limit_seconds=5)
        for host in made.hosts.values():
            host.stop()
