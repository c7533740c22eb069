"""Value alignment end to end on the embedded notes: federated sft, then dpo and kto from its model, over seeds.

    python benchmarks/preference.py --out runs/alignment --seeds 0 1 2

Runs that are there already are read, not run again. Every figure is of the test split, which shares no news with
training. "written" is the share of good style among the notes that the model writes itself, by rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.config import load_config
from silotune.data.embedded.notes import keeps_to_principles
from silotune.data.load import load
from silotune.errors import RunFolderError
from silotune.evaluation.generate import greedy_answers
from silotune.evaluation.statistics import paired
from silotune.experiment.run import run_experiment
from silotune.experiment.scoring import encoder_for
from silotune.experiment.tuned import config_of, load_tuned
from silotune.record.runs import RunFolder

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WRITTEN = 100
"""Notes that each model writes."""


@dataclass(frozen=True)
class Row:
    """One objective and seed: shares of preferred answers and of good notes before and after, and the gain."""

    objective: str
    seed: int
    start: float
    tuned: float
    interval: tuple[float, float]
    win_rate: float
    margin: float
    written_start: float
    written: float


def run_of(out: Path, name: str, config: str, changes: Sequence[str]) -> RunFolder:
    """The finished run of that name, run now if it is not there."""
    try:
        found = RunFolder.open(out / name)
        if found.has("summary"):
            return found
    except RunFolderError:
        pass
    settings = (*changes, f'record.folder="{out}"', f'record.name="{name}"')
    return run_experiment(load_config(CONFIGS / f"{config}.toml", settings))


def good_style(run: RunFolder) -> float:
    """Share of good style among the notes that the run's model writes on news of the test split."""
    config = config_of(run)
    adapted = load_tuned(run.path)
    examples = load(config.data, seed=config.seed).splits["test"][:WRITTEN]
    encoded = encoder_for(config, adapted.base)(examples)
    notes = greedy_answers(adapted, encoded, batch_size=50, max_new_tokens=48)
    return sum(keeps_to_principles(note) is True for note in notes) / len(notes)


def row_of(out: Path, objective: str, seed: int, settings: Sequence[str] = ()) -> Row:
    """Runs, or reads, the model before and after alignment, which takes the settings."""
    first = run_of(out, f"sft-{seed}", "client-notes", (f"seed={seed}",))
    changes = (
        f"seed={seed}", f'training.objective="{objective}"', f'adapter.start="{first.path}"',
        'federation.modes=["federated"]', *settings,
    )  # fmt: skip
    run = run_of(out, f"{objective}-{seed}", "note-preference", changes)
    made: dict[str, Any] = run.part("federated").read_json("result")["metrics"]
    low, high = made["gain_interval"]
    return Row(
        objective, seed, made["start_accuracy"], made["preference_accuracy"], (low, high), made["win_rate"],
        made["margin"], good_style(first), good_style(run),
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and for each objective the gain over its seeds."""
    lines = [
        "| objective | seed | sft: preferred | then | gain (95 %) | win rate | margin | sft: written | then |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.interval
        lines.append(
            f"| {row.objective} | {row.seed} | {row.start:.3f} | {row.tuned:.3f} | {row.tuned - row.start:+.3f} "
            f"({low:+.3f} to {high:+.3f}) | {row.win_rate:.3f} | {row.margin:.1f} | {row.written_start:.2f} | "
            f"{row.written:.2f} |"
        )
    for objective in dict.fromkeys(row.objective for row in rows):
        own = [row for row in rows if row.objective == objective]
        made = paired([row.tuned for row in own], [row.start for row in own])
        if made.low is not None:
            lines.append(f"\n{objective}: gain {made.sample.mean:+.3f}, Student's 95 % interval over {len(own)} seeds "
                         f"{made.low:+.3f} to {made.high:+.3f}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=("dpo", "kto"), default=["dpo", "kto"])
    parser.add_argument("--set", nargs="+", default=[], dest="settings", help="section.key=value of the aligned runs")
    given = parser.parse_args()
    rows = []
    for objective in given.objectives:
        for seed in given.seeds:
            rows.append(row_of(given.out, objective, seed, given.settings))
            print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
