"""Shows how a grid goes on: a bar for all cells and one for each running one, or one plain line a cell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import TaskID

from silotune.cli.output import say_to
from silotune.cli.progress import bars_with_time, figure_text
from silotune.record.grids import Cell
from silotune.report.runs import seconds_text


class GridProgress:
    """A watcher of a grid, for use in a ``with`` block."""

    def __init__(self, console: Console, *, is_silent: bool, again: str) -> None:
        self._console, self._is_silent, self._again = console, is_silent, again
        self._began: dict[str, float] = {}
        self._last: dict[str, dict[str, list[Mapping[str, Any]]]] = {}  # cell -> mode -> metrics of its parts
        self._count = [0, 0]  # cells finished, cells in all
        self._bars = _Bars(console) if console.is_terminal and not is_silent else None

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.progress.stop()
        if isinstance(error, KeyboardInterrupt):
            self._say(f"interrupted; {self._again}")

    def _say(self, text: str) -> None:
        if not self._is_silent:
            say_to(self._console, text)

    def stage(self, title: str, *, total: int, done: int) -> None:
        """A stage begins."""
        self._count = [done, total]
        self._say(f"{title}: {total}, {done} of them done before")
        if self._bars:
            self._bars.stage(title, total=total, done=done)

    def cell(self, cell: Cell, what: str, fields: Mapping[str, Any]) -> None:
        """Something happened to a cell."""
        name = cell.folder
        if what == "started":
            self._began[name] = time.monotonic()
        elif what == "event" and fields.get("event") == "mode_finished":
            self._last.setdefault(name, {}).setdefault(fields["mode"], []).append(fields.get("metrics") or {})
        if self._bars:
            self._bars.cell(cell, what, fields)
        if what in ("done", "failed"):
            self._count[0] += 1
            seconds = seconds_text(time.monotonic() - self._began.pop(name))
            ended = self._last.pop(name, {})
            outcome = _outcome(ended) if what == "done" else f"FAILED: {fields['reason']}"
            self._say(f"[{self._count[0]}/{self._count[1]}] {cell.title}: {outcome}, {seconds}")


def _outcome(ended: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each mode with its figure; of institutions that each train alone, with the mean over them."""
    return ", ".join(f"{mode} {figure_text(_mean(parts))}".strip() for mode, parts in ended.items()) or "done"


def _mean(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every figure that all parts have."""
    numbers = {name: [part[name] for part in parts] for name in parts[0] if all(name in part for part in parts)}
    return {name: fmean(own) for name, own in numbers.items() if all(isinstance(one, (int, float)) for one in own)}


class _Bars:
    """The bars of a terminal."""

    def __init__(self, console: Console) -> None:
        self.progress = bars_with_time(console)
        self._all: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}

    def stage(self, title: str, *, total: int, done: int) -> None:
        if self._all is not None:
            self.progress.remove_task(self._all)
        self._all = self.progress.add_task(title, total=total, completed=done, state=f"{done}/{total}")

    def cell(self, cell: Cell, what: str, fields: Mapping[str, Any]) -> None:
        name = cell.folder
        if what == "started":
            self._tasks[name] = self.progress.add_task(cell.title, total=None, state="loading")
        elif what == "event":
            self._event(name, fields)
        elif what in ("done", "failed"):
            self.progress.remove_task(self._tasks.pop(name))
            if self._all is not None:
                self.progress.advance(self._all)
                row = self.progress.tasks[self.progress.task_ids.index(self._all)]
                self.progress.update(self._all, state=f"{int(row.completed)}/{int(row.total or 0)}")

    def _event(self, name: str, fields: Mapping[str, Any]) -> None:
        if fields["event"] != "round_finished":
            return
        who = f"{fields['mode']} {fields.get('client', '')}".strip()
        state = f"{who} {figure_text(fields.get('metrics'))}"
        self.progress.update(self._tasks[name], total=fields["rounds"], completed=fields["round"], state=state.strip())
