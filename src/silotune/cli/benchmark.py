"""``silotune benchmark``: run a grid of experiments, or go on with one that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, say, stdout
from silotune.quiet import hush

if TYPE_CHECKING:
    from rich.table import Table

    from silotune.benchmark.expand import Changes
    from silotune.benchmark.plan import Forecast
    from silotune.benchmark.run import Tally
    from silotune.benchmark.schema import Grid


def benchmark(
    grid: Annotated[str, typer.Argument(metavar="GRID", help="A grid file (TOML), or a shipped name: 'embedded'.")],
    out: Annotated[Path | None, typer.Option("--out", help="The grid folder; default: runs/NAME.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Cells side by side; cores are shared out.")] = 1,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Only say what it would run and cost.")] = False,
    known: Annotated[
        Path | None,
        typer.Option("--known", help="cells.csv of an earlier report: its finished cells are not run again."),
    ] = None,
    data_root: Annotated[Path | None, typer.Option("--data-root", help="Folder of local data sets.")] = None,
    models_root: Annotated[
        Path | None,
        typer.Option("--models-root", help="Folder of local base models: org/NAME is taken from its folder NAME."),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Run every cell of a grid that has no result yet: tasks x models x adapters x algorithms x partitions x seeds.

    The same command goes on with a grid that was stopped or killed. A cell that fails is reported and the others go
    on; then the exit code is 9, and the same command tries that cell again.
    """
    from silotune.benchmark.expand import Changes
    from silotune.benchmark.schema import load_grid
    from silotune.shipped import find_grid

    source = find_grid(grid)
    loaded = load_grid(source)
    place = out or Path("runs") / loaded.name
    changes = Changes(data_root, tuple(settings or ()), models_root)
    if is_dry:
        _forecast(loaded, place, changes, jobs=jobs, known=known, as_json=as_json)
    else:
        _run(loaded, source, place, changes, jobs=jobs, known=known, as_json=as_json)


def _forecast(grid: Grid, place: Path, changes: Changes, *, jobs: int, known: Path | None, as_json: bool) -> None:
    from silotune.benchmark.plan import forecast, totals
    from silotune.benchmark.run import Work
    from silotune.record.environment import cores
    from silotune.report.runs import bytes_text, seconds_text

    with reserved_stdout(as_json):
        found = list(forecast(grid, place, changes, threads=Work(jobs=jobs).threads, known=known))
    total = totals(found, jobs=jobs)
    if as_json:
        print_json({"grid": grid.name, "folder": str(place), "cells": [_row(each) for each in found], "total": total})
        return
    console = stdout()
    console.print(_table(found))
    for problem in dict.fromkeys(each.problem for each in found if each.problem):
        say(f"problem: {problem}")
    span = f"{seconds_text(total['seconds_least'])} to {seconds_text(total['seconds_most'])}"
    say(
        f"{total['runs']} runs, {total['done']} done, {total['to_do']} to do: about {seconds_text(total['seconds'])} "
        f"({span}) with --jobs {jobs}, {bytes_text(total['bytes'])} sent, {bytes_text(total['memory_bytes'])} of memory"
    )
    say(
        "Times are medians of a few steps of one run of each kind after a warm-up, the range is from the fastest to "
        "the slowest of them; other seeds and partitions are taken to be like it."
    )
    if total["load"] is not None:
        busy = ": other work makes these times longer than they will be without it" if total["load"] > 1 else ""
        say(f"The load of this machine was {total['load']:.1f} on {cores()} cores{busy}.")


def _row(each: Forecast) -> dict[str, Any]:
    cell = each.planned.cell
    axes = {name: getattr(cell, name) for name in ("task", "model", "adapter", "algorithm", "partition", "seed")}
    state = {"modes": list(cell.modes), "is_trial": each.is_trial, "is_done": each.is_done, "problem": each.problem}
    return {**axes, **state, "folder": cell.folder, **each.figures}


def _table(found: list[Forecast]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from silotune.report.runs import bytes_text, seconds_text

    table = Table(box=SIMPLE_HEAD)
    for heading in ("cell", "modes", "steps", "sent", "memory", "time"):
        table.add_column(heading, justify="left" if heading in ("cell", "modes") else "right")
    for each in found:
        figures = each.figures
        table.add_row(
            f"{'trial: ' if each.is_trial else ''}{each.planned.cell.title}",
            ", ".join(each.planned.cell.modes),
            str(figures.get("steps", "-")),
            bytes_text(figures.get("bytes")),
            bytes_text(figures.get("memory_bytes")),
            "done" if each.is_done else seconds_text(figures.get("seconds")),
        )
    return table


def _run(
    grid: Grid, source: Path, place: Path, changes: Changes, *, jobs: int, known: Path | None, as_json: bool
) -> None:
    from silotune.benchmark.run import Work, run_grid
    from silotune.cli.grid_progress import GridProgress

    with reserved_stdout(as_json), GridProgress(stdout(), is_silent=as_json, again=_again(place)) as watcher:
        work = Work(jobs=jobs, watcher=watcher, start=hush)
        tally = run_grid(grid, place, changes, work, source=source, known=known)
    _show(place, tally, as_json=as_json)


def _again(place: Path) -> str:
    return f"the cells that are done are kept in {place}; the same command goes on"


def _show(place: Path, tally: Tally, *, as_json: bool) -> None:
    from silotune.errors import GridError

    if as_json:
        print_json({"folder": str(place), "computed": tally.computed, "skipped": tally.skipped,
                    "failures": tally.failures})  # fmt: skip
    else:
        for name, reason in tally.failures.items():
            say(f"failed: {name}: {reason}")
        say(f"grid folder: {place} ({tally.computed} runs done now, {tally.skipped} before)")
        say(f"report:      silotune report {place}")
    if tally.failures:
        name, reason = next(iter(tally.failures.items()))
        raise GridError(f"{len(tally.failures)} cells failed, the first is {name}: {reason}")
