"""Runs what is missing of a grid: first the trials that choose hyper-parameters, then the cells."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from silotune.benchmark.expand import Changes, Key, Planned, Setting, Trial, expand, trials
from silotune.benchmark.schema import AXES, Grid
from silotune.benchmark.workers import Job, run_jobs
from silotune.errors import RunFolderError
from silotune.evaluation.metrics import signed
from silotune.record.environment import cores
from silotune.record.grids import Cell, GridFolder, is_known

_UNTUNED = "no hyper-parameters: every candidate failed, tuning.json says why"


class Watcher(Protocol):
    """Is told of the progress of a grid."""

    def stage(self, title: str, *, total: int, done: int) -> None:
        """A stage with ``total`` cells begins, of which ``done`` were done before."""

    def cell(self, cell: Cell, what: str, fields: Mapping[str, Any]) -> None:
        """A cell has ``started``, had an ``event``, is ``done`` or has ``failed``."""


@dataclass(frozen=True)
class Work:
    """How a grid is worked on.

    Attributes:
        jobs: Cells side by side.
        watcher: Told of every step.
        start: Called in each worker process.
    """

    jobs: int = 1
    watcher: Watcher | None = None
    start: Callable[[], None] | None = None

    @property
    def threads(self) -> int | None:
        """CPU threads of each of several processes; None for a single process, where torch decides."""
        return None if self.jobs == 1 else max(1, cores() // self.jobs)


@dataclass
class Tally:
    """What one session of work on a grid has done."""

    skipped: int = 0
    computed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    cell_seconds: float = 0.0


def run_grid(
    grid: Grid, path: Path, changes: Changes, work: Work, *, source: Path | None = None, known: Path | None = None
) -> Tally:
    """Runs the cells of a grid that have no result yet, and keeps what is needed to go on after a kill.

    Args:
        grid: The grid.
        path: Its folder; it is made when it is not there.
        changes: What the command line adds.
        work: How to work on it.
        source: The grid file, of which a copy is kept.
        known: ``cells.csv`` of an earlier report, whose finished cells are not run again.

    Returns:
        How many cells were there, how many were computed, and why others failed.

    Raises:
        ConfigError: The configuration of a cell holds faults; nothing is run.
        RunFolderError: The folder belongs to something else, or is in use.
    """
    began = time.perf_counter()
    expand(grid, changes)  # reports all faults of all cells before anything is written
    folder = GridFolder.make(path)
    tally = Tally()
    with folder.lock():
        if source is not None:
            folder.keep_file(source)
        if known is not None:
            folder.add_known(known)
        chosen = tuned(grid, changes, folder, work, tally)
        planned = expand(grid, changes, chosen)
        cells = [each.cell for each in planned]
        folder.write(describe(grid, cells), cells)
        ready = [each for each in planned if grid.tune is None or each.key in chosen]
        _run(ready, folder, work, tally, title="cells")
        tally.failures.update({each.cell.folder: _UNTUNED for each in planned if each not in ready})
        folder.write_failures(tally.failures)
        seconds = time.perf_counter() - began
        folder.add_session({**_counts(tally, work), "seconds": seconds, "time": time.time()})
    return tally


def describe(grid: Grid, cells: Sequence[Cell]) -> dict[str, Any]:
    """The description of a grid in its folder, for readers of the folder."""
    axes = {f"{axis}s": list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in AXES}
    budget = None if grid.budget_megabytes is None else grid.budget_megabytes * 2**20
    return {
        "name": grid.name,
        "title": grid.title or grid.name,
        "modes": list(grid.modes),
        "seeds": list(grid.seeds),
        "budget_bytes": budget,
        **axes,
    }


def _counts(tally: Tally, work: Work) -> dict[str, Any]:
    return {
        "jobs": work.jobs,
        "computed": tally.computed,
        "skipped": tally.skipped,
        "failed": len(tally.failures),
        "cell_seconds": tally.cell_seconds,
    }


def _run(planned: Sequence[Planned], folder: GridFolder, work: Work, tally: Tally, *, title: str) -> None:
    """Runs the cells without a result; failures go to the tally."""
    missing: dict[str, Planned] = {}
    known = folder.known()
    for each in planned:
        try:
            if not folder.is_done(each.cell) and not is_known(each.cell, known):
                missing[each.cell.folder] = each
        except RunFolderError as error:
            tally.failures[each.cell.folder] = str(error)
    done = len(planned) - len(missing) - len(tally.failures)
    tally.skipped += done
    if work.watcher:
        work.watcher.stage(title, total=len(planned), done=done)
    jobs = [
        Job(name, _kind(each), folder.path / name, each.config.model_dump(mode="json"))
        for name, each in missing.items()
    ]
    for message in run_jobs(jobs, workers=work.jobs, threads=work.threads, start=work.start):
        if work.watcher:
            work.watcher.cell(missing[message.job.name].cell, message.what, message.fields)
        if message.what == "done":
            tally.computed += 1
            tally.cell_seconds += message.fields["seconds"]
        elif message.what == "failed":
            tally.failures[message.job.name] = str(message.fields["reason"])
            folder.write_failures(tally.failures)


def _kind(planned: Planned) -> str:
    return f"{planned.cell.model}\n{planned.cell.adapter}"


def tuned(grid: Grid, changes: Changes, folder: GridFolder, work: Work, tally: Tally) -> dict[Key, Setting]:
    """Hyper-parameters by task, model and adapter, from the trials' figures on the selection set."""
    tried = trials(grid, changes)
    if not tried:
        return {}
    own = Tally()  # a candidate that fails is not a failure of the grid: another one is chosen
    _run([trial.planned for trial in tried], folder, work, own, title="choosing hyper-parameters")
    tally.computed, tally.skipped = tally.computed + own.computed, tally.skipped + own.skipped
    tally.cell_seconds += own.cell_seconds
    figures = [(trial, _figure(trial, folder)) for trial in tried]
    chosen = choose(figures)
    folder.write_tuning(_tuning_report(grid, figures, chosen, own.failures))
    return chosen


def known_choices(grid: Grid, changes: Changes, folder: GridFolder) -> dict[Key, Setting]:
    """The hyper-parameters that the finished trials choose; nothing is run."""
    return choose([(trial, _figure(trial, folder)) for trial in trials(grid, changes)])


def choose(figures: Sequence[tuple[Trial, float | None]]) -> dict[Key, Setting]:
    """The candidate with the best figure for each task, model and adapter; the first one of equal candidates."""
    best: dict[Key, tuple[float, Setting]] = {}
    for trial, figure in figures:
        key = trial.planned.key
        if figure is not None and (key not in best or figure > best[key][0]):
            best[key] = (figure, trial.setting)
    return {key: setting for key, (_, setting) in best.items()}


def _figure(trial: Trial, folder: GridFolder) -> float | None:
    """The task's metric on the selection set, higher is better: the mean of the modes, so that none is favoured."""
    cell = trial.planned.cell
    if not folder.is_done(cell):
        return None
    summary = folder.run(cell).read_json("summary")
    metric = summary["metric"]
    values = [summary["isolated"][metric]["mean"]] if summary.get("isolated") else []
    values += [summary[mode][metric] for mode in ("federated", "centralized") if summary.get(mode)]
    return signed(metric, statistics.fmean(values))


def _tuning_report(
    grid: Grid,
    figures: Sequence[tuple[Trial, float | None]],
    chosen: Mapping[Key, Setting],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    assert grid.tune is not None
    rows = [
        {
            "task": trial.planned.cell.task,
            "model": trial.planned.cell.model,
            "adapter": trial.planned.cell.adapter,
            "setting": dict(trial.setting),
            "figure": None if figure is None else abs(figure),
            "is_chosen": chosen.get(trial.planned.key) == trial.setting,
            "folder": trial.planned.cell.folder,
            "failure": failures.get(trial.planned.cell.folder),
        }
        for trial, figure in figures
    ]
    first = figures[0][0].planned
    return {
        "seed": grid.tune.seed,
        "partition": first.cell.partition,
        "split": first.config.evaluation.gold,
        "modes": list(grid.modes),
        "trials": rows,
    }
