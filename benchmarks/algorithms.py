"""Trains every algorithm on an even and a skewed partition, or every robust rule against every attack.

    python benchmarks/algorithms.py                      # 18 entries x {alpha 0.1, IID} x 3 seeds
    python benchmarks/algorithms.py tune                 # their rates, on the validation split of another seed
    python benchmarks/algorithms.py robust               # 7 rules x {no attack, 3 attacks}, 2 of 10 clients malicious
    python benchmarks/algorithms.py robust --only mean median --attacks sign-flip --seeds 0

All are grids over the embedded finance task and nano, without a download; the same command goes on after a kill, and
runs only what is missing. The tables are made from the run folders alone. ``tune`` tries ``CANDIDATES``; what it found
best is written down in ``ALGORITHMS`` by hand. ``robust`` ends with code 1 when a robust rule ends more than 3 points
below the clean mean, or the plain mean loses less than 10.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.benchmark.expand import Changes
from silotune.benchmark.run import Work, run_grid
from silotune.benchmark.schema import Grid
from silotune.config import merge, overlaid, validated
from silotune.record.grids import GridFolder
from silotune.record.runs import RunFolder
from silotune.settings.aggregation import AGGREGATIONS

SHARE_OF_CENTRALISED = 0.9
MOST_POINTS_LOST, LEAST_POINTS_LOST = 3.0, 10.0
MALICIOUS, CLIENTS = 2, 10
TUNING_SEED, TUNING_EXAMPLES = 100, 200
ALGORITHMS: Mapping[str, Sequence[str]] = {
    "fedavg": ("federation.algorithm=fedavg",),
    "fedprox": ("federation.algorithm=fedprox", "federation.algorithm.proximal_mu=0.1"),
    "fedavgm": ("federation.algorithm=fedavgm", "federation.algorithm.server_learning_rate=0.3"),
    "fedadagrad": ("federation.algorithm=fedadagrad", "federation.algorithm.server_learning_rate=0.1"),
    "fedyogi": ("federation.algorithm=fedyogi", "federation.algorithm.server_learning_rate=0.01"),
    "fedadam": ("federation.algorithm=fedadam", "federation.algorithm.server_learning_rate=0.01"),
    "fednova": ("federation.algorithm=fednova",),
    "feddyn": ("federation.algorithm=feddyn", "federation.algorithm.alpha=1.0"),
    "fedsgd": (
        "federation.algorithm=fedsgd",
        "training.max_steps=1",
        "training.batch_size=2",
        "federation.rounds=64",
        "evaluation.every=16",
    ),
    "fedavg, SGD": ("federation.algorithm=fedavg", "training.optimizer=sgd", "training.learning_rate=1.0"),
    "scaffold I, SGD": (
        "federation.algorithm=scaffold",
        "federation.algorithm.option=I",
        "training.clip_norm=0",
        "training.optimizer=sgd",
        "training.learning_rate=0.1",
    ),
    "scaffold II, SGD": ("federation.algorithm=scaffold", "training.optimizer=sgd", "training.learning_rate=0.3"),
    "exact-residual": ("federation.algorithm=fedavg", "federation.lora=exact-residual"),
    "stack": ("federation.algorithm=fedavg", "federation.lora=stack", "training.learning_rate=2e-2"),
    "svd": ("federation.algorithm=fedavg", "federation.lora=svd"),
    "freeze-a": ("federation.algorithm=fedavg", "federation.lora=freeze-a", "training.learning_rate=2e-2"),
    "alternate": ("federation.algorithm=fedavg", "federation.lora=alternate", "training.learning_rate=1e-2"),
    "sb, rank 32": (
        "federation.algorithm=fedavg",
        "federation.lora=sb",
        "adapter.rank=32",
        "adapter.alpha=64",
        "training.learning_rate=3e-2",
    ),
    "share-a (own models)": ("federation.algorithm=fedavg", "federation.lora=share-a"),
}
"""Name in the table -> settings beside ``BASE``: the best of ``CANDIDATES``; without any, the rate of its like."""
RATE = "training.learning_rate"
SERVER_RATE = "federation.algorithm.server_learning_rate"
CANDIDATES: Mapping[str, Mapping[str, Sequence[float]]] = {
    "fedavg": {RATE: (5e-3, 1e-2)},
    "fedprox": {"federation.algorithm.proximal_mu": (0.01, 0.1)},
    "fedavgm": {SERVER_RATE: (0.1, 0.3)},
    "fedadagrad": {SERVER_RATE: (0.03, 0.1)},
    "fedyogi": {SERVER_RATE: (0.01, 0.03)},
    "fedadam": {SERVER_RATE: (0.01, 0.03)},
    "feddyn": {"federation.algorithm.alpha": (1.0, 10.0)},
    "fedavg, SGD": {RATE: (0.3, 1.0)},
    "scaffold I, SGD": {RATE: (0.1, 0.3, 1.0)},
    "scaffold II, SGD": {RATE: (0.1, 0.3, 1.0)},
    "stack": {RATE: (1e-2, 2e-2)},
    "freeze-a": {RATE: (1e-2, 2e-2)},
    "alternate": {RATE: (5e-3, 1e-2)},
    "sb, rank 32": {RATE: (3e-3, 1e-2, 3e-2)},
}
ATTACKS: Mapping[str, dict[str, Any]] = {
    "none": {},
    "sign-flip": {"clients": MALICIOUS, "factor": 10.0},
    "scaled": {"clients": MALICIOUS, "factor": 100.0},
    "label-flip": {"clients": MALICIOUS, "factor": 10.0},
}
BASE: Mapping[str, Any] = {
    "model": {"name": "nano", "max_length": 128},
    "adapter": {"rank": 8, "alpha": 16, "targets": "all-linear"},
    "data": {"num_train": 120, "num_validation": 80, "num_test": 240},
    "training": {"objective": "choice", "batch_size": 8, "epochs": 1.0, "learning_rate": 5e-3},
    "federation": {"rounds": 8},
    "evaluation": {"every": 2, "batch_size": 200, "bootstrap_samples": 0},
    "record": {"energy": False},
}
ROBUST_CHANGES = ("federation.rounds=16", "data.num_train=240", "evaluation.every=16")
"""Twice the examples and rounds: after eight rounds the clean run is not at its end, and a comparison says little."""
RULE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "trimmed-mean": {"aggregation": {"trim": 0.3}, "algorithm": {"server_learning_rate": 2.0}},
    "norm-bound": {"algorithm": {"server_learning_rate": 2.0}},
    "krum": {"aggregation": {"malicious": MALICIOUS}},
    "multi-krum": {"aggregation": {"malicious": MALICIOUS}},
}
"""Rules that leave attackers a part of each step (their signs, a bias of what is left) take longer ones."""
PARTITIONS: Sequence[Mapping[str, Any]] = (
    {
        "name": "alpha 0.1",
        "scheme": "dirichlet",
        "field": "sector+label",
        "alpha": 0.1,
        "clients": 8,
        "min_examples": 2,
    },
    {"name": "IID", "scheme": "iid", "clients": 8},
)


def algorithms_grid(seeds: Sequence[int], only: Iterable[str]) -> dict[str, Any]:
    """Every algorithm on both partitions; clients' shares differ, so their local work does, too."""
    return {
        "name": "algorithms",
        "modes": ["federated", "centralized"],
        "seeds": list(seeds),
        "tasks": ["finance-news"],
        "algorithms": [{"name": name, "config": merge({}, ALGORITHMS[name])} for name in only],
        "partitions": list(PARTITIONS),
        "base": dict(BASE),
    }


def tuning_grid(only: Iterable[str]) -> dict[str, Any]:
    """Every algorithm with each of its candidates, on the skewed partition, scored on validation examples."""
    entries = []
    for name in only:
        for values in itertools.product(*CANDIDATES[name].values()):
            setting = [f"{key}={value:g}" for key, value in zip(CANDIDATES[name], values, strict=True)]
            entries.append({"name": " | ".join([name, *setting]), "config": merge({}, [*ALGORITHMS[name], *setting])})
    data = {**BASE["data"], "num_validation": TUNING_EXAMPLES, "num_test": 40}
    return {
        "name": "algorithms-tuning",
        "modes": ["federated"],
        "seeds": [TUNING_SEED],
        "tasks": ["finance-news"],
        "algorithms": entries,
        "partitions": list(PARTITIONS[:1]),
        "base": {
            **BASE,
            "data": data,
            "evaluation": {**BASE["evaluation"], "every": 4, "gold": "validation"},
        },
    }


def robust_grid(seeds: Sequence[int], only: Iterable[str], attacks: Iterable[str]) -> dict[str, Any]:
    """Every rule against every attack, and without one."""
    entries = []
    for rule in only:
        for attack in attacks:
            plain = {"algorithm": "fedavg", "aggregation": rule, "attack": {"type": attack, **ATTACKS[attack]}}
            config = overlaid({"federation": plain}, {"federation": RULE_SETTINGS.get(rule, {})})
            entries.append({"name": f"{rule}, {attack}", "config": config})
    return {
        "name": "robust",
        "modes": ["federated"],
        "seeds": list(seeds),
        "tasks": ["finance-news"],
        "algorithms": entries,
        "partitions": [{"name": "IID", "scheme": "iid", "clients": CLIENTS}],
        "base": merge(BASE, ROBUST_CHANGES),
    }


def _runs(folder: GridFolder) -> dict[tuple[str, str], list[RunFolder]]:
    """(algorithm, partition) -> its finished runs, one a seed."""
    found: dict[tuple[str, str], list[RunFolder]] = {}
    for cell in folder.cells():
        if folder.is_done(cell):
            found.setdefault((cell.algorithm, cell.partition), []).append(folder.run(cell))
    return found


def _accuracy(run: RunFolder, mode: str = "federated") -> float:
    """Of the final model; where clients share no whole model, of their own ones on their shares of the examples."""
    result = run.part(mode).read_json("result")
    own = result.get("personal") if run.read_json("config")["federation"]["lora"] == "share-a" else None
    return float((own or result)["metrics"]["accuracy"])


def _core_seconds(run: RunFolder) -> float:
    """Processor seconds of all clients and the coordinator, without scoring."""
    part = run.part("federated")
    clients = sum(row["core_seconds"] for row in part.read_rows("clients"))
    return float(clients + sum(row["cost"]["coordinator"]["core_seconds"] for row in part.read_rows("metrics")))


def _until(run: RunFolder, target: float) -> tuple[int, int] | None:
    """Rounds, and bytes both ways, until the federated model is as good as the target; None where it never was."""
    total = 0
    for row in run.part("federated").read_rows("metrics"):
        total += row["bytes_up"] + row["bytes_down"]
        if row.get("accuracy", 0.0) >= target:
            return row["round"], total
    return None


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _errors(runs: Sequence[RunFolder]) -> str:
    """Mean of the rounds' aggregation errors, where they are recorded."""
    rows = [row for run in runs for row in run.part("federated").read_rows("metrics")]
    known = [row["aggregation_error"] for row in rows if row.get("aggregation_error") is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


def algorithms_table(folder: GridFolder) -> str:
    """A row an algorithm and partition; the centralised accuracy is that of the same partition and seed."""
    runs = _runs(folder)
    lines = [
        "| algorithm | partition | seeds | accuracy | rounds to 90 % of centralised | MB until then "
        "| aggregation error | core-seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(runs))[0] if runs else ""
    for (algorithm, partition), own in runs.items():
        pooled = {_seed(run): _accuracy(run, "centralized") for run in runs.get((first, partition), [])}
        reached = [_until(run, SHARE_OF_CENTRALISED * pooled[_seed(run)]) for run in own if _seed(run) in pooled]
        there = [found for found in reached if found is not None]
        when = f"{statistics.median(found[0] for found in there):g}" if there else "never"
        when += f" ({len(there)} of {len(reached)})" if there and len(there) < len(reached) else ""
        size = f"{statistics.median(found[1] for found in there) / 2**20:.1f}" if there else "-"
        seconds = [_core_seconds(run) for run in own]
        accuracy = _spread([_accuracy(run) for run in own])
        lines.append(
            f"| {algorithm} | {partition} | {len(own)} | {accuracy} | {when} | {size} | {_errors(own)} "
            f"| {_spread(seconds, 1)} |"
        )
    for partition in sorted({name for _, name in runs}):
        pooled = [_accuracy(run, "centralized") for run in runs.get((first, partition), [])]
        if pooled:
            lines.append(f"| centralised | {partition} | {len(pooled)} | {_spread(pooled)} | | | | |")
    return "\n".join(lines)


def tuning_table(folder: GridFolder) -> str:
    """Accuracy on validation examples by candidate: after the last round, and the mean of all that are scored."""
    lines = ["| algorithm | candidate | after the last round | mean from round 4 on |", "|---|---|---|---|"]
    for (entry, _), (run,) in _runs(folder).items():
        name, _, setting = entry.partition(" | ")
        curve = [row["accuracy"] for row in run.part("federated").read_rows("metrics") if "accuracy" in row][1:]
        mean = f"{statistics.fmean(curve):.3f}" if curve else "-"
        lines.append(f"| {name} | {setting} | {_accuracy(run):.3f} | {mean} |")
    return "\n".join(lines)


def _seed(run: RunFolder) -> int:
    return int(run.read_json("config")["seed"])


def robust_table(folder: GridFolder) -> tuple[str, bool]:
    """Accuracy by rule and attack, and whether robust rules hold and the plain mean does not."""
    means = {tuple(name.split(", ")): [_accuracy(run) for run in own] for (name, _), own in _runs(folder).items()}
    rules = list(dict.fromkeys(rule for rule, _ in means))
    attacks = list(dict.fromkeys(attack for _, attack in means))
    lines = [f"| rule | {' | '.join(attacks)} |", "|---|" + "---|" * len(attacks)]
    lines += [
        f"| {rule} | "
        + " | ".join(_spread(means[rule, attack]) for attack in attacks if (rule, attack) in means)
        + " |"
        for rule in rules
    ]
    clean, faults = statistics.fmean(means["mean", "none"]), []
    for (rule, attack), values in means.items():
        lost = 100 * (clean - statistics.fmean(values))
        if rule == "mean" and attack != "none" and lost < LEAST_POINTS_LOST:
            faults.append(f"the plain mean loses only {lost:.1f} points to {attack}")
        if rule != "mean" and lost > MOST_POINTS_LOST:
            faults.append(f"{rule} loses {lost:.1f} points to {attack}")
    lines.append("")
    lines += [f"DOES NOT HOLD: {fault}" for fault in faults] or [
        f"Every rule ends within {MOST_POINTS_LOST:g} points of the clean mean, and under each attack the plain mean "
        f"loses at least {LEAST_POINTS_LOST:g}."
    ]
    return "\n".join(lines), not faults


def _printed(part: str, folder: GridFolder) -> bool:
    """Prints a part's table; whether its bounds hold."""
    if part == "robust":
        text, holds = robust_table(folder)
    else:
        text, holds = (algorithms_table if part == "algorithms" else tuning_table)(folder), True
    print(text)
    return holds


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing of a grid and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("algorithms", "tune", "robust"), default="algorithms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="algorithms, or rules of 'robust'; its table needs 'mean'")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="of 'robust'")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="section.key=value, in every cell")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="the grid's folder is made in it")
    parser.add_argument("--show", action="store_true", help="the table of what is there; run nothing")
    given = parser.parse_args(arguments)
    if given.part == "robust":
        attacks = ["none", *(name for name in given.attacks if name != "none")]
        document = robust_grid(given.seeds, given.only or AGGREGATIONS, attacks)
    elif given.part == "tune":
        document = tuning_grid(given.only or CANDIDATES)
    else:
        document = algorithms_grid(given.seeds, given.only or ALGORITHMS)
    grid = validated(Grid, document, source=f"benchmarks/algorithms.py {given.part}")
    place = given.folder / grid.name
    if given.show:
        return 0 if _printed(given.part, GridFolder.open(place)) else 1
    tally = run_grid(grid, place, Changes(settings=given.settings), Work(jobs=given.jobs))
    for name, reason in tally.failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    holds = _printed(given.part, GridFolder.open(place))
    return 0 if holds and not tally.failures else 1


if __name__ == "__main__":
    sys.exit(main())
