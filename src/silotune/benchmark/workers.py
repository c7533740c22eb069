"""Worker processes, each of which runs cells one after another as long as cells of its kind are left.

A worker pays for its imports once. It serves one kind of cells (one base model with one adapter), so the memory that
a cell reports does not include that of another adapter that ran before it. A cell whose process dies, for instance
because memory runs out, is reported, and the next cell gets a new process. A worker whose parent dies ends at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError, SilotuneError

_LOCK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be made or continued.

    Attributes:
        name: The name by which its messages are told from others.
        kind: Jobs of one kind share a worker.
        path: Its run folder.
        config: The resolved configuration.
    """

    name: str
    kind: str
    path: Path
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """What a worker says: ``started``, ``event`` (with the run's own), ``done`` or ``failed`` (with a ``reason``)."""

    job: Job
    what: str
    fields: Mapping[str, Any]


def run_jobs(
    jobs: Sequence[Job], *, workers: int, threads: int | None, start: Callable[[], None] | None = None
) -> Iterator[Message]:
    """Runs jobs in processes, side by side where ``workers`` is more than one; a failed one stops no other.

    Args:
        jobs: What to run, those of one kind together.
        workers: How many processes at once.
        threads: CPU threads of each; None as torch decides.
        start: Called in each new process, such as what silences libraries; it must be importable by name.

    Yields:
        For each job ``started``, its events, then ``done`` or ``failed``.
    """
    waiting = deque(jobs)
    crew = [_Worker(threads, start) for _ in range(min(workers, len(jobs)))]
    try:
        while waiting or any(worker.job for worker in crew):
            for worker in crew:
                if worker.job is None and waiting:
                    yield worker.give(_next_for(worker, waiting))
            busy = {worker.reader: worker for worker in crew if worker.job is not None}
            for reader in wait(list(busy)):
                yield from busy[reader].take()  # type: ignore[index]
    finally:
        for worker in crew:
            worker.end()


def _next_for(worker: _Worker, waiting: deque[Job]) -> Job:
    """The next job of the worker's kind; else the first of the kind with the most jobs left, to spread kinds evenly."""
    for place, job in enumerate(waiting):
        if job.kind == worker.kind:
            del waiting[place]
            return job
    left: dict[str, int] = {}
    for job in waiting:
        left[job.kind] = left.get(job.kind, 0) + 1
    most = max(left, key=lambda kind: left[kind])
    place = next(place for place, job in enumerate(waiting) if job.kind == most)
    job = waiting[place]
    del waiting[place]
    return job


class _Worker:
    """One process and what it is doing."""

    def __init__(self, threads: int | None, start: Callable[[], None] | None) -> None:
        self.job: Job | None = None
        self.kind = ""
        self.reader: Connection[Any, Any]
        self._process: SpawnProcess | None = None
        self._settings = (threads, start)

    def give(self, job: Job) -> Message:
        if self.kind != job.kind or self._process is None or not self._process.is_alive():
            self.end()
            self._begin()
        self.job, self.kind = job, job.kind
        with suppress(BrokenPipeError):  # it has died, which ``take`` reports
            self.reader.send((str(job.path), dict(job.config)))
        return Message(job, "started", {})

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.reader, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *self._settings), daemon=True)
        self._process.start()
        other.close()

    def take(self) -> Iterator[Message]:
        """Gives the next message of the worker, or the failure of its job when the worker has died."""
        assert self.job is not None and self._process is not None
        job = self.job
        try:
            what, fields = self.reader.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            what, fields = "failed", {"reason": _death(self._process.exitcode or 0)}
            self.end()
        if what in ("done", "failed"):
            self.job = None
        yield Message(job, what, fields)

    def end(self) -> None:
        if self._process is not None:
            self.reader.close()
            self._process.terminate()
            self._process.join()
            self._process, self.kind = None, ""


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (signal 9): perhaps out of memory"
    if code < 0:
        return f"its process was ended by signal {-code}"
    return f"its process ended with code {code}: see what it printed"


def serve(connection: Connection[Any, Any], threads: int | None, start: Callable[[], None] | None) -> None:
    """The body of a worker process: runs what it is sent until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its workers
    os.dup2(2, 1)  # standard output belongs to the parent's report
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if start is not None:
        start()
    with suppress(EOFError):
        while True:
            path, config = connection.recv()
            connection.send(_run(Path(path), config, threads, connection))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run(
    path: Path, config: Mapping[str, Any], threads: int | None, connection: Connection[Any, Any]
) -> tuple[str, dict[str, Any]]:
    def observer(event: str, fields: Mapping[str, Any]) -> None:
        if event != "run_finished":
            connection.send(("event", {"event": event, **fields}))

    began = time.perf_counter()
    try:
        run_cell(path, config, threads=threads, observer=observer)
    except SilotuneError as error:
        return "failed", {"reason": " ".join(str(error).split()), "exit_code": error.exit_code}
    return "done", {"seconds": time.perf_counter() - began}


def run_cell(
    path: Path,
    config: Mapping[str, Any],
    *,
    threads: int | None = None,
    observer: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> None:
    """Makes the run in the folder ``path``, or continues the run that is there already.

    Raises:
        SilotuneError: Whatever went wrong, in one line.
    """
    import torch

    from silotune.config import from_mapping
    from silotune.experiment.run import resume_experiment, run_experiment
    from silotune.record.runs import RunFolder

    if threads is not None:
        torch.set_num_threads(threads)
    if (path / "config.json").is_file():
        _wait_until_free(RunFolder(path))
        resume_experiment(path, observer=observer)
        return
    if path.is_dir():  # it was killed before its configuration was written, so nothing in it counts
        RunFolder(path).clear()
    document = {**config, "record": {**config["record"], "folder": str(path.parent), "name": path.name}}
    if threads is not None and config["training"]["threads"] is None:
        document["training"] = {**config["training"], "threads": threads}
    run_experiment(from_mapping(document), observer=observer)


def _wait_until_free(folder: Any) -> None:
    """Waits until a worker of a grid that was killed a moment ago has ended by itself."""
    limit = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            with folder.lock():
                return
        except RunFolderError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)
