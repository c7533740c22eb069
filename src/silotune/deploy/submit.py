"""Hands runs to a coordinator on this machine, follows them, and copies their results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from silotune.combinations import is_linked
from silotune.config import Config
from silotune.deploy.jobs import ENDED, Jobs
from silotune.deploy.kits import SIGNING_KEY, Kit
from silotune.deploy.places import coordinator_folder
from silotune.deploy.processes import holder
from silotune.errors import ConfigError, FederationError
from silotune.faults import is_lora_aware
from silotune.record.files import explained
from silotune.record.runs import RunFolder

LOOK_SECONDS = 0.3
AWAY_SECONDS = 60.0
"""Who follows a run waits so long for a coordinator that does not run: one that was killed may be started again."""


def submit_run(kit: Kit, config: Config) -> str:
    """Queues a run of the federated mode; gives its name.

    Raises:
        ConfigError: It needs examples that are at the sites, or more sites than there are.
    """
    sites = kit.members().active()
    faults = []
    if "federated" not in config.federation.modes:
        faults.append("federation.modes must name 'federated' to be submitted: sites' examples are not pooled")
    wanted = config.federation.clients_per_round
    if wanted is not None and wanted > len(sites):
        faults.append(f"federation.clients_per_round = {wanted}, but the federation has {len(sites)} sites")
    if config.federation.attack.kind != "none":
        faults.append("federation.attack is simulated in one process: leave it out of a run with real sites")
    if config.data.task == "mixture" or config.adapter.start is not None:
        faults.append(
            "data.task = 'mixture' and adapter.start are not carried over a deployment yet: use 'silotune run'"
        )
    if is_lora_aware(config.federation):
        faults.append("federation.lora, ranks by client and personalization are not carried over a deployment yet")
    if config.privacy.protection != "none":
        faults.append("privacy.protection is not carried over a deployment yet: leave it out, or use 'silotune run'")
    if config.privacy.dp in ("example", "local"):
        faults.append(f"privacy.dp = {config.privacy.dp!r} keeps no ledger at sites of a deployment yet: use 'client'")
    if is_linked(config.federation):
        faults.append(
            "federation.upload, federation.download and federation.clock are not carried over a deployment yet: "
            "leave them out, or use 'silotune run'"
        )
    if faults:
        raise ConfigError("the run cannot be submitted", faults)
    federation = config.federation.model_copy(update={"modes": ("federated",)})
    record = config.record.model_copy(update={"audit_key": kit.path(SIGNING_KEY).absolute()})
    name = config.record.name or f"{config.data.task}-seed{config.seed}"
    chosen = config.model_copy(update={"federation": federation, "record": record})
    return Jobs(coordinator_folder(kit)).submit(_absolute(chosen), name)


def _absolute(config: Config) -> Config:
    """The configuration with whole paths: the coordinator works in a folder of its own."""

    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    data = {name: whole(getattr(config.data, name)) for name in ("root", "validation", "test")}
    scored = {name: getattr(config.evaluation, name) for name in ("gold", "selection")}
    files = {name: str(Path(text).absolute()) for name, text in scored.items() if Path(text).suffix}
    model = {"name": str(Path(config.model.name).absolute())} if Path(config.model.name).is_dir() else {}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "evaluation": config.evaluation.model_copy(update=files),
            "model": config.model.model_copy(update=model),
        }
    )


def follow_run(jobs: Jobs, name: str, *, stays: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The events of a run as they are written; ends with the run, or at once when not to stay.

    Raises:
        FederationError: There is no such run, or no coordinator works on it.
    """
    folder = RunFolder(jobs.run_path(name))
    seen, there = 0, time.monotonic()
    while True:
        has_ended = jobs.read(name).status in ENDED
        rows = folder.read_rows("events") if folder.has("events") else []
        for row in rows[seen:]:
            yield str(row["event"]), {key: value for key, value in row.items() if key not in ("event", "time")}
        seen = len(rows)
        if has_ended or not stays:
            return
        if holder(jobs.folder) is not None:
            there = time.monotonic()
        elif time.monotonic() - there > AWAY_SECONDS:
            raise FederationError(
                f"run {name!r} is {jobs.read(name).status}, and the coordinator did not start within "
                f"{AWAY_SECONDS:g} s: start it with 'silotune coordinator start KIT'; the run stays submitted"
            )
        time.sleep(LOOK_SECONDS)


def fetch_run(jobs: Jobs, name: str, out: Path) -> Path:
    """Copies a run's folder.

    Raises:
        FederationError: It has not begun, or ``out`` is taken.
    """
    jobs.read(name)
    source = jobs.run_path(name)
    if not (source / "config.json").is_file():
        raise FederationError(f"run {name!r} has no folder yet: it has not begun")
    if out.exists():
        raise FederationError(f"{str(out)!r} is there already: name a new folder")
    with explained(out):
        shutil.copytree(source, out)
    return out
