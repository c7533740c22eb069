"""``silotune evaluate`` and ``silotune export``: score a tuned model again, or make it a folder for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from silotune.cli.output import AsJson, ModeName, print_json, reserved_stdout, stdout
from silotune.errors import ConfigError, unknown_choice

if TYPE_CHECKING:
    from rich.table import Table
from silotune.cli.output import say


def evaluate(
    folder: Annotated[Path, typer.Argument(help="The run folder.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    data: Annotated[Path | None, typer.Option(help="A file of examples instead of a split.")] = None,
    scoring: Annotated[str | None, typer.Option(help="likelihood or generation; default: the run's own.")] = None,
    mode: ModeName = "federated",
    as_json: AsJson = False,
) -> None:
    """Score a trained model on a split or a file."""
    from silotune.experiment.tuned import evaluate as score
    from silotune.settings.sections import Scoring

    if scoring is not None and scoring not in get_args(Scoring):
        raise ConfigError(unknown_choice("scoring", scoring, get_args(Scoring)))
    with reserved_stdout(as_json):
        result = score(folder, mode=mode, split=split, data=data, scoring=scoring)
    if as_json:
        print_json(result)
        return
    stdout().print(_table(result))
    for note in result["notes"]:
        say(f"note: {note}")


def _table(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=False)
    for name, text in _lines(result):
        table.add_row(name, text)
    return table


def _lines(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each figure: shares in percent, one line a class; the confusion matrix is for ``--json``."""
    from silotune.report.runs import main_text

    lines = []
    for name, value in figures.items():
        if name == "per_class":
            lines += [(f"  {label}", _class_text(scores)) for label, scores in value.items()]
        elif name == "by_task":
            lines += [(f"  {task}", f"{main_text(own)}, {own['num_examples']} examples") for task, own in value.items()]
        elif isinstance(value, float):
            lines.append((name.replace("_", " "), _number_text(name, value)))
        elif isinstance(value, (int, str)):
            lines.append((name.replace("_", " "), str(value)))
        elif name.endswith("_interval") and value:
            low, high = (_number_text(name.removesuffix("_interval"), bound) for bound in value)
            lines.append((name.replace("_", " "), f"{low} to {high}"))
    return lines


def _number_text(name: str, value: float) -> str:
    from silotune.report.runs import KINDS

    is_share = name in ("unparsed", "start_accuracy") or (name in KINDS and KINDS[name].is_share)
    return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def _class_text(scores: Mapping[str, float]) -> str:
    shares = [f"{name} {100 * scores[name]:.1f} %" for name in ("precision", "recall", "f1") if name in scores]
    return ", ".join([*shares, f"{scores.get('support', 0)} examples"])


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
