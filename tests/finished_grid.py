"""A finished grid folder written by hand, for tests of what reads grid folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from silotune.record.grids import Cell, GridFolder, cell_folder, config_digest
from silotune.record.runs import RunFolder

SEEDS = (0, 1, 2)
LEVELS: Mapping[str, float] = {"isolated": 0.5, "federated": 0.7, "centralized": 0.75}
Level = Callable[[Cell, str], float]
CLIENTS = ("client-0", "client-1")


def usual(cell: Cell, mode: str) -> float:
    """Accuracies whose differences are .2 and .05 with a little spread over the seeds."""
    spread = {"isolated": 0.0, "federated": 0.01, "centralized": 0.02}[mode]
    return LEVELS[mode] - (0.02 if cell.adapter == "ia3" else 0.0) + spread * (cell.seed - 1)


def result(
    accuracy: float,
    *,
    cost: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    **metrics: Any,
) -> dict[str, Any]:
    return {
        "split": "test", "num_examples": 100, "round": 2, "rounds": 2, "stopped": "", "seconds": 10.0,
        "evaluate_seconds": 2.0, "bytes_up": 1000, "bytes_down": 3000,
        "metrics": {"accuracy": accuracy, "macro_f1": accuracy - 0.1, "unparsed": 0.0,
                    "per_class": {"yes": {"f1": accuracy}, "no": {"f1": 0.5}}, **metrics},
        **({"cost": dict(cost)} if cost else {}), **(beside or {}),
    }  # fmt: skip


def finished_grid(
    path: Path,
    *,
    seeds: tuple[int, ...] = SEEDS,
    level: Level = usual,
    adapters: tuple[str, ...] = ("lora", "ia3"),
    tasks: tuple[str, ...] = ("finance-news", "medical"),
    partitions: tuple[str, ...] = ("alpha 0.1", "alpha 1.0"),
    algorithms: tuple[str, ...] = ("fedavg",),
    cost: Callable[[Cell, str], Mapping[str, Any] | None] = lambda cell, mode: None,
    metrics: Callable[[Cell, str], Mapping[str, Any]] = lambda cell, mode: {},
    failed: tuple[str, ...] = (),
    seconds: float = 100.0,
    metric: str = "accuracy",
) -> GridFolder:
    """A grid; cells whose title holds a word of ``failed`` have no result."""
    folder = GridFolder.make(path)
    cells, failures = [], {}
    for task in tasks:
        for adapter in adapters:
            for partition in partitions:
                for algorithm, seed in itertools.product(algorithms, seeds):
                    config = {
                        "seed": seed,
                        "training": {"threads": 1},
                        "record": {},
                        "of": [task, adapter, partition, algorithm],
                    }
                    digest = config_digest(config)
                    names = (task, "nano", adapter, algorithm, partition)
                    place = cell_folder("cells", (*names, f"seed{seed}"), digest)
                    modes = ("federated", "isolated", "centralized")
                    cells.append(Cell(*names, seed=seed, modes=modes, folder=place, digest=digest))
                    if any(word in cells[-1].title for word in failed):
                        failures[place] = "the loss is not finite"
                    else:
                        run = folder.run(cells[-1])
                        write_cell(run, cells[-1], config, level, cost, metrics)
                        run.write_json("summary", {**run.read_json("summary"), "metric": metric})
    folder.write(
        {"name": "demo", "title": "A demonstration", "modes": ["federated", "isolated", "centralized"],
         "seeds": list(seeds), "budget_bytes": None, "tasks": list(tasks), "models": ["nano"],
         "adapters": list(adapters), "algorithms": list(algorithms), "partitions": list(partitions)},
        cells,
    )  # fmt: skip
    folder.write_failures(failures)
    folder.add_session({"jobs": 1, "computed": len(cells), "skipped": 0, "failed": len(failures), "seconds": seconds,
                        "cell_seconds": 98.0, "time": 1.0})  # fmt: skip
    return folder


def write_cell(
    run: RunFolder,
    cell: Cell,
    config: Mapping[str, Any],
    level: Level,
    cost: Callable[[Cell, str], Mapping[str, Any] | None],
    metrics: Callable[[Cell, str], Mapping[str, Any]],
) -> None:
    run.write_json("config", config)
    run.append("events", {"event": "run_started", "trainable": 5000, "time": 0.0})
    run.append("events", {"event": "mode_started", "time": 1.0}, {"event": "mode_finished", "time": 9.0})
    run.write_json("partition", {"field": "label", "clients": {
        name: {"num_examples": 30, "labels": {"yes": 10 + 10 * place, "no": 20 - 10 * place}, "distance": 0.2}
        for place, name in enumerate(CLIENTS)
    }, "mean_distance": 0.2})  # fmt: skip
    for mode in ("federated", "centralized"):
        run.part(mode).write_json("result", result(level(cell, mode), cost=cost(cell, mode), **metrics(cell, mode)))
    for name in CLIENTS:
        run.part("isolated", name).write_json(
            "result", result(level(cell, "isolated"), cost=cost(cell, "isolated"), **metrics(cell, "isolated"))
        )
    for number in range(3):
        accuracy = 0.3 + number * (level(cell, "federated") - 0.3) / 2
        run.part("federated").append("metrics", {"round": number, "accuracy": accuracy, "macro_f1": accuracy})
    run.write_json("summary", {"metric": "accuracy", "base": {"accuracy": 0.3, "macro_f1": 0.2},
                               "budget": "same examples and steps in every mode", "seconds": 9.5})  # fmt: skip
