"""A grid folder, followed: which cells are done, and what the finished ones claim so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.errors import SilotuneError
from silotune.record.chain import has_ended
from silotune.record.grids import Cell, GridFolder
from silotune.record.printable import one_line

_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading a grid's files raises where somebody has changed them by hand."""


@dataclass(slots=True)
class WatchedGrid:
    """A grid folder, followed.

    Attributes:
        path: The folder.
        title: Of the grid.
        cells: The cells, in order.
        done: Folders of the cells that have run to their end.
        failures: Why cells have no result, by the cell's folder.
        claims: What the finished cells say so far, a sentence each; worked out beside the page, for it takes a while.
        fault: Why the grid cannot be read; empty where it can.
    """

    path: Path
    title: str = ""
    cells: Sequence[Cell] = ()
    done: frozenset[str] = frozenset()
    failures: dict[str, str] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    claimed: int = 0
    fault: str = ""
    version: int = 0
    _seen: tuple[Any, ...] = ()
    _work: threading.Thread | None = None
    _told: int = 0

    def refresh(self, *, waits: bool = False) -> bool:
        """Reads what is new; tells whether anything that is shown has changed.

        Args:
            waits: Work out the claims before going on, rather than beside it.
        """
        before = self.version
        try:
            self._read()
        except SilotuneError as error:
            self._fail(one_line(str(error)))
        except _DAMAGED:
            self._fail("grid.json is damaged: it is not that of a grid")
        if len(self.done) != self._told and (self._work is None or not self._work.is_alive()):
            self._told = len(self.done)
            self._work = threading.Thread(target=self._claim, args=(len(self.done),), daemon=True)
            self._work.start()
        if waits and self._work is not None:
            self._work.join()
        return self.version != before

    def _fail(self, fault: str) -> None:
        if fault != self.fault:
            self.fault, self.version = fault, self.version + 1

    def _read(self) -> None:
        folder = GridFolder.open(self.path)
        stamp = tuple(_stamp(self.path / name) for name in ("grid.json", "failures.json"))
        if self._seen[:2] != stamp:
            cells = folder.cells()
            if not all(isinstance(text, str) for cell in cells for text in (cell.folder, cell.title)):
                raise TypeError
            self.cells = cells
            self.title = one_line(str(folder.description().get("title") or self.path.name))
            self.failures = {one_line(str(name)): one_line(str(why)) for name, why in folder.failures().items()}
        done = frozenset(cell.folder for cell in self.cells if cell.folder in self.done or _is_done(folder, cell))
        if (*stamp, done) != self._seen:
            self._seen, self.done, self.fault = (*stamp, done), done, ""
            self.version += 1

    def _claim(self, number: int) -> None:
        """Works out the claims of the cells that are done."""
        from silotune.evaluation.comparison import compare
        from silotune.evaluation.observations import observe
        from silotune.report.findings import findings
        from silotune.report.grid import facts_of

        try:
            folder = GridFolder.open(self.path)
            said = tuple(findings(compare(observe(folder)), facts_of(folder)))
        except SilotuneError as error:
            said = (f"no claims: {one_line(str(error))}",)
        except _DAMAGED:
            said = ("no claims: a finished cell is damaged",)
        self.claims, self.claimed, self.version = said, number, self.version + 1


def _stamp(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def _is_done(folder: GridFolder, cell: Cell) -> bool:
    place = folder.run(cell).path
    return place.resolve().is_relative_to(folder.path.resolve()) and has_ended(place)
