"""The pages of a dashboard, each in sections: the list of runs, a run, a grid, a deployment."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from silotune.dashboard.board import Board
from silotune.dashboard.grids import WatchedGrid
from silotune.record.environment import version_of
from silotune.report.lines import spark
from silotune.report.rendering import TEMPLATES, environment, rendered
from silotune.report.run_page import facts, sections

if TYPE_CHECKING:
    from silotune.dashboard.deployment import Deployment

FOLDERS = (Path(__file__).parent / "templates", TEMPLATES)
MOST_ROWS = 500
_STATE_ORDER = {"running": 0, "unknown": 1, "stopped": 2, "finished": 3}


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its title, and its sections in order."""

    title: str
    sections: Mapping[str, Markup]


class Pages:
    """Makes the pages, one at a time; what has not changed since is not made again. A saved one leads nowhere."""

    def __init__(self, board: Board, deployment: Deployment | None = None, *, is_saved: bool = False) -> None:
        self.board, self.deployment, self._is_saved = board, deployment, is_saved
        self._lock = threading.Lock()
        self._made: dict[str, tuple[tuple[int, ...], Page]] = {}
        self._lines: dict[str, tuple[int, dict[str, Any]]] = {}

    def at(self, path: str, *, waits: bool = False) -> Page | None:
        """The page at a path such as ``/run/quickstart``, brought up to date; None where there is none.

        Args:
            path: Without the address of the server.
            waits: Wait for what is worked out beside a page, too.
        """
        with self._lock:
            run = self._key(path, "run")
            self.board.refresh(run)
            if run is not None:
                return self._kept(path, (self.board.runs[run].version,)) if run in self.board.runs else None
            if waits:
                for grid in self.board.grids.values():
                    grid.refresh(waits=True)
            if self.deployment is not None:
                self.deployment.refresh(waits=waits)
            known = self.deployment.version if self.deployment is not None else 0
            return self._kept(path, (self.board.version, known)) if self._is_page(path) else None

    def _key(self, path: str, kind: str) -> str | None:
        if path == "/" and self.board.single == kind:
            return "."
        return path.removeprefix(f"/{kind}/") if path.startswith(f"/{kind}/") else None

    def _is_page(self, path: str) -> bool:
        grid = self._key(path, "grid")
        return path == "/" or (path == "/deployment" and self.deployment is not None) or grid in self.board.grids

    def _kept(self, path: str, versions: tuple[int, ...]) -> Page:
        known = self._made.get(path)
        if known is None or known[0] != versions:
            if len(self._made) > MOST_ROWS:
                self._made.clear()
            known = self._made[path] = (versions, self._page(path))
        return known[1]

    def _page(self, path: str) -> Page:
        run, grid = self._key(path, "run"), self._key(path, "grid")
        if run is not None:
            return Page(self.board.runs[run].path.name, sections(self.board.runs[run]))
        if grid is not None:
            found = self.board.grids[grid]
            return Page(found.title or found.path.name, self._grid(grid, found))
        if self.deployment is not None and path in ("/", "/deployment"):
            return Page("deployment", {"deployment": self._deployment(self.deployment), **self._lists()})
        return Page("runs", self._lists())

    def _lists(self) -> dict[str, Markup]:
        """All runs that belong to no grid, and all grids."""
        cells = tuple(f"{key}/" for key in self.board.grids if key != ".")
        own = (
            {key: run for key, run in self.board.runs.items() if not key.startswith(cells)}
            if cells
            else self.board.runs
        )
        order = sorted(own.items(), key=lambda each: (_STATE_ORDER[each[1].state], -(each[1].heard or 0.0), each[0]))
        rows = [{"name": key, "address": self._address("run", key), **self._line(key)} for key, _ in order[:MOST_ROWS]]
        grids = [
            {"name": key, "address": self._address("grid", key), "title": grid.title, **_count(grid)}
            for key, grid in sorted(self.board.grids.items())
        ]
        states = [run.state for run in own.values()]
        counts = {state: states.count(state) for state in _STATE_ORDER if state in states}
        macros = _macros("lists.html.jinja")
        return {
            "runs": macros.runs(
                rows=rows, counts=counts, folder=str(self.board.folder), more=max(0, len(order) - MOST_ROWS)
            ),
            "grids": macros.grids(rows=grids),
        }

    def _line(self, key: str) -> dict[str, Any]:
        """What a line of a list says of a run, made again only where the run has changed."""
        run = self.board.runs[key]
        known = self._lines.get(key)
        if known is None or known[0] != run.version:
            known = self._lines[key] = (run.version, {**facts(run), "spark": spark(_curve(run))})
        return known[1]

    def _grid(self, key: str, grid: WatchedGrid) -> dict[str, Markup]:
        macros = _macros("grid_page.html.jinja")
        below = "" if key == "." else f"{key}/"
        cells = []
        for cell in grid.cells[:MOST_ROWS]:
            run = self.board.runs.get(below + cell.folder)
            state = "done" if cell.folder in grid.done else "failed" if cell.folder in grid.failures else ""
            state = state or ("waiting" if run is None else run.state)
            where = "" if run is None else self._address("run", below + cell.folder)
            said = None if run is None else self._line(below + cell.folder)
            cells.append({"title": cell.title, "address": where, "state": state, "facts": said})
        failures = [(cell.title, grid.failures[cell.folder]) for cell in grid.cells if cell.folder in grid.failures]
        count = _count(grid)
        return {
            "head": macros.head(
                name=grid.title or grid.path.name, folder=str(grid.path), count=count, fault=grid.fault
            ),
            "claims": macros.claims(claims=grid.claims, claimed=grid.claimed, done=count["done"]),
            "cells": macros.cells(cells=cells, more=max(0, len(grid.cells) - MOST_ROWS)),
            "failures": macros.failures(rows=failures[:MOST_ROWS]),
        }

    def _deployment(self, deployment: Deployment) -> Markup:
        rows = deployment.differing(self.board.runs)
        macros = _macros("deployment.html.jinja")
        return macros.deployment(
            name=str(deployment.kit.settings.federation),
            said=deployment.said,
            differing=rows[:MOST_ROWS],
            own=version_of("silotune") or "source tree",
            known={} if self._is_saved else {key: self._address("run", key) for key in self.board.runs},
        )

    def _address(self, kind: str, key: str) -> str:
        """Where a run or a grid is shown; empty in a file, which has no server behind it."""
        return "" if self._is_saved else f"/{kind}/{quote(key)}"

    def whole(self, path: str, page: Page) -> str:
        """A page as HTML for a browser, which then asks for what changes."""
        return rendered(
            "page.html.jinja",
            {
                "title": page.title,
                "sections": page.sections,
                "live": f"/live?page={quote(path)}",
                "has_deployment": self.deployment is not None,
                "folder": str(self.board.folder),
                "version": version_of("silotune") or "source tree",
            },
            folders=FOLDERS,
        )


def _curve(run: Any) -> list[tuple[float, float]]:
    part = run.shown
    return [] if part is None else [(float(x), y) for x, y in (part.scored or part.losses)]


def _count(grid: WatchedGrid) -> dict[str, int]:
    done = len(grid.done)
    failed = sum(cell.folder in grid.failures and cell.folder not in grid.done for cell in grid.cells)
    return {"cells": len(grid.cells), "done": done, "failed": failed, "left": len(grid.cells) - done - failed}


def _macros(name: str) -> Any:
    return environment(FOLDERS).get_template(name).module
