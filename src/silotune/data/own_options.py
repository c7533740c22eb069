"""Finds the options that each row has of its own, in one column or in several, and what the answers call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Final

from silotune.data.rows import as_label, may_count, plain_text
from silotune.errors import DataError
from silotune.structs import Row

_SINGLE: Final = ("options", "choices", "optionen", "opciones", "antworten")
_NUMBERED: Final = re.compile(r"(option|choice|opt|op|answer|antwort|)[ _-]?([a-z]|[0-9]{1,2})", re.IGNORECASE)
_FEWEST: Final = 2
_UNCLEAR: Final = (
    "the numbers in column {!r} {}, and do not show which: say it in label_names of [data.definition] of a "
    "configuration ('silotune configs copy custom-task' has one)"
)


@dataclass(frozen=True, slots=True)
class OwnOptions:
    """Columns with the options of each row, the options' names, and other words of the answers for these."""

    columns: tuple[str, ...]
    names: tuple[str, ...]
    label_names: Mapping[str, str]


def own_options(rows: Sequence[Row], answer: str) -> OwnOptions | None:
    """The options of rows that each have their own; None where they have none.

    Answers are options' names, their texts, or numbers; numbers count from 0 where there is a 0, and from 1 where the
    highest is the number of options.

    Raises:
        DataError: The answers are numbers of which neither is the case.
    """
    columns = _columns(rows, answer)
    found = [_texts(row, columns) for row in rows] if columns else []
    first = found[0] if found else {}
    names = tuple(first)
    if len(names) < _FEWEST or any(tuple(texts) != names for texts in found):
        return None
    known = {as_label(name) for name in names}
    numbers = set()
    for row, texts in zip(rows, found, strict=True):
        said = as_label(plain_text(row.get(answer), answer))
        if may_count(said, len(names)) and said not in known:
            numbers.add(int(said))
            if said in map(as_label, texts.values()):
                raise DataError(_UNCLEAR.format(answer, "are options' texts or count the options"))
    return OwnOptions(columns, names, _by_number(numbers, names, answer))


def _columns(rows: Sequence[Row], answer: str) -> tuple[str, ...]:
    single = [name for name in rows[0] if name.casefold() in _SINGLE and isinstance(rows[0][name], (list, Mapping))]
    if single:
        return (single[0],)
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in rows[0]:
        hit = _NUMBERED.fullmatch(name)
        if hit and name != answer:
            groups.setdefault(hit[1].casefold(), []).append((hit[2].casefold(), name))
    for group in groups.values():
        marks = [mark for mark, _ in group]
        if any(marks == [mark(place) for place in range(len(marks))] for mark in _MARKS) and len(marks) >= _FEWEST:
            return tuple(name for _, name in group)
    return ()


_MARKS: Final = (lambda place: chr(ord("a") + place), lambda place: str(place), lambda place: str(place + 1))
"""How columns of options may be counted: a, b, c; 0, 1, 2; 1, 2, 3."""


def _texts(row: Row, columns: Sequence[str]) -> dict[str, str]:
    """Name of an option -> its text; empty where a row has no options that are text."""
    value = row.get(columns[0]) if len(columns) == 1 else [row.get(column) for column in columns]
    if isinstance(value, list):
        value = dict(zip(ascii_uppercase, value, strict=False)) if len(value) <= len(ascii_uppercase) else {}
    try:
        texts = {str(name): plain_text(text, "options") for name, text in (value or {}).items()}
    except (AttributeError, DataError):
        return {}
    return texts if all(texts.values()) else {}


def _by_number(numbers: set[int], names: tuple[str, ...], answer: str) -> dict[str, str]:
    if not numbers:
        return {}
    if 0 in numbers and len(names) not in numbers:
        return {str(place): name for place, name in enumerate(names)}
    if 0 not in numbers and len(names) in numbers:
        return {str(place): name for place, name in enumerate(names, start=1)}
    raise DataError(_UNCLEAR.format(answer, "count the options from 0 or from 1"))
