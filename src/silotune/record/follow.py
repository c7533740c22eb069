"""Follows the files of a run folder that somebody else writes: reads only what is new, and trusts nothing in it.

A reader of its own beside ``files.py``, because a page that is shown must survive what a run must refuse: a broken line
is told and passed over, a torn last one is waited for, and a file that was replaced, as a resumed run replaces its
rows, is read anew.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError
from silotune.record.files import explained

MOST_DOCUMENT = 32 << 20
"""Bytes of a JSON document beyond which it is none of ours."""
LONGEST_LINE = 8 << 20
MOST_FAULTS = 20
_STEP = 8 << 20


@dataclass(slots=True)
class Rows:
    """The rows of a ``.jsonl`` file, followed.

    Attributes:
        path: The file, which need not be there yet.
        faults: A line for people about each line that is no row.
        number: Whole lines that were read.
    """

    path: Path
    faults: list[str] = field(default_factory=list)
    number: int = 0
    _place: int = 0
    _file: tuple[int, int] = (0, 0)

    def new_lines(self) -> tuple[bool, list[bytes]]:
        """Whether the file is another one than before, so that all known of it is void; and the whole new lines.

        Raises:
            RunFolderError: The file may not be read.
        """
        with explained(self.path):
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            except FileNotFoundError:
                return self._begin_anew((0, 0)), []
            try:
                about = os.fstat(descriptor)
                if not stat.S_ISREG(about.st_mode):
                    raise RunFolderError(f"{str(self.path)!r} is not a file of rows")
                file = (about.st_dev, about.st_ino)
                is_other = self._begin_anew(file) if file != self._file or about.st_size < self._place else False
                return is_other, self._whole_lines(descriptor, about.st_size)
            finally:
                os.close(descriptor)

    def _begin_anew(self, file: tuple[int, int]) -> bool:
        was_read = self._place > 0
        self._file, self._place, self.number = file, 0, 0
        self.faults.clear()
        return was_read

    def _whole_lines(self, descriptor: int, size: int) -> list[bytes]:
        lines: list[bytes] = []
        rest = b""
        while self._place + len(rest) < size:
            more = os.pread(descriptor, _STEP, self._place + len(rest))
            if not more:
                break
            whole, end, rest = (rest + more).rpartition(b"\n")
            if end:
                lines.extend(whole.split(b"\n"))
                self._place += len(whole) + 1
            elif len(rest) > LONGEST_LINE:  # not written by a run: passed over as one broken line
                lines.append(b"")
                self._place, rest = size, b""
        return lines

    def new_rows(self) -> tuple[bool, list[dict[str, Any]]]:
        """As ``new_lines``, each line as a row; those that are none are empty, and told in ``faults``.

        Raises:
            RunFolderError: The file may not be read.
        """
        is_other, lines = self.new_lines()
        try:  # all at once, which takes half the time
            rows = json.loads(b"[" + b",".join(lines) + b"]")
        except (ValueError, RecursionError):
            rows = []
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            self.number += len(lines)
            return is_other, rows
        return is_other, [self.parsed(line) for line in lines]

    def parsed(self, line: bytes) -> dict[str, Any]:
        """A line as a row; an empty one, and a fault, where it is none."""
        self.number += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return row
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(f"line {self.number} of {self.path.name} is not a JSON object: it is left out")
        return {}


@dataclass(slots=True)
class Document:
    """A JSON file that is replaced whole, followed.

    Attributes:
        path: The file, which need not be there yet.
        value: What it holds, of a mapping; empty while there is none.
        fault: Why it cannot be used, in one line; empty where it can.
    """

    path: Path
    value: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    _seen: tuple[int, int, int] | None = None

    def refresh(self) -> bool:
        """Reads the file where it is another one than before; tells whether it was."""
        try:
            about = self.path.lstat()
            now = (about.st_ino, about.st_mtime_ns, about.st_size)
            if now == self._seen:
                return False
            self._seen, self.value, self.fault = now, {}, ""
            if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_DOCUMENT:
                self.fault = f"{self.path.name} is not a file of a run"
                return True
            read = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            was_there = self._seen is not None
            self._seen, self.value, self.fault = None, {}, ""
            return was_there
        except OSError as error:
            self.fault = f"{self.path.name} cannot be read: {error.strerror or error}"
            return True
        except (ValueError, RecursionError):
            self.fault = f"{self.path.name} is not valid JSON: it was changed or damaged"
            return True
        self.value = read if isinstance(read, dict) else {}
        self.fault = "" if isinstance(read, dict) else f"{self.path.name} is not a JSON object"
        return True


def last_lines(path: Path, *, most_bytes: int) -> list[bytes]:
    """The whole lines in the last bytes of a file; none where there is no such file.

    Raises:
        RunFolderError: It may not be read.
    """
    with explained(path):
        if path.is_symlink() or not path.is_file():
            return []
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size - most_bytes)
            file.seek(start)
            lines = file.read(most_bytes).split(b"\n")[:-1]
    return lines[1:] if start else lines


def is_held(lock: Path, *, read_locks: Callable[[], str] | None = None) -> bool | None:
    """Whether a process of this machine holds a run's lock file; None where the system does not say.

    The lock is only looked at: taking it, if only for a moment, would stop a run that begins just then. A file system
    in layers may report another device than the kernel's list, so the process that the file names counts, too.

    Args:
        lock: The file.
        read_locks: Gives the system's list of locks; ``/proc/locks`` when None.
    """
    try:
        about = lock.stat()
        process, _, machine = lock.read_bytes()[:300].decode("ascii", "replace").strip().partition(" on ")
        text = (read_locks or _system_locks)()
    except OSError:
        return None
    if machine != os.uname().nodename:
        return None
    device, inode = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}", str(about.st_ino)
    held = (line.split() for line in text.splitlines() if " FLOCK " in line)
    found = [(parts[4], *parts[5].rsplit(":", 1)) for parts in held if len(parts) > 5]
    return any(own == inode and (where == device or owner == process) for owner, where, own in found)


def _system_locks() -> str:
    return Path("/proc/locks").read_text(encoding="ascii", errors="replace")
