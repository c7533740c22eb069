"""``silotune privacy``: what a guarantee costs and what noise it takes, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, stdout
from silotune.errors import ConfigError

if TYPE_CHECKING:
    from silotune.experiment.privacy import Plan

Sizes = Annotated[
    list[int] | None,
    typer.Option("--examples", min=1, help="Examples of a client, instead of reading data; repeatable."),
]


def privacy_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(no_args_is_help=True, help="Plan a run's differential privacy.")
    app.callback()(_group)
    app.command("plan")(plan)
    return app


def _group() -> None:
    """A group of one command is a group only where it has a callback."""


def plan(
    config: Annotated[str | None, typer.Argument(help="A TOML file, or a name from 'silotune configs list'.")] = None,
    examples: Sizes = None,
    out: Annotated[Path | None, typer.Option("--out", help="Draw epsilon by round (PNG).")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say what noise a configuration's epsilon takes, or what its noise costs, by site and round.

    How much noise for epsilon 4 over 50 rounds at a site of 600 examples:
    silotune privacy plan --examples 600 --set privacy.epsilon=4 --set federation.rounds=50
    """
    from silotune.cli.shipped import find
    from silotune.config import from_mapping, merge, read_toml
    from silotune.experiment.privacy import as_json as as_mapping
    from silotune.experiment.privacy import plan_of, plan_of_config, statement, warnings

    if config is None and not examples:
        raise ConfigError("give a configuration, or --examples N for a site without one")
    document = read_toml(find(config)) if config else {}
    is_named = any(item.startswith("privacy.dp=") for item in settings or ())
    if not is_named and not document.get("privacy"):
        document = merge(document, ["privacy.dp=example"])
    loaded = from_mapping(merge(document, settings or ()), source=config or "--set")
    with reserved_stdout(as_json):
        named = {f"site-{place}": size for place, size in enumerate(examples or (), start=1)}
        made = plan_of(loaded, named) if named else plan_of_config(loaded)
    if made is None:
        raise ConfigError("privacy.dp = 'none' costs nothing and promises nothing: --set privacy.dp=example")
    if out is not None:
        from silotune.report.privacy import draw_epsilon

        draw_epsilon(as_mapping(made), out)
    lines, notes = statement(loaded.privacy, made), warnings(loaded, made.sizes)
    if as_json:
        print_json({**as_mapping(made), "statement": list(lines), "notes": notes, "picture": out})
        return
    _show(made, [*(f"privacy: {line}" for line in lines), *(f"note: {note}" for note in notes)])
    if out is not None:
        stdout().print(f"picture: {out}", soft_wrap=True)


def _show(made: Plan, lines: list[str]) -> None:
    from silotune.experiment.privacy import as_json as as_mapping
    from silotune.report.privacy import curve_table, plan_table

    console = stdout()
    document = as_mapping(made)
    console.print(plan_table(document))
    console.print(curve_table(document))
    for line in lines:
        console.print(line, soft_wrap=True)
