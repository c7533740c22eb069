"""What protection costs: accuracy, seconds, bytes and joules of one configuration under each guarantee, several seeds.

Runs every protection that is not done yet into a folder of run folders, then prints the table as Markdown. The same
command goes on with a table that was stopped.

    python benchmarks/privacy_cost.py quickstart --seeds 0 1 2 --out runs/privacy-cost
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.cli.shipped import find
from silotune.config import load_config
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder
from silotune.report.runs import bytes_text, scaled_text

EXAMPLE = ("privacy.dp=example", "privacy.report_costs=true")
CLIENT = ("privacy.dp=client", "privacy.report_costs=true", "federation.weighting=uniform", "privacy.clip_norm=0.5")
VARIANTS: Mapping[str, Sequence[str]] = {
    "none": (),
    **{f"by example, epsilon {epsilon}": (*EXAMPLE, f"privacy.epsilon={epsilon}") for epsilon in (8, 4, 1)},
    **{f"by client, epsilon {epsilon}": (*CLIENT, f"privacy.epsilon={epsilon}") for epsilon in (8, 4, 1)},
}
"""Name of a row -> overrides."""
HEAD = ("protection", "epsilon", "accuracy", "seconds", "core-seconds", "bytes sent", "joules")


def run_of(name: str, config: str, overrides: Sequence[str], *, seed: int, out: Path) -> dict[str, Any]:
    """The federated part's summary; the run is made, or gone on with, where it is not finished."""
    place = out / f"{''.join(char if char.isalnum() else '-' for char in name)}-seed{seed}"
    fixed = (f"seed={seed}", f"record.folder={str(out)!r}", f"record.name={place.name!r}")
    if not (place / "config.json").is_file():
        modes = "federation.modes=['federated']"
        run_experiment(load_config(find(config), (modes, *overrides, *fixed)))
    elif not RunFolder.open(place).has("summary"):
        resume_experiment(place)
    summary: dict[str, Any] = RunFolder.open(place).read_json("summary")["federated"]
    return summary


def row_of(name: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Mean and standard deviation over seeds for people."""
    accuracy = [100 * run["accuracy"] for run in runs]
    spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
    spent = [run["privacy"]["epsilon"] for run in runs if "privacy" in run]
    costs = {key: [run["cost"][key] for run in runs] for key in ("core_seconds", "joules")}
    mean = {key: None if None in values else statistics.fmean(values) for key, values in costs.items()}
    return (
        name,
        f"{max(spent):.2f}" if spent else "-",
        f"{statistics.fmean(accuracy):.1f} %{spread}",
        f"{statistics.fmean(run['seconds'] for run in runs):.1f}",
        "-" if mean["core_seconds"] is None else f"{mean['core_seconds']:.1f}",
        bytes_text(statistics.fmean(run["bytes_up"] + run["bytes_down"] for run in runs)),
        scaled_text(mean["joules"], "J"),
    )


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a shipped name or a TOML file of a closed-ended task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/privacy-cost"))
    parser.add_argument("--only", nargs="*", help="names of rows; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for name, overrides in VARIANTS.items():
        if given.only and name not in given.only:
            continue
        settings = (*overrides, *given.set)
        runs = [run_of(name, given.config, settings, seed=seed, out=given.out) for seed in given.seeds]
        print("| " + " | ".join(row_of(name, runs)) + " |", flush=True)


if __name__ == "__main__":
    main()
