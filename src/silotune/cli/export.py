"""``silotune export``: a tuned model as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.output import AsJson, ModeName, print_json, reserved_stdout, say


def export(
    folder: Annotated[Path, typer.Argument(help="The run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    merge: Annotated[bool, typer.Option("--merge", help="The whole model, with the adapter worked into it.")] = False,
    mode: ModeName = "federated",
    as_json: AsJson = False,
) -> None:
    """Write the adapter for peft, or with --merge a model for plain transformers, with a model card."""
    from silotune.experiment.tuned import export as write
    from silotune.experiment.tuned import loader_of

    with reserved_stdout(as_json):
        place = write(folder, out, merge=merge, mode=mode)
    if as_json:
        print_json({"folder": str(place), "merged": merge, "mode": mode})
        return
    say(str(place))
    say(f"load it with {loader_of(folder, place, merge=merge)}")
