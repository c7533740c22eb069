"""Accuracy against bytes: one federated run on the embedded task for each way to send, over several seeds.

    python benchmarks/communication.py                                # what is missing below --out, and the table
    python benchmarks/communication.py --tune 5e-3 1e-2 --only NAME   # rates on the validation split of another seed

Each row is made from run folders. Every run of a seed has the same clients and examples, does as many optimiser steps
and is scored on the same test examples; what differs is what its name says, and the learning rate, which was chosen for
each row with ``--tune``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.toml"
COMMON = (
    'federation.modes=["federated"]',
    "training.objective=choice",
    "training.batch_size=8",
    "evaluation.keep=last",
    "evaluation.batch_size=200",
    "evaluation.every=1000",
    "evaluation.bootstrap_samples=0",
    "record.energy=false",
)
TESTED = ("data.num_test=2000",)
TUNED = ("evaluation.gold=validation", "data.num_validation=1000", "data.num_test=20")
TUNING_SEED = 100
STEPS = 64
"""Optimiser steps of every client in all."""
REFERENCE = "rank 8, float32"
INT4 = {"values": "int4", "block": 256, "zstd": 3}
DOWN = {"delta": True, "values": "int8", "block": 256, "zstd": 3}


@dataclass(frozen=True)
class Way:
    """One way to send: an adapter with its rate, how often it is sent, the rule for its factors, and both links."""

    rank: int = 8
    alpha: float = 16
    rate: float = 5e-3
    rounds: int = 16
    lora: str = "factors"
    upload: Mapping[str, Any] = field(default_factory=dict)
    download: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Way] = {
    REFERENCE: Way(rate=1e-2),
    "rank 8, int4": Way(rate=1e-2, upload=INT4),
    "rank 1, int4": Way(1, upload=INT4),
    "rank 2, int4": Way(2, upload=INT4),
    "rank 1, int4; down: change, int8": Way(1, upload=INT4, download=DOWN),
    "rank 4, int4": Way(4, upload=INT4),
    "freeze-a, rank 8, int4": Way(rate=2e-2, lora="freeze-a", upload=INT4),
    "sb, rank 16, int4": Way(16, 64, rate=2e-2, lora="sb", upload=INT4),
    "rank 4, int4, 4 rounds": Way(4, rounds=4, upload=INT4),
    "rank 8, sign": Way(rate=1e-2, upload={"values": "sign"}),
}


@dataclass(frozen=True)
class Bound:
    """At least ``factor`` times fewer bytes at no more than ``points`` points of accuracy lost (means over seeds)."""

    factor: float
    points: float


BOUNDS = (Bound(16, 0.5), Bound(50, 2.0))


@dataclass(frozen=True)
class Row:
    """One way to compress: figures of its runs, one a seed."""

    name: str
    accuracy: tuple[float, ...]
    bytes_up: tuple[int, ...]
    bytes_down: tuple[int, ...]


def document_of(name: str, seed: int, *, rate: float | None = None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of one run; with a rate, of one that tries it on validation examples."""
    from silotune.config import merge, read_toml

    way = WAYS[name]
    sections = (
        f"adapter.rank={way.rank}",
        f"adapter.alpha={way.alpha:g}",
        f"training.learning_rate={rate or way.rate:g}",
        f"training.max_steps={STEPS // way.rounds}",
        f"federation.rounds={way.rounds}",
        f"federation.lora={way.lora}",
    )
    scored = TUNED if rate else TESTED
    document = merge(read_toml(QUICKSTART), [*COMMON, *scored, *sections, *changes, f"seed={seed}"])
    document["federation"].update(upload=dict(way.upload), download=dict(way.download))
    return document


def run(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of one run; made unless its folder is finished."""
    from silotune.config import from_mapping
    from silotune.experiment.run import resume_experiment, run_experiment
    from silotune.record.runs import RunFolder

    document["record"].update(folder=str(folder.parent), name=folder.name)
    is_begun = (folder / "config.json").is_file()
    made = resume_experiment(folder) if is_begun else run_experiment(from_mapping(document))
    return RunFolder(made.path).part("federated").read_json("result")


def folder_name(*parts: object) -> str:
    """Words and numbers as the name of a run folder."""
    return "".join(char if char.isalnum() or char == "." else "-" for char in " ".join(map(str, parts)))


def row_of(name: str, results: Sequence[Mapping[str, Any]]) -> Row:
    """The figures of one way to compress."""
    return Row(
        name,
        tuple(float(result["metrics"]["accuracy"]) for result in results),
        tuple(int(result["bytes_up"]) for result in results),
        tuple(int(result["bytes_down"]) for result in results),
    )


def fewer(row: Row, reference: Row) -> float:
    """How many times fewer bytes went up than without compression."""
    return sum(reference.bytes_up) / sum(row.bytes_up)


def lost(row: Row, reference: Row) -> float:
    """Points of accuracy lost to the run without compression, mean over the seeds; below 0 where it did better."""
    return 100 * (statistics.fmean(reference.accuracy) - statistics.fmean(row.accuracy))


def met(bound: Bound, rows: Sequence[Row], reference: Row) -> list[str]:
    """Names of the rows that keep within a bound."""
    return [row.name for row in rows if fewer(row, reference) >= bound.factor and lost(row, reference) <= bound.points]


def table(rows: Sequence[Row], reference: Row) -> str:
    """The rows as Markdown."""
    lines = [
        "| adapter, upload | accuracy, each seed | mean | points lost | bytes up | fewer | bytes down | fewer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each = " ".join(f"{value:.3f}" for value in row.accuracy)
        down = sum(reference.bytes_down) / sum(row.bytes_down)
        lines.append(
            f"| {row.name} | {each} | {statistics.fmean(row.accuracy):.3f} | {lost(row, reference):.1f} "
            f"| {statistics.fmean(row.bytes_up):,.0f} | {fewer(row, reference):.1f} "
            f"| {statistics.fmean(row.bytes_down):,.0f} | {down:.1f} |"
        )
    return "\n".join(lines)


def tune(names: Sequence[str], rates: Sequence[float], options: argparse.Namespace) -> int:
    """Prints the accuracy of every rate on the validation examples of a seed that no row is of."""
    print("| adapter, upload | rate | accuracy |\n|---|---|---|")
    for name in names:
        for rate in rates:
            document = document_of(name, TUNING_SEED, rate=rate, changes=options.changes)
            made = run(document, options.out / folder_name("tune", name, f"{rate:g}"))
            print(f"| {name} | {rate:g} | {made['metrics']['accuracy']:.3f} |", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints the table and whether the bounds hold; 1 where one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(WAYS), help="rows beside the first")
    parser.add_argument("--tune", type=float, nargs="+", metavar="RATE", help="try these rates for every row")
    parser.add_argument("--out", type=Path, default=Path("runs/communication"))
    parser.add_argument("--set", action="append", default=[], dest="changes", help="section.key=value for every run")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    if options.tune:
        return tune(options.only or list(WAYS), options.tune, options)
    rows: list[Row] = []
    for name in dict.fromkeys([REFERENCE, *(options.only or WAYS)]):
        results = [
            run(document_of(name, seed, changes=options.changes), options.out / folder_name(name, f"seed{seed}"))
            for seed in options.seeds
        ]
        rows.append(row_of(name, results))
        print(table(rows[-1:], rows[0]).splitlines()[-1], flush=True)
    print("\n" + table(rows, rows[0]) + "\n")
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    all_hold = True
    for bound in BOUNDS:
        names = met(bound, rows, rows[0])
        all_hold = all_hold and bool(names)
        print(f"{bound.factor:g} times fewer at no more than {bound.points:g} points: {', '.join(names) or 'none'}")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
