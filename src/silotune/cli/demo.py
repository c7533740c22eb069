"""``silotune demo``: the parts of a federation, shown on one machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.output import AsJson, Settings, print_json, say, stdout


def demo_app() -> typer.Typer:
    """The commands of ``silotune demo``."""
    app = typer.Typer(help="Show the parts of a federation on one machine.", no_args_is_help=True)
    app.callback()(_nothing)
    app.command("federation")(_federation)
    return app


def _nothing() -> None:
    """A group although it has one command: others follow."""


def _federation(
    sites: Annotated[int, typer.Option(min=1, max=16, help="How many sites to start.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where kits, logs and results go; default: a new one.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Start a coordinator and sites over TLS on 127.0.0.1, run the embedded task, verify the audit trail, stop all."""
    from silotune.cli.progress import RunProgress
    from silotune.config import load_config
    from silotune.errors import require
    from silotune.shipped import shipped

    require("flwr", extra="deploy")
    from silotune.deploy.demo import demo_federation
    from silotune.record.runs import RunFolder
    from silotune.report.runs import read_summary, summary_table

    config = load_config(shipped("demo-federation"), [f"data.partition.clients={sites}", *(settings or ())])
    place = folder or Path(tempfile.mkdtemp(prefix="silotune-demo-"))
    if as_json:
        shown = demo_federation(config, place, sites=sites, notify=lambda event, fields: None)
        summary = read_summary(RunFolder(shown.folder))
        entries = {"entries": shown.entries, "witnesses": dict(shown.witnesses)}
        print_json({"folder": str(shown.folder), "audit": entries, "seconds": dict(shown.seconds), "summary": summary})
        return
    console = stdout()
    with RunProgress(console) as progress:
        shown = demo_federation(config, place, sites=sites, notify=progress)
    console.print(summary_table(read_summary(RunFolder(shown.folder))))
    seen = ", ".join(f"{name} {count}" for name, count in sorted(shown.witnesses.items()))
    say(f"audit trail: {shown.entries} entries verified; heads that sites hold of it: {seen}")
    say("seconds: " + ", ".join(f"{name} {value:g}" for name, value in shown.seconds.items()))
    say(f"run folder: {shown.folder}")
