"""Looks at files of examples as a run would read them: what fits, what is double, what would be cut."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.data.files import Fault, Table, read_table
from silotune.data.guess import Guess, columns_of, guess_from
from silotune.data.load import asked_of, fitting, folded_of, local_files
from silotune.data.tasks import Task, resolve
from silotune.errors import DataError
from silotune.models.load import load_tokenizer
from silotune.record.printable import counted
from silotune.settings.sections import DataSection, ModelSection
from silotune.training.encoder import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from silotune.structs import Example, Row

MOST_SHOWN = 10
"""Rows that do not fit, and examples, that are shown of a file."""


@dataclass(frozen=True)
class Part:
    """A file that was looked at: the split and the client that it is of, what it holds, what fits the task."""

    path: Path
    split: str
    client: str
    table: Table
    examples: list[Example]
    faults: list[Fault]

    @property
    def rows(self) -> list[Row]:
        """The rows that can be read."""
        return [entry for entry in self.table.entries if not isinstance(entry, Fault)]


def guessed(path: Path, section: DataSection) -> Guess:
    """What the task of a file may be.

    Raises:
        DataError: The file is missing or broken, or its columns do not show it.
    """
    return guess_from({path: read_table(path, section)})


def look_at(section: DataSection, model: ModelSection, *, shows_texts: bool = False) -> dict[str, Any]:
    """All that is to be said of the files that a section names, ready for JSON.

    Args:
        section: ``[data]``, with files of its own.
        model: Whose tokens are counted, and how many of them an example may have.
        shows_texts: Whether some examples are shown as they would be asked.

    Raises:
        ConfigError: The task does not hold together.
        DataError: There are no files, or one is missing or broken as a whole.
    """
    task = resolve(section)
    if task.answer == "mixture":
        raise DataError("a mixture of tasks has no rows of its own: check one of its tasks with --task")
    parts = [
        _part(path, split, client, section, task)
        for split, files in local_files(section, task).items()
        for path, client in files
    ]
    if not parts:
        raise DataError(f"task {task.name!r}: no files are named, in data.train, data.root or data.partition.files")
    tokenizer = load_tokenizer(model)
    return {
        "task": {"name": task.name, "prompt": task.prompt, "answer": task.answer, "options": list(task.options)},
        "model": {"name": model.name, "max_length": model.max_length},
        "files": [_told(part, tokenizer, model.max_length, shows_texts) for part in parts],
        "labels": dict(Counter(example.fields["label"] for part in parts for example in part.examples if task.options)),
        "across": [found for pair in itertools.combinations(parts, 2) if (found := _across(*pair))],
        "contradictions": _contradictions(parts),
    }


def _part(path: Path, split: str, client: str, section: DataSection, task: Task) -> Part:
    table = read_table(path, section)
    return Part(path, split, client, table, *fitting(table, task, str(path)))


def _told(part: Part, tokenizer: PreTrainedTokenizerBase, max_length: int, shows_texts: bool) -> dict[str, Any]:
    kinds = Counter(fault.reason for fault in part.faults)
    told = {
        "file": str(part.path),
        "split": part.split,
        "client": part.client,
        "delimiter": part.table.delimiter,
        "encoding": part.table.encoding,
        "notes": list(part.table.notes),
        "rows": len(part.table.entries),
        "examples": len(part.examples),
        "bad_rows": {
            "count": len(part.faults),
            "kinds": dict(kinds.most_common(MOST_SHOWN)),
            "first": [asdict(fault) for fault in part.faults[:MOST_SHOWN]],
        },
        "columns": [asdict(column) for column in columns_of(part.rows)],
        "duplicates": _inside(part.examples),
        "tokens": token_lengths(part.examples, tokenizer, max_length),
    }
    if shows_texts:
        told["shown"] = [
            {"messages": list(example.messages), "answer": example.answer} for example in part.examples[:MOST_SHOWN]
        ]
    return told


def _inside(examples: Sequence[Example]) -> dict[str, int]:
    """Examples that stand in the same file before: as they are, and up to case, spaces and punctuation."""
    return {
        "exact": len(examples) - len({asked_of(example) for example in examples}),
        "alike": len(examples) - len({folded_of(example) for example in examples}),
    }


def _across(first: Part, second: Part) -> dict[str, Any]:
    """Examples of the second file that stand in the first; empty where none does."""
    exact, alike = ({each(example) for example in first.examples} for each in (asked_of, folded_of))
    found = {
        "first": str(first.path),
        "second": str(second.path),
        "exact": sum(asked_of(example) in exact for example in second.examples),
        "alike": sum(folded_of(example) in alike for example in second.examples),
    }
    return found if found["alike"] else {}


def _contradictions(parts: Iterable[Part]) -> int:
    """Prompts of a closed set of answers that have two different right answers, up to case, spaces and punctuation."""
    answers: dict[object, set[int]] = {}
    for part in parts:
        for example in part.examples:
            if example.label >= 0:
                answers.setdefault((folded_of(example), example.options), set()).add(example.label)
    return sum(len(found) > 1 for found in answers.values())


def token_lengths(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Mapping[str, Any]:
    """Tokens of prompt and answer together, before anything is cut, and how many examples would be cut, spell control
    marks, are pairs that would be left out, or cannot be given to the model, with the reason of the first."""
    encoder = Encoder(tokenizer, max_length=max_length)
    lengths, cut, marked, left_out, refused = [], 0, 0, 0, []
    for example in examples:
        try:
            made = encoder([example])
        except DataError as error:
            refused.append(str(error).partition(": ")[2])
            continue
        if not made:
            left_out += 1
            continue
        lengths.append(sum(each.length + each.prompt_cut + each.answer_cut for each in made))
        cut += any(each.prompt_cut or each.answer_cut for each in made)
        marked += any(each.marks for each in made)
    lengths.sort()
    places = {"median": 0.5, "p95": 0.95, "longest": 1.0}
    found = {
        name: lengths[min(int(share * len(lengths)), len(lengths) - 1)] for name, share in places.items() if lengths
    }
    counts = {"cut": cut, "marked": marked, "left_out": left_out, "refused": len(refused)}
    return {**found, **counts, "why": refused[0] if refused else ""}


def notes_on(tokens: Mapping[str, Any]) -> list[str]:
    """What a reader should know of examples as the model would be given them, beside their lengths and cuts."""
    kinds = {
        "marked": "control marks of the tokenizer stand in {}, and are read as plain text",
        "left_out": "pairs of the same answers up to model.max_length would be left out: {}",
        "refused": f"this model cannot be given {{}}: {tokens['why']}",
    }
    return [words.format(counted(tokens[kind], "example")) for kind, words in kinds.items() if tokens[kind]]
