"""Writes docs/configuration.md from the configuration's sections and docs/cli.md from the commands' own help.

``python scripts/write_docs.py`` writes both; with ``--check`` it writes nothing and ends with code 1 when a file is
out of date. A test does the same check.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import typer

from silotune.cli.main import build_app
from silotune.config import Config

DOCS = Path(__file__).resolve().parents[1] / "docs"
WIDTH = 100
NOTE = "<!-- Written by scripts/write_docs.py: change the source it reads, then run `make docs`. -->"
CONFIGURATION = """# Configuration

A run is described by one TOML file. Every key has a type and a range, nearly all have a default, an unknown key is
refused with the nearest match, and all faults of a file are reported at once. `--set section.key=value` changes one
value for one run; the value is read as TOML (`true`, `0.5`, `[1, 2]`, `"text"`), or as text where it is no TOML. Start
from a shipped file: `silotune configs list`, then `silotune configs copy NAME`.

Rules join keys of different sections: `adapter.kind = "qlora"` sets `model.precision = "int4"`;
`adapter.kind = "none"` refuses `int4`; `data.task = "custom"` needs `[data.definition]`;
`data.partition.scheme = "file"` needs `[data.partition.files]`; `training.objective = "classify"` refuses
`evaluation.scoring = "generation"`; `training.wording` other than `"auto"` needs `training.objective = "classify"`;
`federation.download` with `keep` other than `"all"` or `values = "sign"` needs `delta = true`;
`federation.clock.over_sampling` above 1 needs `federation.clients_per_round`; `federation.clock.buffer` refuses
`deadline_seconds`, `over_sampling` and `federation.download.delta`; `federation.upload`, `federation.download` and
`federation.clock` go with neither `privacy.dp` nor `privacy.protection` nor `federation.engine = "ray"`; with which
rules for LoRA's factors they go stands in [communication](communication.md);
`privacy.dp` needs `privacy.epsilon` or `privacy.noise_multiplier`, and refuses what would undo its guarantee
([privacy](privacy.md)).
What algorithms, rules and weightings need of each other and of `[training]` stands in [algorithms](algorithms.md).
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

`training.wording` says what a classifier reads. `prompt` is the whole prompt, through the chat template where there is
one. `text` is the row alone: the columns that the prompt shows, in its order, joined by the encoder's separator (by a
line break for a decoder). `auto` is `text` for an encoder, which learns from labels and to which an instruction that
is the same in every row tells nothing, and `prompt` for a decoder, which was trained to go on after one. Texts begin
and end as the tokenizer does it ([CLS] and [SEP]) and are cut on the left to `model.max_length`.
"""
COMMANDS = """# Commands

What `silotune COMMAND --help` says, without its boxes. Exit codes and remedies: [errors.md](errors.md).
"""


def documents() -> dict[Path, str]:
    """Each generated file with its contents."""
    return {DOCS / "configuration.md": configuration(), DOCS / "cli.md": commands()}


def configuration() -> str:
    """The reference of all sections, as Markdown."""
    schema = Config.model_json_schema()
    tables = [_section(path, part, schema) for path, part in _sections("", schema, schema)]
    return "\n".join((CONFIGURATION, NOTE, "", "\n".join(tables)))


def _sections(path: str, part: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A section and those in it, each with its dotted path."""
    yield path, part
    for name, field in part["properties"].items():
        inner = _referred(field, schema)
        if inner is not None:
            key = f"{name}.NAME" if "additionalProperties" in field else name
            yield from _sections(f"{path}.{key}" if path else key, inner, schema)


def _referred(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a field holds, or that each entry of its table is; None for a plain value."""
    for kind in (field, *field.get("anyOf", ()), field.get("additionalProperties") or {}):
        if "$ref" in kind:
            section: Mapping[str, Any] = schema["$defs"][kind["$ref"].rpartition("/")[2]]
            return section
    return None


def _section(path: str, part: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    title = f"## `[{path}]`" if path else "## Above all sections"
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(name, field, part)} | {_cell(field.get('description', ''))} |"
        for name, field in part["properties"].items()
        if _referred(field, schema) is None
    ]
    head = ["| key | type or choices | default | meaning |", "|---|---|---|---|"]
    about = part["description"].strip() if path else "These keys stand before the first section."
    return "\n".join((title, "", about, "", *head, *rows, ""))


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
