"""Starts, watches and stops the processes of a coordinator or a site, each by its own id and with a log of its own."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from silotune.errors import FederationError
from silotune.quiet import VARIABLES
from silotune.record.files import explained
from silotune.record.printable import one_line, printable

STOP_SECONDS = 20.0
"""A process that was asked to end and has not ended after this time is killed."""
_PARENT = "SILOTUNE_PARENT"
_SET_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG
_MOST_BYTES_OF_LOG = 10_000_000

ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Child:
    """A process that silotune starts: what it runs, where it writes, and the process itself once it is started.

    Attributes:
        name: In logs and errors.
        arguments: Of ``python -m``.
        log: What it prints; beyond ten million bytes it goes into a file ``.old`` in place of the one before.
        process: None before the first start.
        starts: How often it was started.
    """

    name: str
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _next: float = field(default=0.0, repr=False)

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs or before its start."""
        return None if self.process is None else self.process.poll()

    def start(self) -> None:
        """Starts it; secrets are in files of the kit, never in arguments."""
        with explained(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.shorten_log()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.arguments], stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor,
                process_group=0,  # Ctrl-C in a terminal is for the parent, which ends its children in order
                env={**VARIABLES, **os.environ, **ENVIRONMENT, _PARENT: str(os.getpid())},
            )  # fmt: skip
        finally:
            os.close(descriptor)
        self.starts += 1
        self._next = time.monotonic() + min(30.0, 0.5 * 2 ** min(self.starts, 10))

    def keep_up(self) -> bool:
        """Starts it again when it has ended, after a pause that grows; True when it was started. Shortens its log."""
        self.shorten_log()
        if self.is_running or time.monotonic() < self._next:
            return False
        self.start()
        return True

    def shorten_log(self) -> None:
        """Puts a log that has grown long aside and begins it anew, while the process goes on writing at its end.

        On a full disk what was said is lost, and the room is free: a log must not end a process.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size <= _MOST_BYTES_OF_LOG:
                return
            old = self.log.with_suffix(".old")
            try:
                shutil.copyfile(self.log, old)
                old.chmod(0o600)
            except OSError:
                old.unlink(missing_ok=True)
            os.truncate(self.log, 0)

    def stop(self, *, limit_seconds: float = STOP_SECONDS) -> None:
        """Asks it to end, and kills it when it has not within the limit."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def last_line(self) -> str:
        """What it printed last, for an error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")


class _Plain(logging.Formatter):
    """One line for each entry, apart from tracebacks, without characters that control the reader's terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is of logging
        return one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stdout() -> None:
    """Logs to standard output, with the time; what a child process prints goes into its log."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("silotune").setLevel(logging.INFO)


def follow_parent() -> None:
    """Ends this process when the process that started it as a ``Child`` ends, in whatever way."""
    parent = os.environ.get(_PARENT, "")
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    if parent != str(os.getppid()):  # it has ended already
        sys.exit(0)


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder for one process, whose id its lock file names; the system frees it when the process ends.

    Raises:
        FederationError: Another process holds it.
    """
    path = folder / "lock"
    with explained(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FederationError(f"{what} runs already as process {holder(folder)}: stop it first") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(folder: Path) -> int | None:
    """Id of the process that holds a folder; None when nobody does."""
    path = folder / "lock"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            text = file.read().strip()
            return int(text) if text.isdigit() else None
    return None


def stop_holder(folder: Path, what: str, *, limit_seconds: float = 60.0) -> None:
    """Asks the process that holds a folder to end, and waits until it has.

    Raises:
        FederationError: Nobody holds it, or it did not end within the limit.
    """
    process = holder(folder)
    if process is None:
        raise FederationError(f"{what} does not run")
    os.kill(process, signal.SIGTERM)
    limit = time.monotonic() + limit_seconds
    while holder(folder) is not None:
        if time.monotonic() > limit:
            raise FederationError(f"{what}, process {process}, did not end within {limit_seconds:g} s")
        time.sleep(0.1)


@contextlib.contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """Within the block, SIGTERM and SIGINT are added to the list, so that a loop can end in order."""
    seen: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, lambda number, frame: seen.append(number)) for kind in kinds}
    try:
        yield seen
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
