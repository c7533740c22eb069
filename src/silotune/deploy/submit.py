"""Hands runs to a coordinator on this machine, follows them, and copies their results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.config import Config
from silotune.deploy.charter import read_charter
from silotune.deploy.jobs import ENDED, Jobs
from silotune.deploy.kits import CHARTER, SIGNING_KEY, Kit
from silotune.deploy.places import coordinator_folder, coordinator_settings
from silotune.deploy.processes import holder
from silotune.errors import ConfigError, FederationError, unknown_choice
from silotune.reach import limits
from silotune.record.files import explained
from silotune.record.runs import RunFolder

LOOK_SECONDS = 0.3
AWAY_SECONDS = 60.0
"""Who follows a run waits so long for a coordinator that does not run: one that was killed may be started again."""


def submit_run(kit: Kit, config: Config) -> str:
    """Queues a run of the federated mode; gives its name.

    Raises:
        ConfigError: It asks for what sites that are elsewhere cannot do, or for more of them than there are.
    """
    faults = [
        *limits("sites", config),
        *_site_faults(config, sorted(kit.members().active())),
        *_kit_faults(kit, config),
    ]
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
    start = {} if config.adapter.start is None else {"start": str(Path(config.adapter.start).absolute())}
    return config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update=start),
            "data": config.data.model_copy(update=data),
            "evaluation": config.evaluation.model_copy(update=files),
            "model": config.model.model_copy(update=model),
        }
    )


def _site_faults(config: Config, sites: Sequence[str]) -> list[str]:
    """What does not fit the sites that there are."""
    federation, faults = config.federation, []
    wanted = federation.clients_per_round
    if wanted is not None and wanted > len(sites):
        faults.append(f"federation.clients_per_round = {wanted}, but the federation has {len(sites)} sites")
    for table in ("ranks", "memory_mb"):
        strange = sorted(set(getattr(federation, table)) - set(sites))
        faults += [f"federation.{table}: {unknown_choice('site', name, sites)}" for name in strange]
    least, most = config.privacy.least_clients, min(wanted or len(sites), len(sites))
    if config.privacy.protection != "none" and least > most:
        faults.append(
            f"privacy.protection opens no sum of fewer than privacy.least_clients = {least}: a round has {most} sites"
        )
    return faults


def _kit_faults(kit: Kit, config: Config) -> list[str]:
    """What the federation was not provisioned for, or is over."""
    faults = []
    if config.privacy.protection == "he" and not coordinator_settings(kit).he:
        faults.append(
            "privacy.protection = 'he' needs keys at the sites: provision the federation with he = true, or use "
            "'secure_sum'"
        )
    if kit.path(CHARTER).is_file():
        until = read_charter(kit.path(CHARTER))[0].until
        if datetime.now(UTC).date() > until:
            faults.append(f"the charter's last day was {until}: sites refuse runs that name it")
    return faults


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
