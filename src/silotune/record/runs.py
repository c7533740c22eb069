"""Run folders: the only module that reads and writes the folder in which a run leaves its traces.

A run folder holds ``config.json`` (resolved) and ``versions.json``; then JSON values, rows in ``.jsonl`` files,
checkpoints and an adapter, in the folder itself or in parts of it such as ``federated/``. Whoever writes holds
its lock. Each file is replaced whole, so a run killed at any moment can be read and resumed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError
from silotune.record import checkpoints
from silotune.record.environment import versions
from silotune.record.files import (
    append_line,
    explained,
    mend,
    new_folder,
    read_json,
    read_lines,
    remove_temporary,
    temporary_beside,
    to_line,
    write_bytes,
    write_json,
)
from silotune.record.tensor_files import read_tensors, write_tensors
from silotune.settings.base import NAME, NAME_RULE
from silotune.structs import ServerState, SiteState, Tensors

_CONFIG, _VERSIONS, _LOCK = "config", "versions", ".lock"
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, _ADAPTER_CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder or a part of one; ``path`` need not exist before something is written."""

    path: Path

    @classmethod
    def create(
        cls, root: Path, name: str, *, config: Mapping[str, Any], plugins: Mapping[str, str] | None = None
    ) -> RunFolder:
        """Makes ``root/name``, or ``name-2``, ``name-3`` when taken, with ``config.json`` and ``versions.json``.

        Args:
            root: Where run folders are made.
            name: Of this one.
            config: The run's configuration.
            plugins: The packages whose plug-ins it uses -> their versions.

        Raises:
            RunFolderError: The name is not one, the disk is full, or the folder may not be written.
        """
        place = Path(root) / checked_name(name)
        with explained(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        building = temporary_beside(place)
        try:
            with explained(place):
                building.mkdir()
            made = cls(building)
            made.write_json(_VERSIONS, {**versions(), "plugins": dict(plugins or {})})
            made.write_json(_CONFIG, config)
            with explained(place):
                return cls(_moved_to_free(building, place))
        finally:
            shutil.rmtree(building, ignore_errors=True)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run folder at ``path``.

        Raises:
            RunFolderError: There is none.
        """
        place = Path(path)
        with explained(place):
            if not place.is_dir():
                raise RunFolderError(f"{str(path)!r} is not a folder: give the run folder that 'silotune run' printed")
            if not (place / "config.json").is_file():
                raise RunFolderError(f"{str(path)!r} is not a run folder: it holds no config.json")
        return cls(place)

    def clear(self) -> None:
        """Removes a folder in which no run has begun, as a process that died while making it leaves one.

        Raises:
            RunFolderError: There is a configuration in it: a run has begun.
        """
        if self.has(_CONFIG):
            raise RunFolderError(f"{str(self.path)!r} holds a run: it is not removed")
        with explained(self.path):
            shutil.rmtree(self.path)

    def part(self, *names: str) -> RunFolder:
        """A folder inside, such as ``part("isolated", "client-0")``; it is made when something is written."""
        return RunFolder(self.path.joinpath(*(checked_name(name) for name in names)))

    def parts(self) -> list[str]:
        """Names of the folders inside that ``part`` can give, sorted; checkpoints and adapter left out."""
        with explained(self.path):
            found = [path for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []
        marks = (_ADAPTER_CONFIG, checkpoints.STATE)
        parts = [path.name for path in found if not any((path / mark).exists() for mark in marks)]
        return sorted(name for name in parts if NAME.fullmatch(name))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one writer; the system frees it when the process ends, however it ends.

        Raises:
            RunFolderError: Another process holds it.
        """
        place = self.path / _LOCK
        with explained(place):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(descriptor)
            remove_temporary(self.path)
            yield
        finally:
            os.close(descriptor)

    def mend(self) -> list[str]:
        """Cuts torn last lines of the folder's files of rows; gives a note about each. Call it within ``lock``.

        A file with a lock of its own, such as a privacy ledger, is left to the code that takes that lock.
        """
        with explained(self.path):
            found = sorted(self.path.rglob("*.jsonl"))
            own = [path for path in found if not path.with_name(f".{path.stem}{_LOCK}").exists()]
        return [note for note in map(mend, own) if note]

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunFolderError(f"cannot lock {str(self.path)!r}: {error.strerror}") from None
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
            raise RunFolderError(
                f"{str(self.path)!r} is in use by process {holder}: wait until it ends, or end it first"
            ) from None
        with explained(self.path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def _file(self, name: str, ending: str) -> Path:
        return self.path / f"{checked_name(name)}{ending}"

    def has(self, name: str) -> bool:
        """True when ``write_json`` or ``append`` wrote something under this name."""
        return self._file(name, ".json").is_file() or self._file(name, ".jsonl").is_file()

    def write_json(self, name: str, value: Any) -> None:
        """Writes ``<name>.json``; NaN and infinities become null."""
        write_json(self._file(name, ".json"), value)

    def read_json(self, name: str) -> Any:
        """The value in ``<name>.json``.

        Raises:
            RunFolderError: It is missing or broken.
        """
        return read_json(self._file(name, ".json"))

    def is_of_sites(self) -> bool:
        """Whether the training examples are at sites, so that nobody here knows who holds what."""
        return self.has("partition") and "clients" not in self.read_json("partition")

    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Adds rows to ``<name>.jsonl``; on return they are on the disk."""
        append_line(self._file(name, ".jsonl"), b"".join(to_line(row) for row in rows))

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of ``<name>.jsonl``, none when missing; a torn last line is left out.

        Raises:
            RunFolderError: Another line is broken.
        """
        return read_lines(self._file(name, ".jsonl"))

    def keep_rounds(self, name: str, last_round: int) -> None:
        """Drops the rows of ``<name>.jsonl`` whose ``round`` is above ``last_round``, as a resumed run needs."""
        place = self._file(name, ".jsonl")
        if place.exists():
            kept = [row for row in read_lines(place) if row.get("round", 0) <= last_round]
            write_bytes(place, b"".join(to_line(row) for row in kept))

    def save_checkpoint(
        self,
        server: ServerState,
        sites: Mapping[str, SiteState],
        *,
        announce: Callable[[str], None] = lambda sha256: None,
    ) -> None:
        """Writes ``checkpoint-<round>`` whole, then removes older ones; sites with an empty state are left out.

        ``announce`` is called with its hash before it appears.
        """
        checkpoints.save(self.path, server, sites, announce=announce)

    def load_checkpoint(self) -> tuple[ServerState, dict[str, SiteState]] | None:
        """The states of the newest complete checkpoint, bit for bit; None when there is none."""
        return checkpoints.load(self.path)

    def keep_tensors(self, name: str, tensors: Tensors) -> None:
        """Writes ``updates/<name>.safetensors``, whole; each name begins with its position, as the format sorts
        names."""
        place = self.path / "updates" / f"{checked_name(name)}.safetensors"
        numbered = {f"{number:06d}/{key}": tensor for number, (key, tensor) in enumerate(tensors.items())}
        with explained(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(place)
            try:
                write_tensors(temporary, numbered)
                temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)

    def kept_tensors(self, name: str) -> Tensors:
        """What ``keep_tensors`` wrote, names in their order.

        Raises:
            RunFolderError: It is missing or broken.
        """
        kept = read_tensors(self.path / "updates" / f"{checked_name(name)}.safetensors")
        return {key.partition("/")[2]: kept[key] for key in sorted(kept)}

    def save_adapter(self, tensors: Tensors, config: Mapping[str, Any], *, card: str) -> None:
        """Writes ``adapter/`` in peft's own format.

        Args:
            tensors: Names as peft stores them in ``adapter_model.safetensors``.
            config: The values of ``adapter_config.json``.
            card: Text of the model card, ``README.md``.
        """
        with new_folder(self.path / "adapter") as building:
            write_tensors(building / _ADAPTER_WEIGHTS, tensors)
            write_json(building / _ADAPTER_CONFIG, config)
            write_bytes(building / _ADAPTER_CARD, card.encode())

    def load_adapter(self) -> tuple[Tensors, dict[str, Any]]:
        """The tensors and the configuration in ``adapter/``.

        Raises:
            RunFolderError: There is none, or it is broken.
        """
        config = read_json(self.path / "adapter" / _ADAPTER_CONFIG)
        return read_tensors(self.path / "adapter" / _ADAPTER_WEIGHTS), config

    def copy_adapter(self, out: Path) -> None:
        """Copies the files that ``save_adapter`` writes, and nothing else that stands beside them.

        Raises:
            RunFolderError: One is missing, or is a link: a folder from elsewhere may name any file of this machine.
        """
        for name in (_ADAPTER_WEIGHTS, _ADAPTER_CONFIG, _ADAPTER_CARD):
            place = self.path / "adapter" / name
            if place.is_symlink() or not place.is_file():
                raise RunFolderError(f"{str(place)!r} is not a file of its own: the adapter is not whole")
            with explained(out / name):
                shutil.copyfile(place, out / name)


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a run folder, rather than a model's folder or name."""
    return (Path(path) / "config.json").is_file() and (Path(path) / "versions.json").is_file()


def checked_name(name: str) -> str:
    """The name, which stays within the folder that it is put in.

    Raises:
        RunFolderError: It cannot name a file or a folder of a run.
    """
    if not NAME.fullmatch(name):
        raise RunFolderError(f"{name!r} cannot name a file of a run: {NAME_RULE}")
    return name


def _moved_to_free(building: Path, place: Path) -> Path:
    """Moves a folder, whole, to the first of ``place``, ``place-2``, ``place-3``, ... that is not there yet."""
    for number in itertools.count(1):
        free = place if number == 1 else place.with_name(f"{place.name}-{number}")
        if free.exists():
            continue
        try:
            return building.rename(free)
        except OSError as error:  # another run was faster: its folder is not empty
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    raise AssertionError("unreachable: the count has no end")
