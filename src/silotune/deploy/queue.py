"""The runs that were submitted to a coordinator, as folders on its disk with their configuration and progress.

A job is ``jobs/<name>/`` with ``config.json``, ``job.json`` (what its submitter signed) and ``state.json``; its results
are the run folder ``runs/<name>/``. Only the coordinator's own user can write there, and only a submitter can sign.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from silotune.config import Config, from_mapping
from silotune.deploy.processes import holder
from silotune.errors import FederationError, RunFolderError, unknown_choice
from silotune.federation.wire.signed_job import SignedJob
from silotune.record.files import explained, read_json, write_json
from silotune.record.runs import RunFolder, checked_name
from silotune.settings.base import NAME

Status = Literal["queued", "running", "finished", "failed", "cancelled"]
CANNOT_START_AGAIN = 3
"""Exit status of a job's process after an error of silotune's: the error is recorded, and a new try would fail in the
same way."""
ENDED: tuple[Status, ...] = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class JobState:
    """How far a job is.

    Attributes:
        status: Queued, running, finished, failed or cancelled.
        reason: Why it failed, in one line.
        exit_code: Of the error that ended it.
        attempts: How often a process worked on it: more than once after a crash or a restart.
        flower_run: Number of Flower's run of the last attempt; 0 before any.
        submitted: Seconds since 1970.
        ended: Seconds since 1970; 0 while it goes on.
    """

    status: Status = "queued"
    reason: str = ""
    exit_code: int = 0
    attempts: int = 0
    flower_run: int = 0
    submitted: float = field(default_factory=time.time)
    ended: float = 0.0


@dataclass(frozen=True)
class Jobs:
    """The jobs below a coordinator's folder."""

    folder: Path

    def free_name(self, wanted: str) -> str:
        """The wanted name, or with a number added where another job has that name.

        Raises:
            RunFolderError: The name cannot be that of a run folder.
        """
        names = (wanted if number == 1 else f"{wanted}-{number}" for number in itertools.count(1))
        return next(name for name in names if not self._place(name).exists())

    def submit(self, config: Config, signed: SignedJob) -> str:
        """Queues a run under the name that was signed; returns the name.

        Raises:
            FederationError: There is a job of this name.
            RunFolderError: The name cannot be that of a run folder, or the disk is full; nothing is queued.
        """
        name = signed.job.run
        place = self._place(name)
        with explained(place.parent):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                place.mkdir(mode=0o700)
            except FileExistsError:
                raise FederationError(f"there is a run {name!r} already: sign it with another record.name") from None
        try:
            write_json(place / "config.json", config.model_dump(mode="json"))
            self.sign(name, signed)
            self.write(name, JobState())
        except RunFolderError:
            shutil.rmtree(place)
            raise
        return name

    def _place(self, name: str) -> Path:
        """The folder of a job, which need not exist; every path to a job's files begins here, so none leads elsewhere.

        Raises:
            RunFolderError: The name cannot be that of a run folder.
        """
        return self.folder / "jobs" / checked_name(name)

    def _known(self, name: str) -> Path:
        """The folder of a job that exists.

        Raises:
            FederationError: There is no job of this name.
        """
        if not NAME.fullmatch(name) or not (self._place(name) / "state.json").is_file():
            known = self.names()
            raise FederationError(
                unknown_choice("run", name, known) if known else f"unknown run {name!r}: none was submitted here"
            )
        return self._place(name)

    def sign(self, name: str, signed: SignedJob) -> None:
        """Keeps what a submitter signed, in place of what was signed before."""
        write_json(self._place(name) / "job.json", signed.model_dump(mode="json"))

    def signed(self, name: str) -> SignedJob:
        """What a job's submitter signed.

        Raises:
            FederationError: There is no job of this name, or it cannot be read.
        """
        try:
            return SignedJob.model_validate(read_json(self._known(name) / "job.json"))
        except ValidationError:
            raise FederationError(f"job.json of run {name!r} is not a signed job: it was changed") from None

    def names(self) -> list[str]:
        """All jobs, the oldest first."""
        root = self.folder / "jobs"
        found = [path.parent.name for path in root.glob("*/state.json")] if root.is_dir() else []
        return sorted(filter(NAME.fullmatch, found), key=lambda name: (self.read(name).submitted, name))

    def read(self, name: str) -> JobState:
        """How far a job is.

        Raises:
            FederationError: There is no job of this name, or it cannot be read.
        """
        try:
            return JobState(**read_json(self._known(name) / "state.json"))
        except TypeError:
            raise FederationError(f"state.json of run {name!r} is not the state of a job: it was changed") from None

    def config(self, name: str) -> Config:
        """What a job asks for."""
        path = self._known(name) / "config.json"
        return from_mapping(read_json(path), source=str(path))

    def write(self, name: str, state: JobState) -> None:
        """Replaces a job's state."""
        write_json(self._place(name) / "state.json", asdict(state))

    def change(self, name: str, **changes: Any) -> JobState:
        """Changes values of a job's state; a job that has ended stays as it is."""
        before = self.read(name)
        after = before if before.status in ENDED else replace(before, **changes)
        if after.status in ENDED and not after.ended:
            after = replace(after, ended=time.time())
        self.write(name, after)
        return after

    def cancel(self, name: str) -> JobState:
        """Asks the coordinator to end a job; its checkpoint stays."""
        return self.change(name, status="cancelled", reason="cancelled")

    def stopped(self, name: str) -> JobState:
        """The state of a job that can be queued again.

        Raises:
            FederationError: There is no job of this name, it goes on already, or is finished.
        """
        state = self.read(name)
        if state.status not in ("failed", "cancelled"):
            raise FederationError(
                f"run {name!r} is {state.status}: only a run that failed or was cancelled can be resumed"
            )
        return state

    def resume(self, name: str) -> JobState:
        """Queues a job again that failed or was cancelled, to go on from its newest checkpoint.

        Raises:
            FederationError: It goes on already, or is finished.
        """
        before = self.stopped(name)
        after = replace(before, status="queued", reason="", exit_code=0, ended=0.0)
        self.write(name, after)
        return after

    def run_path(self, name: str) -> Path:
        """The run folder of a job, which need not exist yet.

        Raises:
            FederationError: There is no job of this name.
        """
        return self.folder / "runs" / self._known(name).name

    def progress(self, name: str) -> Mapping[str, Any]:
        """A job's state, the process of the coordinator that works on it, and its last round where it has begun."""
        state = {
            "name": name,
            **asdict(self.read(name)),
            "folder": str(self.run_path(name)),
            "coordinator": holder(self.folder),
        }
        part = RunFolder(self.run_path(name)).part("federated")
        rows = part.read_rows("metrics") if part.has("metrics") else []
        return {**state, "round": rows[-1]["round"] if rows else None, "rounds": self.config(name).federation.rounds}
