"""A real federation on one machine, for trying: provisions, starts, runs, verifies, stops."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.config import Config
from silotune.deploy import coordinator
from silotune.deploy.kits import FIRST_SUBMITTER, Kit, coordinator_folder, log_of, read_kit, site_folder, unpack
from silotune.deploy.processes import Child
from silotune.deploy.provision import provision
from silotune.deploy.queue import Jobs
from silotune.deploy.submit import follow_run, submit_run
from silotune.errors import FederationError
from silotune.experiment.audit import verify_run
from silotune.record.files import write_bytes
from silotune.record.runs import RunFolder
from silotune.structs import Observer

START_SECONDS = 240.0
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Shown:
    """What the demonstration ended with: the run folder, entries of the trail that verified, seconds of each part."""

    folder: Path
    entries: int
    witnesses: Mapping[str, int]
    seconds: Mapping[str, float]


def demo_federation(config: Config, folder: Path, *, sites: int, notify: Observer) -> Shown:
    """Starts a SuperLink and as many nodes over TLS on 127.0.0.1, runs the configuration, verifies the trail.

    Args:
        config: Its clients must be ``client-0``, ``client-1`` and so on.
        folder: Empty or new; kits, logs and results stay there.
        sites: How many.
        notify: Told of every event.

    Raises:
        SilotuneError: Anything went wrong; all that was started is stopped.
    """
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def mark(name: str) -> None:
        seconds[name] = round(time.perf_counter() - began - sum(seconds.values()), 1)

    names = [f"client-{number}" for number in range(sites)]
    kits = _provisioned(folder, names)
    mark("provision")
    submitter = kits.pop(FIRST_SUBMITTER)
    with _started(kits, notify):
        mark("start")
        kit = kits["coordinator"]
        notify(
            "note", {"text": "one person is submitter and coordinator here; elsewhere they have machines of their own"}
        )
        name, jobs = submit_run(kit, config, submitter=submitter), Jobs(coordinator_folder(kit))
        for event, fields in follow_run(jobs, name):
            notify(event, fields)
        ended = jobs.read(name)
        mark("run")
    mark("stop")
    if ended.status != "finished":
        raise FederationError(f"the run {ended.status}: {ended.reason}; logs are in {coordinator_folder(kit) / 'logs'}")
    run = RunFolder.open(jobs.run_path(name))
    keys = kit.members().signing_keys()
    found = verify_run(run.path, keys=keys, sites=[site_folder(kits[name]) for name in names])
    mark("verify")
    return Shown(run.path, len(found.chain.entries), found.witnesses, seconds)


def _provisioned(folder: Path, names: list[str]) -> dict[str, Kit]:
    plan = folder / "federation.toml"
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    head = ['name = "demo"', "[coordinator]", f'host = "{_HOST}"', f"fleet_port = {port}"]
    write_bytes(plan, "\n".join([*head, *(f"[sites.{name}]" for name in names), ""]).encode())
    kits = {}
    for made in provision(plan, folder / "office"):
        unpack(made.path, folder)
        kits[made.name] = folder / f"demo-{made.name}"
    settings = kits["coordinator"] / "coordinator.toml"
    loopback = settings.read_text(encoding="utf-8").replace('listen = "0.0.0.0"', f'listen = "{_HOST}"')
    write_bytes(settings, loopback.encode())
    return {name: read_kit(place) for name, place in kits.items()}


@contextlib.contextmanager
def _started(kits: Mapping[str, Kit], notify: Observer) -> Iterator[None]:
    """The coordinator and all sites, each as its own command would start it; stopped in the end, sites first."""
    children = []
    for name, kit in kits.items():
        is_site = name != "coordinator"
        kind = "site" if is_site else "coordinator"
        log = log_of(site_folder(kit) if is_site else coordinator_folder(kit), kind)
        children.append(Child(name, ("silotune.cli.main", kind, "start", str(kit.folder)), log))
    try:
        for child in children:
            child.start()
        _wait(children, lambda: _are_up(kits))
        notify("note", {"text": f"{len(kits) - 1} sites are connected over TLS; their keys were checked"})
        yield
    finally:
        for child in reversed(children):
            if child.process is not None:
                child.process.terminate()
        for child in reversed(children):
            child.stop()


def _are_up(kits: Mapping[str, Kit]) -> bool:
    said: dict[str, Any] = coordinator.status(kits["coordinator"])
    wanted = set(kits) - {"coordinator"}
    return {name for name, how in said["sites"].items() if how == "connected"} >= wanted


def _wait(children: list[Child], is_done: Callable[[], bool]) -> None:
    limit = time.monotonic() + START_SECONDS
    while not is_done():
        for child in children:
            if not child.is_running:
                raise FederationError(f"{child.name} ended with status {child.code}: {child.last_line()}")
        if time.monotonic() > limit:
            raise FederationError(f"coordinator and sites were not connected within {START_SECONDS:g} s")
        time.sleep(0.3)
