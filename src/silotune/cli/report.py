"""``silotune report``: the figures of one run or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.output import AsJson, print_json, stdout


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders.")],
    as_json: AsJson = False,
) -> None:
    """Show the table of a finished run, or of several side by side."""
    from silotune.record.runs import RunFolder
    from silotune.report.runs import read_summary, runs_json, runs_table, summary_table

    runs = [RunFolder.open(folder) for folder in folders]
    if as_json:
        print_json({"runs": runs_json(runs)})
    else:
        stdout().print(runs_table(runs) if len(runs) > 1 else summary_table(read_summary(runs[0])))
