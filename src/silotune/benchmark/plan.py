"""Estimates what a grid will cost before it is started, from a few real steps of each kind of cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.benchmark.expand import Changes, Planned, expand, trials
from silotune.benchmark.run import known_choices
from silotune.benchmark.schema import Grid
from silotune.errors import SilotuneError
from silotune.record.grids import GridFolder, is_known


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a cell is expected to cost.

    Attributes:
        planned: The cell; its configuration may still change where hyper-parameters are to be chosen.
        is_trial: Whether it chooses hyper-parameters.
        is_done: Whether its result exists already.
        figures: ``seconds``, ``seconds_least``, ``seconds_most``, ``load``, ``steps``, ``bytes``, ``memory_bytes``,
            ``trainable``; empty where no estimate could be made.
        problem: Why no estimate could be made.
    """

    planned: Planned
    is_trial: bool
    is_done: bool
    figures: Mapping[str, Any]
    problem: str = ""


def forecast(
    grid: Grid, path: Path, changes: Changes, *, threads: int | None = None, known: Path | None = None
) -> Iterator[Forecast]:
    """A forecast for each run of the grid, from a trial of one run of each task, model, adapter and set of modes.

    Nothing is written.

    Args:
        grid: The grid.
        path: Its folder, which need not exist.
        changes: What the command line adds.
        threads: CPU threads of the processes that will run it.
        known: ``cells.csv`` of an earlier report, whose finished cells will not be run again.

    Raises:
        ConfigError: The configuration of a cell holds faults.
    """
    folder = GridFolder(path)
    tried = [trial.planned for trial in trials(grid, changes)]
    cells = expand(grid, changes, known_choices(grid, changes, folder))
    elsewhere = folder.known(known)
    calibrated: dict[tuple[Any, ...], tuple[Mapping[str, Any], str]] = {}
    for planned, is_trial in [*((each, True) for each in tried), *((each, False) for each in cells)]:
        kind = (planned.key, planned.cell.modes, planned.config.federation.rounds)
        is_done = folder.is_done(planned.cell) or is_known(planned.cell, elsewhere)
        if kind not in calibrated and not is_done:
            calibrated[kind] = _calibrated(planned, threads)
        figures, problem = calibrated.get(kind, ({}, ""))
        yield Forecast(planned, is_trial, is_done, figures, problem)


def _calibrated(planned: Planned, threads: int | None) -> tuple[Mapping[str, Any], str]:
    from silotune.experiment.estimate import estimate

    training = planned.config.training
    own = training.model_copy(update={"threads": training.threads or threads})
    try:
        found = estimate(planned.config.model_copy(update={"training": own}))
    except SilotuneError as error:
        return {}, " ".join(str(error).split())
    is_federated = "federated" in planned.cell.modes
    rounds = planned.config.federation.rounds if is_federated else 0
    names = (
        "seconds",
        "seconds_least",
        "seconds_most",
        "load",
        "steps",
        "memory_bytes",
        "gpu_memory_bytes",
        "trainable",
    )
    return {**{name: found[name] for name in names}, "bytes": rounds * found["bytes_per_round"]}, ""


def totals(forecasts: Sequence[Forecast], *, jobs: int) -> dict[str, Any]:
    """Sums over the runs that are still to do; ``seconds`` is wall time with ``jobs`` cells side by side.

    ``load`` is what the machine had to do before the first kind of run was timed.
    """
    missing = [each for each in forecasts if not each.is_done]
    together = min(jobs, max(1, len(missing)))
    names = ("seconds", "seconds_least", "seconds_most")
    seconds = {name: sum(each.figures.get(name, 0.0) for each in missing) / together for name in names}
    loads = [each.figures["load"] for each in missing if each.figures.get("load") is not None]
    return {
        "runs": len(forecasts),
        "done": len(forecasts) - len(missing),
        "to_do": len(missing),
        **seconds,
        "load": next(iter(loads), None),
        "bytes": sum(each.figures.get("bytes", 0) for each in missing),
        "memory_bytes": jobs * max((each.figures.get("memory_bytes", 0) for each in missing), default=0),
        "without_estimate": sum(not each.figures for each in missing),
    }
