"""What a dashboard shows: the runs and grids below a folder, found as they appear and followed; nothing is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from silotune.dashboard.grids import WatchedGrid
from silotune.errors import RunFolderError
from silotune.record.files import explained
from silotune.record.grids import is_grid
from silotune.record.printable import one_line
from silotune.record.runs import is_run
from silotune.report.watched import WatchedRun

DEEPEST, MOST_FOUND, MOST_LOOKED_AT = 3, 2000, 20_000
"""How far below the folder runs are looked for, how many are shown, and how many folders are looked into."""
LOOK_SECONDS, REST_SECONDS = 1.0, 2.0
"""How often new folders are looked for, and how often a run that has ended is looked at."""
LOOK_REST = 20
"""Where looking takes long, as below a home folder, it is done for a twentieth of the time."""


@dataclass(slots=True)
class Board:
    """The runs and grids below a folder.

    Attributes:
        folder: Where they are looked for: a folder of runs, one run, or one grid.
        runs: Place below the folder -> run; those of a grid's cells among them.
        grids: Place below the folder -> grid.
        version: Goes up whenever something that is shown has changed.
    """

    folder: Path
    runs: dict[str, WatchedRun] = field(default_factory=dict)
    grids: dict[str, WatchedGrid] = field(default_factory=dict)
    version: int = 0
    _next_look: float = 0.0
    _rested: float = 0.0

    @classmethod
    def open(cls, folder: Path, *, may_be_empty: bool = False) -> Board:
        """A board over a folder, with all that is in it now.

        Raises:
            RunFolderError: There is no such folder, or no run and no grid in it.
        """
        with explained(folder):
            if not folder.is_dir() and not may_be_empty:
                raise RunFolderError(f"{str(folder)!r} is not a folder: give a folder of runs, a run or a grid")
        board = cls(folder)
        board.refresh()
        if not board.runs and not board.grids and not may_be_empty:
            raise RunFolderError(
                f"{str(folder)!r} holds no run and no grid: give the folder in which 'silotune run' or 'silotune "
                "benchmark' has put one"
            )
        return board

    @property
    def single(self) -> str:
        """``run`` or ``grid`` where the folder itself is one; else empty."""
        return "run" if "." in self.runs else "grid" if "." in self.grids else ""

    def refresh(self, only: str | None = None) -> None:
        """Reads what is new, of one run or of all; those that have ended are looked at less often."""
        now = time.monotonic()
        if now >= self._next_look:
            self._look()
            took = time.monotonic() - now
            self._next_look = now + max(LOOK_SECONDS, LOOK_REST * took)
        is_due = now - self._rested >= REST_SECONDS
        if only is not None:
            self.version += only in self.runs and self.runs[only].refresh()
            return
        self._rested = now if is_due else self._rested
        for run in list(self.runs.values()):
            if (is_due or run.state != "finished") and run.refresh():
                self.version += 1
        for grid in self.grids.values():
            self.version += grid.refresh()

    def _look(self) -> None:
        """Takes up folders that have appeared, and lets go of those that are gone."""
        found = dict(self._found())
        for key in [*self.runs.keys() - found.keys(), *self.grids.keys() - found.keys()]:
            self.runs.pop(key, None)
            self.grids.pop(key, None)
            self.version += 1
        for key, place in found.items():
            if is_run(place) and key not in self.runs:
                self.version += 1
                self.runs[key] = WatchedRun(place, self.version)  # beyond that of a run that was here before
            elif key not in self.grids and not is_run(place):
                self.grids[key] = WatchedGrid(place)
                self.version += 1

    def _found(self) -> Iterator[tuple[str, Path]]:
        """Place below the folder and path of each run and grid; links to folders are not followed."""
        waiting, looked, found = [(self.folder, 0)], 0, 0
        while waiting and looked < MOST_LOOKED_AT and found < MOST_FOUND:
            place, depth = waiting.pop(0)
            looked += 1
            is_one = is_run(place)
            if is_one or is_grid(place):
                found += 1
                yield one_line(place.relative_to(self.folder).as_posix()), place
            if not is_one and depth < DEEPEST:
                waiting.extend((below, depth + 1) for below in _folders(place))


def _folders(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            names = [each.name for each in entries if each.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [place / name for name in sorted(names) if not name.startswith(".")]
