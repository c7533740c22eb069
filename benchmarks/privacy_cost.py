"""What protection costs: accuracy, core-seconds, bytes and joules of one federation under each guarantee.

All rows share data, clients, model and number of local steps. Learning rate and clip norm are tuned for each kind of
row by itself, on the validation set of a seed that no row uses. Runs what is not done yet into a folder of run folders,
then prints the table as Markdown. The same command goes on with a table that was stopped.

    python benchmarks/privacy_cost.py quickstart --seeds 0 1 2 --out runs/privacy-cost
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from silotune.config import load_config
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder
from silotune.report.runs import bytes_text, scaled_text
from silotune.shipped import find

FEDERATION = (
    "federation.modes=['federated']",
    "federation.rounds=40",
    "federation.workers=1",
    "data.num_train=1200",
    "data.num_validation=150",
    "data.num_test=300",
    "data.partition.clients=6",
    "data.partition.scheme=iid",
    "adapter.targets=auto",
    "adapter.rank=2",
    "training.objective=choice",
    "training.batch_size=16",
    "training.max_steps=2",
    "training.optimizer_state=keep",
    "training.threads=1",
    "evaluation.every=40",
    "evaluation.keep=last",
    "evaluation.bootstrap_samples=0",
)
"""Of every row: few parameters and many examples a client, which is what noise by example wants."""
ONE_SIDED = ("federation.lora=freeze-a",)
CLIENT = ("privacy.dp.report_costs=true", "federation.weighting=uniform")
KINDS: Mapping[str, Sequence[str]] = {
    "none": (),
    "by example": ("privacy.dp=example", "privacy.dp.report_costs=true"),
    "by client": ("privacy.dp=client", *CLIENT),
    "in shares": ("privacy.dp=distributed", "privacy.protection=secure_sum", *CLIENT),
}
"""Kind of guarantee -> overrides."""
RATES: Mapping[tuple[str, str], Sequence[float]] = {
    ("none", "two"): (1e-2, 3e-2),
    ("none", "one"): (2e-2, 6e-2),
    ("by example", "two"): (1e-2, 3e-2),
    ("by example", "one"): (2e-2, 6e-2),
    ("by client", "two"): (1e-2,),
    ("by client", "one"): (2e-2,),
}
"""Kind and factors -> learning rates that are tried; AdamW hardly minds at what norm gradients are clipped."""
CLIPS: Mapping[str, Sequence[float]] = {"none": (), "by example": (0.3,), "by client": (0.03, 0.3)}
TUNED_AT, TUNING_SEED = 8, 100
"""Epsilon and seed of the tuning."""
HEAD = (
    "protection",
    "LoRA factors",
    "epsilon",
    "accuracy",
    "macro-F1",
    "core-seconds",
    "bytes sent",
    "joules",
    "seeds",
)


def rows() -> list[tuple[str, str, bool, tuple[str, ...]]]:
    """Name of the row, kind it is tuned as, whether it is one-sided, overrides."""
    made: list[tuple[str, str, bool, tuple[str, ...]]] = [
        ("none", "none", False, ()),
        ("none", "none", True, ()),
        ("secure sum", "none", False, ("privacy.protection=secure_sum", "privacy.protection.max_examples=512")),
        ("homomorphic encryption", "none", False, ("privacy.protection=he",)),
    ]
    for kind, is_one_sided, epsilon in itertools.product(("by example", "by client"), (False, True), (8, 4, 1)):
        made.append((f"{kind}, epsilon {epsilon}", kind, is_one_sided, (f"privacy.dp.epsilon={epsilon}",)))
    made.append((f"in shares, epsilon {TUNED_AT}", "in shares", True, (f"privacy.dp.epsilon={TUNED_AT}",)))
    return made


def settings_of(kind: str, *, is_one_sided: bool) -> tuple[str, ...]:
    """What every run of a kind has, the federation's settings among it."""
    return (*FEDERATION, *KINDS[kind], *(ONE_SIDED if is_one_sided else ()))


def run_of(place: Path, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The federated part's summary; the run is made, or gone on with, where it is not finished."""
    fixed = (f"record.folder={str(place.parent)!r}", f"record.name={place.name!r}")
    if not (place / "config.json").is_file():
        run_experiment(load_config(find(config), (*overrides, *fixed)))
    elif not RunFolder.open(place).has("summary"):
        resume_experiment(place)
    summary: dict[str, Any] = RunFolder.open(place).read_json("summary")["federated"]
    return summary


def tuned(kind: str, config: str, out: Path, *, is_one_sided: bool) -> tuple[str, ...]:
    """The learning rate and clip norm that do best on the validation set of a seed of its own."""
    like = "by client" if kind == "in shares" else kind
    budget = () if like == "none" else (f"privacy.dp.epsilon={TUNED_AT}",)
    fixed = (*settings_of(like, is_one_sided=is_one_sided), *budget, "evaluation.gold=validation")
    best: tuple[float, tuple[str, ...]] | None = None
    for rate, clip in itertools.product(RATES[like, side_of(is_one_sided=is_one_sided)], CLIPS[like] or (None,)):
        chosen = (f"training.learning_rate={rate}", *([] if clip is None else [f"privacy.dp.clip_norm={clip}"]))
        name = named(like, side_of(is_one_sided=is_one_sided), f"{rate:g}", "" if clip is None else f"{clip:g}")
        found = run_of(out / "tuning" / name, config, (*fixed, *chosen, f"seed={TUNING_SEED}"))["accuracy"]
        if best is None or found > best[0]:
            best = (found, chosen)
    assert best is not None
    return best[1]


def side_of(*, is_one_sided: bool) -> str:
    """How many of LoRA's two factors are trained and noised, in words."""
    return "one" if is_one_sided else "two"


def named(*parts: str) -> str:
    """A folder's name."""
    return "-".join("".join(char if char.isalnum() else "-" for char in part) for part in parts if part)


def row_of(name: str, side: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Mean and standard deviation over seeds for people."""
    spent = [run["privacy"]["epsilon"] for run in runs if "privacy" in run]
    costs = {key: [run["cost"][key] for run in runs] for key in ("core_seconds", "joules")}
    mean = {key: None if None in values else statistics.fmean(values) for key, values in costs.items()}
    return (
        name,
        side,
        f"{max(spent):.2f}" if spent else "-",
        _percent([run["accuracy"] for run in runs]),
        _percent([run["macro_f1"] for run in runs]),
        "-" if mean["core_seconds"] is None else f"{mean['core_seconds']:.1f}",
        bytes_text(statistics.fmean(run["bytes_up"] + run["bytes_down"] for run in runs)),
        scaled_text(mean["joules"], "J"),
        str(len(runs)),
    )


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a shipped name or a TOML file of a closed-ended task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/privacy-cost"))
    parser.add_argument("--only", nargs="*", help="names of rows; default: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen: dict[str, list[str]] = {}
    wanted = [row for row in rows() if not given.only or row[0] in given.only]
    for _, kind, is_one_sided, _ in wanted:
        name = named(kind, side_of(is_one_sided=is_one_sided))
        if name not in chosen:
            chosen[name] = list(tuned(kind, given.config, given.out, is_one_sided=is_one_sided))
    (given.out / "tuned.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed, (name, kind, is_one_sided, overrides) in itertools.product(given.seeds, wanted):
        side = side_of(is_one_sided=is_one_sided)
        best = chosen[named(kind, side)]
        every = (*settings_of(kind, is_one_sided=is_one_sided), *best, *overrides, f"seed={seed}")
        summary = run_of(given.out / named(name, side, f"seed{seed}"), given.config, every)
        made.setdefault((name, side), []).append(summary)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for (name, side), runs in made.items():
        print("| " + " | ".join(row_of(name, f"{side} trained", runs)) + " |")
    print(json.dumps(chosen))


if __name__ == "__main__":
    main()
