"""``silotune tune``: choose settings of a configuration on its validation split."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, say, stdout
from silotune.errors import ConfigError
from silotune.quiet import hush


def tune(
    config: Annotated[str, typer.Argument(help="A TOML file, or a name from 'silotune configs list'.")],
    tried: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="SECTION.KEY=VALUE,VALUE",
            help="What to try, every combination; repeatable. Default: three learning rates.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the trials; default: runs/tune-CONFIG.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="federated or centralized: whose figure decides.")] = "federated",
    seed: Annotated[int | None, typer.Option(help="Of the trials; default: 1000 above the configuration's.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of the trials; default: the configuration's.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials side by side; cores are shared out.")] = 1,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Try settings of a configuration on its validation split, and say which to run with.

    No test example is looked at, and the seed is another than the configuration's. The same command goes on with trials
    that were stopped.

    silotune tune quickstart --try training.learning_rate=5e-4,1e-3 --try federation.algorithm=fedavg,fedadam
    """
    from silotune.benchmark.run import Work
    from silotune.benchmark.tune import tune as search
    from silotune.cli.grid_progress import GridProgress
    from silotune.config import merge, read_toml
    from silotune.settings.places import anchored
    from silotune.shipped import find

    if mode not in ("federated", "centralized"):
        raise ConfigError(f"--mode {mode!r}: federated or centralized")
    source = find(config)
    place = out or Path("runs") / f"tune-{source.stem}"
    document = anchored(read_toml(source), source.absolute().parent)
    document = anchored(merge(document, settings or ()), Path.cwd())
    again = f"the trials that are done are kept in {place}; the same command goes on"
    with reserved_stdout(as_json), GridProgress(stdout(), is_silent=as_json, again=again) as watcher:
        work = Work(jobs=jobs, watcher=watcher, start=hush)
        found, tally = search(document, tried or (), place, work, mode=mode, seed=seed, rounds=rounds)  # type: ignore
    best = next((trial for trial in found["trials"] if trial["is_chosen"]), None)
    if as_json:
        print_json({"folder": str(place), **found, "computed": tally.computed, "skipped": tally.skipped})
    else:
        _show(found)
    if best is None:
        reasons = dict.fromkeys(trial["failure"] for trial in found["trials"] if trial["failure"])
        raise ConfigError(f"no trial came to an end: {'; '.join(reasons)}")
    if not as_json:
        chosen = [word for key, value in best["setting"].items() for word in ("--set", f"{key}={_written(value)}")]
        given = [word for text in settings or () for word in ("--set", text)]
        say(f"trials:     {place}")
        say(f"run it:     {shlex.join(['silotune', 'run', config, *given, *chosen])}")


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        title=f"{found['modes'][0]}, scored on {found['split']}, seed {found['seed']}: the task's own metric",
        title_justify="left",
    )
    for heading in (*found["trials"][0]["setting"], "figure", ""):
        table.add_column(heading, justify="right" if heading == "figure" else "left")
    for trial in found["trials"]:
        figure = "failed" if trial["figure"] is None else f"{trial['figure']:.4f}"
        table.add_row(*map(_written, trial["setting"].values()), figure, "chosen" if trial["is_chosen"] else "")
    stdout().print(table)
