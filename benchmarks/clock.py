"""Time to an accuracy by the simulated clock, with one slow hospital among eight: who waits for whom.

    python benchmarks/clock.py                # 4 ways x 3 seeds on the embedded finance task: a few minutes

All train the same number of client rounds. The slow one does a step in 20 simulated seconds, the others in 1. The table
is made from the run folders alone; the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from algorithms import BASE

from silotune.benchmark.expand import Changes
from silotune.benchmark.run import Work, run_grid
from silotune.benchmark.schema import Grid
from silotune.config import validated
from silotune.record.grids import GridFolder
from silotune.record.runs import RunFolder

CLIENTS, SLOW = 8, "client-0"
CLOCK: Mapping[str, Any] = {
    "seconds_per_step": 1.0,
    "upload": 1.25e6,
    "download": 1.25e6,
    "clients": {SLOW: {"speed": 0.05}},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "synchronous": {"rounds": 8, "clock": CLOCK},
    "deadline of 5 s": {"rounds": 8, "clock": {**CLOCK, "deadline_seconds": 5.0}},
    "over-sampled: the first 6 of 8": {
        "rounds": 8,
        "clients_per_round": 6,
        "clock": {**CLOCK, "over_sampling": CLIENTS / 6},
    },
    "FedBuff: every 4 replies": {"rounds": 16, "clock": {**CLOCK, "buffer": 4}},
}


def clock_grid(seeds: Sequence[int]) -> dict[str, Any]:
    """Every way on an even partition."""
    entries = [{"name": name, "config": {"federation": {"algorithm": "fedavg", **way}}} for name, way in WAYS.items()]
    return {
        "name": "clock",
        "modes": ["federated"],
        "seeds": list(seeds),
        "tasks": ["finance-news"],
        "algorithms": entries,
        "partitions": [{"name": "IID", "scheme": "iid", "clients": CLIENTS}],
        "base": {**BASE, "evaluation": {**BASE["evaluation"], "every": 1}},
    }


def until(rows: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """Simulated seconds of the first scored round that is as good as the target; None where none is."""
    return next((row["simulated_seconds"] for row in rows if row["round"] and row.get("accuracy", 0.0) >= target), None)


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{statistics.fmean(known):.{digits}f}{some}"


def table(runs: Mapping[str, Sequence[RunFolder]], target: float) -> str:
    """A row a way: means over the seeds."""
    lines = [
        f"| rounds | simulated seconds to {target:.0%} | of the whole run | accuracy at its end | MB up "
        "| updates of the slow one used |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in runs.items():
        parts = [run.part("federated") for run in own]
        metrics = [part.read_rows("metrics") for part in parts]
        results = [part.read_json("result") for part in parts]
        slow = [sum(row["client"] == SLOW for row in part.read_rows("clients")) for part in parts]
        lines.append(
            f"| {name} | {_mean([until(rows, target) for rows in metrics], 0)} "
            f"| {_mean([rows[-1]['simulated_seconds'] for rows in metrics], 0)} "
            f"| {_mean([result['metrics']['accuracy'] for result in results], 3)} "
            f"| {_mean([result['bytes_up'] / 2**20 for result in results], 1)} | {_mean(slow, 1)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.85, help="accuracy")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="the grid's folder is made in it")
    given = parser.parse_args(arguments)
    grid = validated(Grid, clock_grid(given.seeds), source="benchmarks/clock.py")
    place = given.folder / grid.name
    tally = run_grid(grid, place, Changes(), Work(jobs=given.jobs))
    for name, reason in tally.failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    folder, runs = GridFolder.open(place), {name: [] for name in WAYS}
    for cell in folder.cells():
        if folder.is_done(cell):
            runs[cell.algorithm].append(folder.run(cell))
    print(table({name: own for name, own in runs.items() if own}, given.target))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
