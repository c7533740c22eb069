"""Guesses from a file's columns what its task may be: which column is the question, which the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from silotune.data.files import Table
from silotune.data.load import readable
from silotune.data.own_options import OwnOptions, own_options
from silotune.data.rows import as_label, placeholders, plain_text, to_example, whole_number
from silotune.data.tasks import TASKS
from silotune.errors import DataError
from silotune.settings.base import composed
from silotune.structs import Row

_KNOWN: Final = ("preference", "instruct")
"""Tasks that columns alone tell, looked at in this order; by 0 and 1 two tasks with labels mean different things."""
_TRIED_ROWS: Final = 200
LONGEST_NAME: Final = 60
"""Characters of a column's name; a longer one is likely a row's text, in a file without names."""
_LISTED_COLUMNS: Final = 12
_AN_EXAMPLE: Final = "the first row looks like an example: put a row with a short name for each column above it"
_MOST_OPTIONS, _LONGEST_OPTION, _LISTED_OPTIONS = 30, 40, 8
_ANSWERS: Final = (
    *("label", "labels", "answer", "class", "category", "target", "sentiment", "urgency", "priority", "outcome"),
    *("answer_idx", "correct_answer", "correct_option", "correct"),
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
    filled: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            own = filled.setdefault(composed(name), [])
            if not _is_empty(value):
                own.append(_decoded(value))
    return [_column(name, values, len(rows) - len(values)) for name, values in filled.items()]


def _decoded(value: Any) -> Any:
    """Text in place of bytes that are UTF-8, as some writers of Parquet leave it; any other value as it is."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _column(name: str, filled: Sequence[Any], empty: int) -> Column:
    kinds = sorted({_kind(value) for value in filled})
    written = [value if isinstance(value, str) else repr(value) for value in filled]
    length = sum(map(len, written)) / len(written) if written else 0.0
    return Column(name, tuple(kinds), len(filled), empty, len(set(written)), length)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())  # NaN is unlike itself


_KINDS: Final = ((bool, "truth value"), (str, "text"), ((int, float), "number"), (bytes, "bytes"), (list, "list"),
                 (Mapping, "mapping"))  # fmt: skip


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "other")


def guess_from(tables: Mapping[Path, Table]) -> Guess:
    """What the task of some files may be.

    Raises:
        DataError: A file has no row that can be read, or the columns do not show a task.
    """
    rows = [row for path, table in tables.items() for row in readable(table, str(path))]
    try:
        return guess(rows)
    except GuessError as error:
        error.beside = "; ".join(note for table in tables.values() for note in table.notes)
        raise


def guess(rows: Sequence[Row]) -> Guess:
    """What the rows' task may be.

    Raises:
        GuessError: No column looks like a question's, or none like an answer's.
    """
    tried = rows[:_TRIED_ROWS]
    fits = {name: _fits(name, tried) for name in _KNOWN}
    name = max(_KNOWN, key=lambda each: fits[each])
    if fits[name] * 2 > len(tried):
        return Guess({"task": name}, _objective(name, tried))
    columns = {column.name: column for column in columns_of(rows)}
    if any(len(name) > LONGEST_NAME for name in columns):
        raise GuessError(f"{_AN_EXAMPLE}; if these are names", list(columns.values()))
    _refuse_chats(columns, tried)
    if list(columns) == ["text"]:
        return Guess({"task": "text"}, "pretrain")
    answer, options = _answer_of(columns, rows)
    own = own_options(rows, answer)
    taken = {answer, *(own.columns if own is not None else ())}
    texts = [column for column in columns.values() if column.is_text and column.name not in taken]
    if not texts:
        raise GuessError(_no_column(columns, "a question"), list(columns.values()))
    text = max(texts, key=lambda column: column.characters).name
    if as_label(answer) in map(as_label, options):
        raise DataError(_AN_EXAMPLE)
    definition = _definition(text, answer, options, own)
    taken.add(text)
    fields = [name for name, each in columns.items() if name not in taken | {"label"} and _is_closed(each)]
    if fields:
        definition["fields"] = fields
    unused = tuple(name for name in columns if name not in taken.union(fields))
    objective = "choice" if "options" in definition else "sft"
    return Guess({"task": "custom", "definition": definition}, objective, unused)


def _definition(text: str, answer: str, options: Sequence[str], own: OwnOptions | None) -> dict[str, Any]:
    definition: dict[str, Any] = {"prompt": _prompt(text, options, has_own=own is not None), "answer": answer}
    if own is not None:
        definition |= {"options": list(own.names), "choices": list(own.columns)}
        definition |= {"label_names": dict(own.label_names)} if own.label_names else {}
    elif options:
        definition["options"] = list(options)
    shown = placeholders(definition["prompt"])[0]
    return definition if shown == text else {**definition, "columns": {shown: text}}


def _objective(name: str, rows: Sequence[Row]) -> str:
    if name != "preference":
        return "sft"
    return "kto" if all("rejected" not in row for row in rows) else "dpo"


def _refuse_chats(columns: Mapping[str, Column], rows: Sequence[Row]) -> None:
    """Says why chats are none of a known task.

    Raises:
        DataError: There is a column of chats.
    """
    if any(columns[name].kinds == ("list",) for name in ("messages", "conversations") if name in columns):
        for number, row in enumerate(rows, start=1):
            try:
                to_example(TASKS["instruct"], row, where="chats", number=number)
            except DataError as error:
                raise DataError(f"most chats do not fit; the first: {error.told.removeprefix('chats: ')}") from None


def _no_column(columns: Mapping[str, Column], wanted: str) -> str:
    more = f" and {len(columns) - _LISTED_COLUMNS} more" if len(columns) > _LISTED_COLUMNS else ""
    return f"none of the columns {', '.join(islice(columns, _LISTED_COLUMNS))}{more} looks like {wanted}"


def _fits(name: str, rows: Sequence[Row]) -> int:
    """How many rows are examples of a task."""
    found = 0
    for number, row in enumerate(rows, start=1):
        try:
            to_example(TASKS[name], row, where=name, number=number)
            found += 1
        except DataError:
            continue
    return found


def _answer_of(columns: Mapping[str, Column], rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The column of the answers, and the closed set that they are of; an empty one for open answers."""
    closed = [column.name for column in columns.values() if _is_closed(column)]
    named = [name for name in sorted(columns, key=_place) if composed(name).casefold() in _ANSWERS]
    for name in (*(name for name in named if name in closed), *(named or reversed(closed))):
        return name, _options(name, rows) if name in closed else []
    raise GuessError(_no_column(columns, "an answer"), list(columns.values()))


def _place(name: str) -> int:
    low = composed(name).casefold()
    return _ANSWERS.index(low) if low in _ANSWERS else len(_ANSWERS)


def _is_closed(column: Column) -> bool:
    """Whether few short values come again and again."""
    return (
        0 < len(column.kinds) == len({"text", "number", "truth value"}.intersection(column.kinds))
        and 2 <= column.distinct <= min(_MOST_OPTIONS, column.filled // 2)
        and column.characters <= _LONGEST_OPTION
    )


def _options(name: str, rows: Sequence[Row]) -> list[str]:
    """The different values of a column; of several spellings that compare equal, the most frequent one.

    A long one that stands there once is a row's text that slipped into the column, and no option.
    """
    found = Counter(composed(plain_text(_decoded(row.get(name)), name)) for row in rows)
    spelt: dict[str, str] = {}
    for value, times in found.most_common():
        whole = whole_number(value)
        if as_label(value) and (times > 1 or len(value) <= _LONGEST_OPTION):
            spelt.setdefault(as_label(value), whole if whole in found else value)
    return sorted(spelt.values())


def _prompt(column: str, options: Sequence[str], *, has_own: bool) -> str:
    shown = column if column.isidentifier() and column != "options" else "text"
    if has_own:
        return f"{{{shown}}}\n{{options}}\nAnswer:"
    asked = f"Which of these is it: {', '.join(options)}?\n" if 0 < len(options) <= _LISTED_OPTIONS else ""
    return f"{{{shown}}}\n{asked.replace('{', '{{').replace('}', '}}')}Answer:"
