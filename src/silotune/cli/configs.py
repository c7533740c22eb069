"""``silotune configs``: list, show and copy the shipped configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.output import AsJson, print_json, say, stdout, write_text
from silotune.errors import ConfigError

Name = Annotated[str, typer.Argument(help="A name from 'silotune configs list'.")]


def configs_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(no_args_is_help=True, help="List, show and copy the shipped configurations.")
    app.command("list")(list_configs)
    app.command("show")(show)
    app.command("copy")(copy)
    return app


def list_configs(as_json: AsJson = False) -> None:
    """List the shipped configurations."""
    from rich.table import Table

    from silotune.shipped import names, shipped, summary

    if as_json:
        print_json([{"name": name, "path": shipped(name), "summary": summary(name)} for name in names()])
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in names():
        table.add_row(name, summary(name))
    stdout().print(table)


def show(name: Name) -> None:
    """Print a shipped configuration."""
    from silotune.shipped import shipped

    write_text(shipped(name).read_text(encoding="utf-8"))


def copy(
    name: Name,
    out: Annotated[Path | None, typer.Argument(help="Where to; default: NAME.toml here.")] = None,
) -> None:
    """Copy a shipped configuration, to be changed."""
    from silotune.record.files import write_bytes
    from silotune.shipped import is_grid, shipped

    source = shipped(name)
    place = out / source.name if out is not None and out.is_dir() else out or Path(source.name)
    if place.exists():
        raise ConfigError(f"{str(place)!r} is there already: name another file")
    write_bytes(place, source.read_bytes())
    command = "benchmark" if is_grid(name) else "run"
    say(str(place))
    say(f"run it with: silotune {command} {place}")
