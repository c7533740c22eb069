"""Guesses from a file's columns what its task may be: which column is the question, which the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from silotune.data.rows import placeholders, plain_text, to_example
from silotune.data.tasks import TASKS
from silotune.errors import DataError
from silotune.settings.base import composed
from silotune.structs import Row

_KNOWN: Final = ("preference", "instruct")
"""Tasks that columns alone tell, looked at in this order; by 0 and 1 two tasks with labels mean different things."""
_TRIED_ROWS: Final = 200
_MOST_OPTIONS, _LONGEST_OPTION, _LISTED_OPTIONS = 30, 40, 8
_ANSWERS: Final = (
    *("label", "labels", "answer", "class", "category", "target", "sentiment", "urgency", "priority", "outcome"),
    *("response", "output", "completion", "reply", "summary", "diagnosis", "code", "y"),
    *("etiqueta", "respuesta", "étiquette", "réponse", "classe", "klasse", "etikett", "antwort", "categoria"),
)
"""Names that a column of answers may have, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Column:
    """What a column holds: the kinds of its values, how many are there, empty or different, and their mean length."""

    name: str
    kinds: tuple[str, ...]
    filled: int
    empty: int
    distinct: int
    characters: float

    @property
    def is_text(self) -> bool:
        """Whether it holds nothing but text."""
        return self.kinds == ("text",)


@dataclass(frozen=True, slots=True)
class Guess:
    """Keys of ``[data]`` that make a file's rows examples, the objective that learns from them, and other columns."""

    data: Mapping[str, Any]
    objective: str
    unused: tuple[str, ...] = ()


class GuessError(DataError):
    """Columns that do not show a task."""

    def __init__(self, message: str, columns: Sequence[Column]) -> None:
        super().__init__(f"{message}: {_REMEDY}")
        self.columns = columns


_REMEDY: Final = "name them in [data.definition] of a configuration ('silotune configs copy custom-task' has one)"


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """What each column holds, in the order of the columns."""
    names = dict.fromkeys(composed(name) for row in rows for name in row)
    return [_column(name, [_decoded(row.get(name)) for row in rows]) for name in names]


def _decoded(value: Any) -> Any:
    """Text in place of bytes that are UTF-8, as some writers of Parquet leave it; any other value as it is."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _column(name: str, values: Sequence[Any]) -> Column:
    filled = [value for value in values if not _is_empty(value)]
    kinds = sorted({_kind(value) for value in filled})
    written = [value if isinstance(value, str) else repr(value) for value in filled]
    length = sum(map(len, written)) / len(written) if written else 0.0
    return Column(name, tuple(kinds), len(filled), len(values) - len(filled), len(set(written)), length)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())  # NaN is unlike itself


_KINDS: Final = ((bool, "truth value"), (str, "text"), ((int, float), "number"), (bytes, "bytes"), (list, "list"),
                 (Mapping, "mapping"))  # fmt: skip


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "other")


def guess(rows: Sequence[Row]) -> Guess:
    """What the rows' task may be.

    Raises:
        GuessError: No column looks like a question's, or none like an answer's.
    """
    for name in _KNOWN:
        if _fits(name, rows[:_TRIED_ROWS]):
            return Guess({"task": name}, "dpo" if name == "preference" else "sft")
    columns = {column.name: column for column in columns_of(rows)}
    if list(columns) == ["text"]:
        return Guess({"task": "text"}, "pretrain")
    answer, options = _answer_of(columns, rows)
    texts = [column for column in columns.values() if column.is_text and column.name != answer]
    if not texts:
        raise GuessError(f"none of the columns {', '.join(columns)} looks like a question", list(columns.values()))
    text = max(texts, key=lambda column: column.characters)
    fields = [name for name, each in columns.items() if name not in (answer, text.name, "label") and _is_closed(each)]
    definition: dict[str, Any] = {"prompt": _prompt(text.name, options), "answer": answer}
    if options:
        definition["options"] = options
    shown = placeholders(definition["prompt"])[0]
    if shown != text.name:
        definition["columns"] = {shown: text.name}
    if fields:
        definition["fields"] = fields
    unused = tuple(name for name in columns if name not in (answer, text.name, *fields))
    return Guess({"task": "custom", "definition": definition}, "choice" if options else "sft", unused)


def _fits(name: str, rows: Sequence[Row]) -> bool:
    try:
        for number, row in enumerate(rows, start=1):
            to_example(TASKS[name], row, where=name, number=number)
    except DataError:
        return False
    return True


def _answer_of(columns: Mapping[str, Column], rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The column of the answers, and the closed set that they are of; an empty one for open answers."""
    closed = [column.name for column in columns.values() if _is_closed(column)]
    named = [name for name in sorted(columns, key=_place) if composed(name).casefold() in _ANSWERS]
    for name in (*(name for name in named if name in closed), *(named or reversed(closed))):
        return name, _options(name, rows) if name in closed else []
    raise GuessError(f"none of the columns {', '.join(columns)} looks like an answer", list(columns.values()))


def _place(name: str) -> int:
    low = composed(name).casefold()
    return _ANSWERS.index(low) if low in _ANSWERS else len(_ANSWERS)


def _is_closed(column: Column) -> bool:
    """Whether few short values come again and again."""
    return (
        column.kinds in (("text",), ("number",), ("truth value",))
        and 2 <= column.distinct <= min(_MOST_OPTIONS, column.filled // 2)
        and column.characters <= _LONGEST_OPTION
    )


def _options(name: str, rows: Sequence[Row]) -> list[str]:
    """The different values of a column; of several spellings in small and large letters, the most frequent one."""
    found = Counter(composed(plain_text(_decoded(row.get(name)), name)) for row in rows)
    spelt: dict[str, str] = {}
    for value, _ in found.most_common():
        if value:
            spelt.setdefault(value.casefold(), value)
    return sorted(spelt.values())


def _prompt(column: str, options: Sequence[str]) -> str:
    shown = column if column.isidentifier() else "text"
    asked = f"Which of these is it: {', '.join(options)}?\n" if 0 < len(options) <= _LISTED_OPTIONS else ""
    return f"{{{shown}}}\n{asked.replace('{', '{{').replace('}', '}}')}Answer:"
