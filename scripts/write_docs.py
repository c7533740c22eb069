"""Writes docs/configuration.md and docs/limits.md from the settings, and docs/cli.md from the commands' own help.

``python scripts/write_docs.py`` writes all three; with ``--check`` it writes nothing and ends with code 1 when a file
is out of date. A test does the same check.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

import click
import typer
from pydantic import BaseModel

from silotune.cli.main import build_app
from silotune.config import Config
from silotune.settings.base import Section
from silotune.settings.limits import LIMITS
from silotune.settings.registry import Table, section_of, table_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
WIDTH = 100
NOTE = "<!-- Written by scripts/write_docs.py: change the source it reads, then run `make docs`. -->"
CONFIGURATION = """# Configuration

A run is described by one TOML file. Every key has a type and a range, nearly all have a default, an unknown key is
refused with the nearest match, and all faults of a file are reported at once. `--set section.key=value` changes one
value for one run; the value is read as TOML (`true`, `0.5`, `[1, 2]`, `"text"`), or as text where it is no TOML. Start
from a shipped file: `silotune configs list`, then `silotune configs copy NAME`.

`adapter.type = "qlora"` sets `model.precision = "int4"`. What does not go together is refused, with the reason:
[limits](limits.md) lists all of it.
What a run really used, defaults included, stands in `config.json` of its [run folder](run-folder.md).

"not set" as a default means that the key is left out: TOML has no null.

## Which objective

| `training.objective` | models | tasks | what is trained and sent |
|---|---|---|---|
| `sft` | causal language models | all but plain text | the adapter |
| `choice` | causal language models | those with options, also options that differ by row | the adapter |
| `classify` | these and encoders | those with the same options in every row | the adapter and a classification head |
| `dpo`, `kto` | causal language models | pairs of answers | the adapter |
| `pretrain` | causal language models | plain text | the adapter |

Chats with several answers, packing, plain text, mixtures of tasks and beginning from a trained adapter stand in
[objectives](objectives.md), `dpo` and `kto` in [preferences](preference.md).

Encoders are BERT, RoBERTa, DistilBERT, DeBERTa, MiniLM and their kind. With `classify` the model is loaded as
`AutoModelForSequenceClassification`. Its head (and the pooler, where the checkpoint has none) is drawn from `seed`, or
kept where the checkpoint has a head for the same classes in the same order; it stays in float32 on a bfloat16 or int4
base. MedQA, MedMCQA and `medical-choice` are refused: A to D say nothing without the options of the row. The
likelihood of an option is the probability of its class.

`training.objective.wording` says what a classifier reads. `prompt` is the whole prompt, through the chat template where
there is one. `text` is the row alone: the columns that the prompt shows, in its order, joined by the encoder's
separator (by a line break for a decoder). `auto` is `text` for an encoder, which learns from labels and to which an
instruction that is the same in every row tells nothing, and `prompt` for a decoder, which was trained to go on after
one. Texts begin and end as the tokenizer does it ([CLS] and [SEP]) and are cut on the left to `model.max_length`.
"""
LIMITED = """# What does not go together

A run that asks for something that cannot be given, or for a setting that would do nothing, is refused before it loads
anything, with one of these lines. `…` stands for what the configuration says. They are read from
`src/silotune/settings/limits.py`, the one table of limits; single values have limits of their own, which stand in the
[configuration](configuration.md).
"""
COMMANDS = """# Commands

What `silotune COMMAND --help` says, without its boxes. Exit codes and remedies: [errors.md](errors.md).
"""


def documents() -> dict[Path, str]:
    """Each generated file with its contents."""
    return {DOCS / "configuration.md": configuration(), DOCS / "limits.md": limits(), DOCS / "cli.md": commands()}


def configuration() -> str:
    """The reference of all sections, as Markdown."""
    return "\n".join((CONFIGURATION, NOTE, "", "\n".join(_sections("", Config))))


def limits() -> str:
    """The table of limits, as Markdown."""
    lines: dict[str, list[str]] = {}
    for subject, rows in LIMITS.items():
        for limit in rows:
            if limit.says.startswith("{what} {why}"):  # the table of settings that need another one
                continue
            for title in [WAYS[way] for way in limit.ways] or [subject.capitalize()]:
                lines.setdefault(title, []).append(f"- {_plain(limit.says)}")
    parts = [f"## {title}\n\n" + "\n".join(dict.fromkeys(own)) + "\n" for title, own in lines.items()]
    return "\n".join((LIMITED, NOTE, "", *parts, "\n".join(_dependent())))


WAYS = {"ray": 'Not with `federation.engine = "ray"`', "sites": "Not over sites, with `silotune submit`"}


def _plain(text: str) -> str:
    """A line of the table with ``…`` for every value of a run."""
    return re.sub(r"'?\{[^}]*\}'?", "…", text).replace("|", "\\|").replace("<", "&lt;")


def _dependent() -> Iterator[str]:
    """The settings that mean something only with a certain value of another one."""
    yield "## Settings that need another one\n"
    yield "| setting | means something |\n|---|---|"
    for path, section in _all_sections("", Config):
        for key, needs in section.depends.items() if issubclass(section, Section) else ():
            other = f"`{path}.{needs.key}`"
            values = " or ".join(f"`{json.dumps(value)}`" for value in needs.values)
            given = f"without {other}" if needs.values == (None,) else f"with {other} = {values}" if values else ""
            yield f"| `{path}.{key}` | {given or f'where {other} is given'} |"
    yield ""


def _all_sections(path: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, section
    for name in section.model_fields:
        inner = section_of(section, name) if table_of(section, name) is None else None
        if inner is not None:
            yield from _all_sections(f"{path}.{name}".lstrip("."), inner)


def _sections(path: str, section: type[BaseModel]) -> Iterator[str]:
    """A section, and the sections and choices in it."""
    yield _section(path, section)
    for name, field in section.model_fields.items():
        inside = f"{path}.{name}" if path else name
        table, inner = table_of(section, name), section_of(section, name)
        if table is not None:
            yield from _choice(inside, table, field.description or "")
        elif inner is not None:
            yield from _sections(f"{inside}.NAME" if get_origin(field.annotation) is dict else inside, inner)


def _section(path: str, section: type[BaseModel]) -> str:
    title = f"## `[{path}]`" if path else "## Above all sections"
    about = inspect.getdoc(section) if path else "These keys stand before the first section."
    rows = [f"| `{name}` | {kind} | {default} | {about} |" for name, kind, default, about in _rows(section)]
    head = ["| key | type or choices | default | meaning |", "|---|---|---|---|"]
    return "\n".join((title, "", about or "", "", *(head + rows if rows else []), ""))


def _choice(path: str, table: Table[Any], about: str) -> Iterator[str]:
    """A choice: its names, and the settings of each of them, those that several have in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in table:
        for row in _rows(table[name]):
            rows.setdefault(row, []).append(name)
    names = [f"| `{name}` | {_cell(' '.join((inspect.getdoc(table[name]) or '').split()))} |" for name in table]
    yield "\n".join((f"## `{path}`", "", *([_cell(about[:1].upper() + about[1:]) + ".", ""] if about else []),
                     "| type | meaning |", "|---|---|", *names, ""))  # fmt: skip
    if rows:
        head = ["| key | of | type or choices | default | meaning |", "|---|---|---|---|---|"]
        cells = [
            f"| `{row[0]}` | {'all' if len(own) == len(table) else ', '.join(f'`{name}`' for name in own)} | "
            f"{row[1]} | {row[2]} | {row[3]} |"
            for row, own in rows.items()
        ]
        yield "\n".join((*head, *cells, ""))
    inner = {key: found for name in table for key in table[name].model_fields if (found := table_of(table[name], key))}
    for key, found in inner.items():
        (field,) = (table[name].model_fields[key] for name in table if key in table[name].model_fields)
        yield from _choice(f"{path}.{key}", found, field.description or "")


def _rows(section: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key of a section that is no section itself."""
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        table = table_of(section, name)
        about = _cell(field.description or "")
        if table is not None:
            yield name, ", ".join(f"`{each}`" for each in table), f'`"{field.default.type}"`', about
        elif section_of(section, name) is None:
            shown = schema["properties"][name]
            yield name, _kind(shown), _default(name, shown, schema), about


def _kind(field: Mapping[str, Any]) -> str:
    """The type in words, with its range or its choices."""
    kinds = [kind for kind in field.get("anyOf", (field,)) if kind.get("type") != "null"]
    return " or ".join(_one_kind(kind) for kind in kinds)


def _one_kind(kind: Mapping[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(f"`{name}`" for name in kind["enum"])
    if kind["type"] == "array":
        pair = kind.get("prefixItems")
        return f"pair of {_one_kind(pair[0])}" if pair else f"list of {_one_kind(kind['items'])}"
    if kind["type"] == "object":
        return f"table of {_one_kind(kind['additionalProperties'])}"
    if kind.get("format") == "path":
        return "path"
    name = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[kind["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {kind[word]:g}" if kind[word] < 1e6 else "" for word, sign in signs.items() if word in kind]
    return ", ".join((name, *filter(None, bounds)))


def _default(name: str, field: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    if name in part.get("required", ()):
        return "required"
    value = field.get("default")
    return "not set" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands() -> str:
    """The help of every command, as Markdown."""
    app = build_app()
    app.rich_markup_mode = None  # type: ignore[assignment]  # plain text: no boxes, no colours
    root = typer.main.get_command(app)
    parts = [f"## {path}\n\n```text\n{text}\n```\n" for path, text in _helps(root, "silotune", None)]
    return "\n".join((COMMANDS, NOTE, "", "\n".join(parts)))


def _helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
    yield context.command_path, command.get_help(context).replace("\\[", "[").strip()
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            yield from _helps(command.commands[each], each, context)


def main() -> int:
    """Writes or checks the documents; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; code 1 when a file is out of date")
    is_check = parser.parse_args().check
    old = [path for path, text in documents().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in old:
        if not is_check:
            path.write_text(documents()[path], encoding="utf-8")
        print(f"{path.name}: {'out of date, run make docs' if is_check else 'written'}")
    return int(is_check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
