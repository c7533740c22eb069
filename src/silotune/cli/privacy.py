"""``silotune privacy``: what a guarantee will cost and what noise it takes, and what has been spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, say, stdout
from silotune.errors import ConfigError

if TYPE_CHECKING:
    from silotune.experiment.privacy import Plan

Sizes = Annotated[
    list[int] | None,
    typer.Option("--examples", min=1, help="Examples of a client, instead of reading data; repeatable."),
]


def privacy_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(no_args_is_help=True, help="Plan a run's differential privacy; see what was spent.")
    app.command("plan")(plan)
    app.command("spent")(spent)
    return app


def plan(
    config: Annotated[str | None, typer.Argument(help="A TOML file, or a name from 'silotune configs list'.")] = None,
    examples: Sizes = None,
    out: Annotated[Path | None, typer.Option("--out", help="Draw epsilon by round (PNG).")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say what noise a configuration's epsilon takes, or what its noise costs, by site and round.

    How much noise for epsilon 4 over 50 rounds at a site of 600 examples:
    silotune privacy plan --examples 600 --set privacy.dp.epsilon=4 --set federation.rounds=50
    """
    from silotune.config import from_mapping, merge, read_toml
    from silotune.experiment.budget import matched
    from silotune.experiment.exposure import exposure_lines
    from silotune.experiment.privacy import as_json as as_mapping
    from silotune.experiment.privacy import plan_of, plan_of_config, statement, warnings
    from silotune.shipped import find

    if config is None and not examples:
        raise ConfigError("give a configuration, or --examples N for a site without one")
    document = read_toml(find(config)) if config else {}
    if not document.get("privacy"):
        document = merge(document, ["privacy.dp=example"])
    loaded = from_mapping(merge(document, settings or ()), source=config or "--set")
    with reserved_stdout(as_json):
        named = {f"site-{place}": size for place, size in enumerate(examples or (), start=1)}
        made = plan_of(matched(loaded, tuple(named.values())), named) if named else plan_of_config(loaded)
    if made is None:
        raise ConfigError("privacy.dp = 'none' costs nothing and promises nothing: --set privacy.dp=example")
    if out is not None:
        from silotune.report.privacy import draw_epsilon

        draw_epsilon(as_mapping(made), out)
    lines = statement(loaded.privacy, made)
    notes = [*warnings(loaded, made.sizes), *exposure_lines(loaded, None)]
    if as_json:
        print_json({**as_mapping(made), "statement": list(lines), "notes": notes, "picture": out})
        return
    _show(made, [*(f"privacy: {line}" for line in lines), *(f"note: {note}" for note in notes)])
    if out is not None:
        say(f"picture: {out}")


def spent(
    folder: Annotated[Path, typer.Argument(help="Folder of ledgers: privacy.dp.ledger, or state/ledger of a site.")],
    delta: Annotated[float, typer.Option(help="The delta at which epsilon is computed.")] = 1e-5,
    rdp: Annotated[bool, typer.Option("--rdp", help="Count by RDP, faster and looser than by PLD.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what the sites' ledgers add up to: epsilon of all runs together, and of the run that cost most."""
    from silotune.federation.site.ledger import spent_in
    from silotune.report.privacy import spent_table

    if not 0 < delta < 1:
        raise ConfigError(f"--delta {delta:g}: between 0 and 1, such as 1e-5")
    found = spent_in(folder, delta=delta, accountant="rdp" if rdp else "pld")
    if as_json:
        print_json({"delta": delta, "accountant": "rdp" if rdp else "pld", "sites": found})
        return
    stdout().print(spent_table(found, delta=delta))


def _show(made: Plan, lines: list[str]) -> None:
    from silotune.experiment.privacy import as_json as as_mapping
    from silotune.report.privacy import curve_table, plan_table

    console = stdout()
    document = as_mapping(made)
    console.print(plan_table(document))
    console.print(curve_table(document))
    for line in lines:
        say(line)
