"""``silotune data check`` and ``silotune init``: look at files of examples, and write a configuration for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, say, stdout
from silotune.errors import ConfigError
from silotune.record.printable import one_line

if TYPE_CHECKING:
    from rich.table import Table

    from silotune.settings.sections import DataSection, ModelSection


def data_app() -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(no_args_is_help=True, help="Look at files of examples before a run reads them.")
    app.callback()(lambda: None)  # so that 'check' stays a name, though it is the only one
    app.command("check")(check)
    return app


def check(
    file: Annotated[Path | None, typer.Argument(help="A file of examples; default: all files of --config.")] = None,
    task: Annotated[str | None, typer.Option(help="A name from 'silotune tasks'; default: guessed.")] = None,
    config: Annotated[str | None, typer.Option(help="A configuration whose data and model are used.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokens are counted; default: nano.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the texts of some examples, too.")] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say what is in a file: columns, labels, lengths, rows that do not fit, doubles, texts that would be cut.

    No text of a row is shown without --show.
    """
    if file is None and config is None:
        raise ConfigError("name a file, or a configuration with --config")
    if task is not None and config is not None:
        raise ConfigError("--task and --config both name a task: leave one of them out")
    from silotune.experiment.data_check import look_at

    with reserved_stdout(as_json):
        data, of_model = _asked(file, task, config, settings or [])
        if model is not None:
            of_model = of_model.model_copy(update={"name": model})
        found = look_at(data, of_model, shows_texts=show)
    found["task"]["is_guessed"] = task is None and config is None
    if as_json:
        print_json(found)
        return
    _tell(found, data)


def _asked(
    file: Path | None, task: str | None, config: str | None, settings: list[str]
) -> tuple[DataSection, ModelSection]:
    """The sections that the options ask for; with a file, that file is the only one."""
    from silotune.config import from_mapping, load_config, merge
    from silotune.data.guess import GuessError
    from silotune.experiment.data_check import guessed
    from silotune.settings.sections import DataSection, PartitionSection
    from silotune.shipped import find

    if config is not None:
        loaded = load_config(find(config), settings)
        if file is None:
            return loaded.data, loaded.model
        alone = {"train": file, "validation": None, "test": None, "root": None, "partition": PartitionSection()}
        return loaded.data.model_copy(update=alone), loaded.model
    assert file is not None
    if task is None:
        read = from_mapping(merge({}, settings)).data
        try:
            given: Mapping[str, Any] = guessed(file, read).data
        except GuessError as error:
            stdout().print(_columns({"columns": [asdict(column) for column in error.columns]}))
            raise
    else:
        given = {"task": task}
    loaded = from_mapping(merge({"data": {**given, "train": str(file)}}, settings))
    return DataSection.model_validate(loaded.data), loaded.model


def _tell(found: Mapping[str, Any], data: DataSection) -> None:
    from silotune.data.toml import written

    console = stdout()
    for part in found["files"]:
        kinds = filter(None, [part["encoding"], f"parted by {part['delimiter']!r}" if part["delimiter"] else ""])
        say(f"{part['file']}: {', '.join(kinds) or 'a table'}")
        console.print(_columns(part))
    task, model = found["task"], found["model"]
    say(f"as examples of task {task['name']!r}, in tokens of {model['name']} (model.max_length {model['max_length']}):")
    console.print(_files(found))
    if found["labels"]:
        say("labels: " + ", ".join(f"{name} {count}" for name, count in found["labels"].items()))
    for part in found["files"]:
        _tell_faults(part)
    for pair in found["across"]:
        say(f"{pair['alike']} examples of {pair['second']} stand in {pair['first']}, too ({pair['exact']} exactly)")
    if found["contradictions"]:
        say(f"{found['contradictions']} prompts have two different right answers")
    if found["task"]["is_guessed"]:
        say("the task is guessed; 'silotune init' writes it into a configuration:")
        console.print(
            written({"data": data.model_dump(mode="json", include={"task", "definition"}, exclude_defaults=True)}),
            soft_wrap=True,
        )
    for part in found["files"]:
        for shown in part.get("shown", ()):
            say(" | ".join([*(f"{role}: {content}" for role, content in shown["messages"]), f"-> {shown['answer']}"]))


def _tell_faults(part: Mapping[str, Any]) -> None:
    from silotune.experiment.data_check import notes_on

    for note in part["notes"]:
        say(f"note: {note}")
    for note in notes_on(part["tokens"]):
        say(f"{part['file']}: {note}")
    for reason, count in part["bad_rows"]["kinds"].items():
        places = [each["place"] for each in part["bad_rows"]["first"] if each["reason"] == reason]
        where = f" ({', '.join(places)}{' ...' if len(places) < count else ''})" if places else ""
        say(f"{part['file']}: {count} {'row does' if count == 1 else 'rows do'} not fit: {reason}{where}")


_MOST_COLUMNS = 100
"""Columns that are shown; ``--json`` has all."""


def _columns(part: Mapping[str, Any]) -> Table:
    from rich.table import Table

    from silotune.data.guess import LONGEST_NAME

    table = Table(box=None, pad_edge=False)
    for heading in ("column", "holds", "filled", "empty", "different", "mean characters"):
        table.add_column(heading, justify="left" if heading in ("column", "holds") else "right")
    for column in part["columns"][:_MOST_COLUMNS]:
        figures = (column["filled"], column["empty"], column["distinct"], f"{column['characters']:.0f}")
        length = len(column["name"])
        name = one_line(column["name"]) if length <= LONGEST_NAME else f"(a name of {length} characters)"
        table.add_row(name, ", ".join(column["kinds"]), *map(str, figures))
    if len(part["columns"]) > _MOST_COLUMNS:
        table.add_row(f"... and {len(part['columns']) - _MOST_COLUMNS} more")
    return table


def _files(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    headings = ("file", "split", "client", "rows", "fit", "doubles", "alike", "median", "95 %", "longest", "cut")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:3] else "right")
    for part in found["files"]:
        tokens, doubles = part["tokens"], part["duplicates"]
        figures = [part["rows"], part["examples"], doubles["exact"], doubles["alike"]]
        figures += [tokens.get(name, "-") for name in ("median", "p95", "longest", "cut")]
        table.add_row(one_line(Path(part["file"]).name), part["split"], part["client"] or "-", *map(str, figures))
    return table


def init(
    source: Annotated[Path, typer.Argument(metavar="FILE_OR_FOLDER", help="A file, or one file an institution.")],
    out: Annotated[Path, typer.Option("--out", help="The configuration to write.")] = Path("config.toml"),
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write a configuration for a file, or for a folder of one file an institution.

    The task is guessed from the columns; files that are named test or validation are taken as such.
    """
    from silotune.experiment.first_config import first_config
    from silotune.record.files import write_bytes

    if out.exists():
        raise ConfigError(f"{str(out)!r} is there already: name another file with --out")
    with reserved_stdout(as_json):
        text, notes = first_config(source, out, settings or [])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, text.encode())
    if as_json:
        print_json({"config": str(out), "notes": notes})
        return
    for note in notes:
        say(f"note: {note}")
    say(str(out))
    say(f"look at its data:  silotune data check --config {out}")
    say(f"run it:            silotune run {out}")
