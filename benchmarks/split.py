"""How fast split training is in one process: tokens a second of each schedule, beside training the whole model.

Every cell does one round to warm up and then rounds of the same batches, with all messages encoded. Figures: medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import machine

from silotune.config import Config, load_config
from silotune.experiment.engines import in_process
from silotune.experiment.parts import MODES
from silotune.experiment.prepare import Prepared, prepare
from silotune.experiment.rounds import plan_of
from silotune.experiment.split import computing
from silotune.federation.coordinator.rounds import run_rounds
from silotune.models import adapters
from silotune.models.threads import operation_threads
from silotune.record.cost import Meter
from silotune.record.runs import RunFolder
from silotune.settings.split import SplitSection
from silotune.structs import ServerState

SCHEDULES = ("whole", "serial", "client-batch", "hierarchical")


def measured(prepared: Prepared, clients: int, split: SplitSection | None, *, rounds: int) -> dict[str, float]:
    """Tokens a second over all clients, and bytes that crossed a step."""
    federation = prepared.config.federation.model_copy(update={"split": split, "rounds": rounds + 1})
    some = {name: prepared.clients[name] for name in list(prepared.clients)[:clients]}
    trial = replace(prepared, config=prepared.config.model_copy(update={"federation": federation}), clients=some)
    part, meter = MODES["federated"](trial)[0], Meter()
    with TemporaryDirectory() as place, operation_threads(trial.threads.an_operation):
        folder = RunFolder(Path(place))
        with in_process(trial, part, meter, folder) as transport:
            plan = replace(plan_of(trial, part, meter), score=None, select=None, checkpoint_every=rounds + 1)
            plan = computing(plan, trial, part, transport)
            run_rounds(plan, transport, ServerState(round_number=0, weights=trial.initial), folder)
        rows = [row for row in folder.read_rows("metrics") if row["round"] > 1]
        tokens = {number: 0 for number in range(2, rounds + 2)}
        for row in folder.read_rows("clients"):
            if row["round"] in tokens:
                tokens[row["round"]] += row["tokens"]
    adapters.write(trial.adapted, trial.initial)
    crossed = [sum(each["bytes"] for each in row.get("crossings", {}).values()) for row in rows]
    steps = trial.config.training.max_steps or 1
    return {
        "tokens_per_second": statistics.median(tokens[row["round"]] / row["train_seconds"] for row in rows),
        "bytes_per_step": statistics.median(crossed) / clients / steps,
    }


def configuration(model: str, most: int, steps: int, batch: int, settings: list[str]) -> Config:
    """A run of open answers over so many clients."""
    changes = [
        f"model.name={model}", f"data.partition.clients={most}", "data.partition.scheme=iid",
        f"training.max_steps={steps}", f"training.batch_size={batch}", "data.num_train=400", "data.num_test=10",
        "data.num_validation=10", 'federation.modes=["federated"]', "record.energy=false", "evaluation.every=1",
    ]  # fmt: skip
    return load_config(Path(__file__).parents[1] / "configs" / "quickstart.toml", [*changes, *settings])


def main() -> int:
    """Measures what the command line asks for, and prints a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano", help="base model: a folder, or nano")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a client in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed, after one to warm up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--compress", default="int8")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = configuration(
        arguments.model, max(arguments.clients), arguments.steps, arguments.batch, arguments.settings
    )
    prepared = prepare(config)
    found = []
    print(f"{'schedule':<14}{'clients':>8}{'tokens/s':>11}{'bytes/step':>13}", flush=True)
    for schedule in arguments.schedules:
        for clients in arguments.clients:
            section = None
            if schedule != "whole":
                section = SplitSection(schedule=schedule, compress=arguments.compress)
            row = measured(prepared, clients, section, rounds=arguments.rounds)
            found.append({"schedule": schedule, "clients": clients, **row})
            tokens, crossed = row["tokens_per_second"], row["bytes_per_step"]
            print(f"{schedule:<14}{clients:>8}{tokens:>11.0f}{crossed:>13.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
