"""Grid folders: the only module that reads and writes the folder in which the runs of a grid lie.

A grid folder holds ``grid.json`` (the cells that belong to the grid now), a run folder a cell below ``cells/`` and
``tuning/``, ``tuning.json`` (which hyper-parameters were chosen on what figures), ``failures.json``, and
``sessions.jsonl`` with one row each time the grid was worked on. Run folders of cells that a changed grid file no
longer names stay where they are and are not read.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, get_args

from silotune.errors import RunFolderError
from silotune.record.chain import has_ended
from silotune.record.files import append_line, explained, read_json, read_lines, to_line, write_bytes, write_json
from silotune.record.runs import RunFolder
from silotune.settings.sections import Metric

GRID, TUNING, FAILURES, SESSIONS = "grid.json", "tuning.json", "failures.json", "sessions.jsonl"
GIVEN, KNOWN = "grid.toml", "known.csv"
"""The grid file as it was given; rows of cells that were run elsewhere."""
_SHORT = 10


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One run of a grid.

    Attributes:
        task: Name of an entry of the grid's list of tasks; likewise the next four.
        seed: The run's seed.
        modes: What the run trains; baselines that do not depend on the algorithm are trained once.
        folder: Its run folder, relative to the grid folder.
        digest: Of its resolved configuration, record and threads left out.
        portable: The same without the folders of this machine; empty for a grid of an earlier version.
    """

    task: str
    model: str
    adapter: str
    algorithm: str
    partition: str
    seed: int
    modes: tuple[str, ...]
    folder: str
    digest: str
    portable: str = ""

    @property
    def title(self) -> str:
        """The cell in words."""
        return ", ".join((self.task, self.model, self.adapter, self.algorithm, self.partition, f"seed {self.seed}"))


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of what decides a run's figures: its resolved configuration without where it is kept and threads."""
    training = {key: value for key, value in config["training"].items() if key != "threads"}
    decisive = {**{key: value for key, value in config.items() if key != "record"}, "training": training}
    text = json.dumps(decisive, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def portable_digest(config: Mapping[str, Any]) -> str:
    """The same of a configuration whose model and files are named as they are called, wherever they lie."""
    model = {**config["model"], "name": PurePath(config["model"]["name"]).name}
    named = {key: PurePath(value).name for key in _PLACES if (value := config["data"].get(key)) is not None}
    return config_digest({**config, "model": model, "data": {**config["data"], **named}})


_PLACES = ("root", "train", "validation", "test")
"""Keys of ``[data]`` that name files of a machine."""


def cell_folder(stage: str, names: Sequence[str], digest: str) -> str:
    """Name of a cell's run folder: readable, and different whenever its configuration is different."""
    text = "-".join(name.rstrip("/").rsplit("/", 1)[-1] for name in names)
    slug = "".join(char if char.isascii() and (char.isalnum() or char in "._") else "-" for char in text)
    return f"{stage}/{slug.lstrip('.-')[:120]}-{digest[:_SHORT]}"


def is_grid(path: str | Path) -> bool:
    """Whether ``path`` is a grid folder, if only of a grid that was stopped before its first cell."""
    return (Path(path) / GRID).is_file() or ((Path(path) / GIVEN).is_file() and (Path(path) / "tuning").is_dir())


@dataclass(frozen=True, slots=True)
class GridFolder:
    """A grid folder."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> GridFolder:
        """The grid folder at ``path``.

        Raises:
            RunFolderError: There is none.
        """
        if not is_grid(path):
            raise RunFolderError(f"{str(path)!r} is not a grid folder: it holds no {GRID}")
        if not (Path(path) / GRID).is_file():
            raise RunFolderError(
                f"{str(path)!r} is a grid that has run no cell yet: 'silotune benchmark' goes on with it"
            )
        return cls(Path(path))

    @classmethod
    def make(cls, path: str | Path) -> GridFolder:
        """A grid folder at ``path``, made when it is not there.

        Raises:
            RunFolderError: There is a folder of something else.
        """
        place = Path(path)
        with explained(place):
            is_unlisted = place.exists() and not (place / GRID).is_file()
            strangers = sorted(entry.name for entry in place.iterdir()) if is_unlisted else []
            own = {"cells", "tuning", ".lock", GIVEN, KNOWN, GRID, TUNING, FAILURES, SESSIONS}
            strangers = [name for name in strangers if name not in own and not name.endswith(".tmp")]
            if strangers:
                raise RunFolderError(
                    f"{str(path)!r} holds {strangers[0]!r} and is no grid folder: give another with --out"
                )
            place.mkdir(parents=True, exist_ok=True)
        return cls(place)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one process that works on the grid.

        Raises:
            RunFolderError: Another process holds it.
        """
        with RunFolder(self.path).lock():
            yield

    def write(self, description: Mapping[str, Any], cells: Sequence[Cell]) -> None:
        """Writes what the grid is now: a description for readers and its cells."""
        write_json(self.path / GRID, {**description, "cells": [asdict(cell) for cell in cells]})

    def description(self) -> dict[str, Any]:
        """What ``write`` was given, the cells left out."""
        found: dict[str, Any] = read_json(self.path / GRID)
        return {name: value for name, value in found.items() if name != "cells"}

    def cells(self) -> list[Cell]:
        """The cells of the grid, in its order.

        Raises:
            RunFolderError: ``grid.json`` is missing or damaged.
        """
        found = read_json(self.path / GRID)
        try:
            return [Cell(**{**cell, "modes": tuple(cell["modes"])}) for cell in found["cells"]]
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{str(self.path / GRID)!r} is not one of this version: {error}") from None

    def run(self, cell: Cell) -> RunFolder:
        """The cell's run folder, which need not be there yet."""
        return RunFolder(self.path / cell.folder)

    def finished(self) -> list[RunFolder]:
        """All runs that have ended, trials and those of cells that the grid no longer has among them."""
        places = [place for top in ("cells", "tuning") for place in sorted((self.path / top).glob("*"))]
        return [RunFolder(place) for place in places if RunFolder(place).has("summary")]

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has run to its end with the configuration that the grid gives it.

        Raises:
            RunFolderError: Its run folder was made with another configuration, which its name does not say.
        """
        folder = self.run(cell)
        if not folder.has("config"):
            return False
        if config_digest(folder.read_json("config")) != cell.digest:
            raise RunFolderError(
                f"{str(folder.path)!r}: its config.json was changed; remove the folder to run it again"
            )
        return has_ended(folder.path)

    def add_known(self, source: Path) -> None:
        """Keeps the finished cells' rows of a report's ``cells.csv``, to be read in place of their runs.

        Raises:
            RunFolderError: The file is none, or of a version that does not say what a cell was run with.
        """
        rows = self.known(source)
        text = io.StringIO(newline="")
        heads = dict.fromkeys(name for row in rows.values() for name in row)
        writer = csv.DictWriter(text, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write_bytes(self.path / KNOWN, text.getvalue().encode())

    def known(self, more: Path | None = None) -> dict[tuple[str, str], dict[str, str]]:
        """Rows of cells that were run elsewhere, by what they were run with and mode; with those of another file.

        Raises:
            RunFolderError: As ``add_known``.
        """
        places = [place for place in (self.path / KNOWN,) if place.is_file()] + ([] if more is None else [more])
        return {key: row for place in places for key, row in _finished_rows(place).items()}

    def undone(self) -> list[Cell]:
        """The cells without figures: neither run to their end, nor among the rows of cells that were run elsewhere."""
        known = self.known()
        return [cell for cell in self.cells() if not self.is_done(cell) and not is_known(cell, known)]

    def write_tuning(self, tuning: Mapping[str, Any]) -> None:
        """Writes which hyper-parameters were chosen, and on what figures."""
        write_json(self.path / TUNING, tuning)

    def tuning(self) -> dict[str, Any] | None:
        """What was chosen; None for a grid that tunes nothing."""
        place = self.path / TUNING
        found: dict[str, Any] | None = read_json(place) if place.is_file() else None
        return found

    def write_failures(self, failures: Mapping[str, str]) -> None:
        """Writes why cells have no result: cell's folder -> one line."""
        write_json(self.path / FAILURES, failures)

    def failures(self) -> dict[str, str]:
        """Why cells have no result, by the cell's folder."""
        place = self.path / FAILURES
        found: dict[str, str] = read_json(place) if place.is_file() else {}
        return found

    def add_session(self, session: Mapping[str, Any]) -> None:
        """Adds a row about one time that the grid was worked on."""
        append_line(self.path / SESSIONS, to_line(session))

    def sessions(self) -> list[dict[str, Any]]:
        """The rows of ``add_session``."""
        return read_lines(self.path / SESSIONS)

    def keep_file(self, source: Path) -> None:
        """Keeps the grid file as it was given, to be read by people."""
        with explained(source):
            content = source.read_bytes()
        write_bytes(self.path / GIVEN, content)


def is_known(cell: Cell, known: Mapping[tuple[str, str], Mapping[str, str]]) -> bool:
    """Whether all modes of a cell stand among the rows of cells that were run elsewhere."""
    return bool(cell.portable) and all((cell.portable, mode) in known for mode in cell.modes)


def _finished_rows(source: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a report's ``cells.csv`` that have figures, by what they were run with and mode.

    Raises:
        RunFolderError: The file is none, is of another version, or holds what no report writes.
    """
    try:
        with explained(source):
            content = source.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(content, newline=""), restval="")
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        rows, reader = [], csv.DictReader(())
    if not {"key", "mode", "status", "metric"} <= set(reader.fieldnames or ()):
        raise RunFolderError(f"{str(source)!r} is no cells.csv of a report of this version")
    found = {}
    for number, row in enumerate(rows, start=1):
        if row["status"] == "done" and row["key"]:
            odd = next((name for name, value in row.items() if not _is_of_report(name, value)), "")
            if odd != "":
                raise RunFolderError(
                    f"{str(source)!r}: row {number}: {odd or 'a cell without a heading'} is not what a report writes: "
                    "take the row out, and the cell is run again"
                )
            found[row["key"], row["mode"]] = row
    return found


_TEXTS = (
    "task", "model", "adapter", "algorithm", "partition", "mode", "status", "reason", "energy_source",
    "energy_method", "folder", "key",
)  # fmt: skip
"""Columns of ``cells.csv`` that hold words; ``_PARTED`` hold JSON, and all others numbers."""
_PARTED = ("per_class", "by_client")


def _is_of_report(name: str | None, value: Any) -> bool:
    if name is None:  # cells beyond the heading
        return False
    if name == "metric":
        return value in get_args(Metric)
    try:
        parts = json.loads(value or "{}") if name in _PARTED else {name: value or 0}
        return name in _TEXTS or all(math.isfinite(float(part)) for part in parts.values())
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False
