"""Accuracy against bytes: one federated run on the embedded task for each way to compress, over several seeds.

``python benchmarks/communication.py`` runs what is missing below ``--out`` and prints the table; each row is made from
run folders. Every run of a seed sees the same batches and is scored on the same examples; what differs
is ``federation.upload``, ``federation.download`` and, where a row says so, the rank of the adapter.
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
    "data.num_test=2000",
    "evaluation.keep=last",
    "evaluation.batch_size=200",
    "evaluation.every=1000",
    "evaluation.bootstrap_samples=0",
    "record.energy=false",
)
REFERENCE = "rank 8, float32"
INT4 = {"values": "int4", "block": 256, "zstd": 3}
DOWN = {"delta": True, "values": "int8", "block": 256, "zstd": 3}


@dataclass(frozen=True)
class Way:
    """One way to send: the adapter's rank (alpha is twice as much, so that its scale stays), and both links."""

    rank: int = 8
    upload: Mapping[str, Any] = field(default_factory=dict)
    download: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Way] = {
    REFERENCE: Way(),
    "rank 8, int8": Way(8, {"values": "int8", "zstd": 3}),
    "rank 8, int4": Way(8, INT4),
    "rank 8, top 25 %, int4": Way(8, {**INT4, "keep": "top-k", "share": 0.25}),
    "rank 8, sign": Way(8, {"values": "sign"}),
    "rank 8, top 8 %, sign": Way(8, {"keep": "top-k", "share": 0.08, "values": "sign", "block": 256}),
    "rank 8, low-rank 1, int4": Way(8, {**INT4, "keep": "low-rank", "rank": 1}),
    "rank 2, float32": Way(2),
    "rank 4, int4": Way(4, INT4),
    "rank 2, int4": Way(2, INT4),
    "rank 1, int4": Way(1, INT4),
    "rank 1, int4; down: change, int8": Way(1, INT4, DOWN),
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


def run(name: str, seed: int, out: Path, changes: Sequence[str]) -> dict[str, Any]:
    """The result of one run; made unless its folder is finished."""
    from silotune.config import from_mapping, merge, read_toml
    from silotune.experiment.run import resume_experiment, run_experiment
    from silotune.record.runs import RunFolder

    folder = "".join(char if char.isalnum() else "-" for char in name) + f"-seed{seed}"
    document = merge(read_toml(QUICKSTART), [*COMMON, *changes, f"seed={seed}"])
    way = WAYS[name]
    document["adapter"].update(rank=way.rank, alpha=2 * way.rank)
    document["federation"].update(upload=dict(way.upload), download=dict(way.download))
    document["record"].update(folder=str(out), name=folder)
    if (out / folder / "config.json").is_file():
        made = resume_experiment(out / folder)
    else:
        made = run_experiment(from_mapping(document))
    return RunFolder(made.path).part("federated").read_json("result")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints the table and whether the bounds hold; 1 where one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(WAYS), help="rows beside the first")
    parser.add_argument("--out", type=Path, default=Path("runs/communication"))
    parser.add_argument("--set", action="append", default=[], dest="changes", help="section.key=value for every run")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    rows = []
    for name in [REFERENCE, *(options.only or WAYS)]:
        if all(name != row.name for row in rows):
            rows.append(row_of(name, [run(name, seed, options.out, options.changes) for seed in options.seeds]))
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
