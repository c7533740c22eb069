"""``silotune report``: the figures and the page of one run, figures of several side by side, or all of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.output import AsJson, print_json, reserved_stdout, say, stdout
from silotune.errors import ConfigError


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders, or one grid folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="A folder for what is written; default: in DIR.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the table of a finished run and write its page, or show several runs; of a grid, write its whole report.

    The page of a run, report.html, is one file that needs no network and holds no script. The report of a grid
    is one HTML page that needs no network, the same as Markdown, a CSV of every cell, and every
    figure as SVG and PNG.
    """
    from silotune.record.grids import is_grid

    if any(is_grid(folder) for folder in folders):
        if len(folders) > 1:
            raise ConfigError("a grid folder is reported alone: give one folder")
        _grid(folders[0], out, as_json=as_json)
        return
    if out is not None and len(folders) > 1:
        raise ConfigError("--out goes with one folder; for several runs a table is printed")
    _runs(folders, out, as_json=as_json)


def _runs(folders: list[Path], out: Path | None, *, as_json: bool) -> None:
    from silotune.record.runs import RunFolder
    from silotune.report.run_page import PAGE, write_run_page
    from silotune.report.runs import promise_lines, read_summary, runs_json, runs_table, tables_of

    runs = [RunFolder.open(folder) for folder in folders]
    summaries = [read_summary(run) for run in runs]
    page = None
    if len(runs) == 1 and (out is not None or not as_json):
        page = write_run_page(runs[0].path, None if out is None else out / PAGE)
    if as_json:
        print_json({"runs": runs_json(runs)})
    elif len(runs) > 1:
        stdout().print(runs_table(runs))
    else:
        stdout().print(*tables_of(summaries[0]), sep="\n")
        for line in promise_lines(summaries[0]):
            say(line)
        say(f"written: {page}")


def _grid(folder: Path, out: Path | None, *, as_json: bool) -> None:
    from silotune.record.grids import GridFolder
    from silotune.report.grid import as_mapping, write_report

    with reserved_stdout(as_json):
        made = write_report(GridFolder.open(folder), out)
    if as_json:
        print_json(as_mapping(made))
        return
    for finding in made.findings:
        say(f"- {finding}")
    for path in made.files[:3]:
        say(f"written: {path}")
    say(f"         and {len(made.files) - 3} figure files beside them")
