"""Parts the text of a CSV file into rows: what parts its cells, and what its quotes are for.

What is broken is named by line, not by content.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from silotune.errors import DataError
from silotune.settings.sections import FileSettings

if TYPE_CHECKING:
    import _csv

_DELIMITERS: Final = (",", ";", "\t", "|")
"""What may part the cells of a CSV file that does not say it; the first of those that fit equally well is taken."""
_TRIED_ROWS: Final = 50
_SAID: Final = re.compile(r"\Asep=([,;|:\t])(?:\r\n|\n|\r)", re.IGNORECASE)
"""The line above the header by which Excel is told what parts the cells."""
_QUOTES: Final[Mapping[str, Literal[0, 3]]] = {"cells": csv.QUOTE_MINIMAL, "text": csv.QUOTE_NONE}
"""What quotes are for (``data.quotes``) -> how Python's reader takes them."""
_REMEDY: Final = (
    "double each quote within a cell that stands in quotes; where quotes are characters like others, set "
    "data.quotes = 'text'"
)


@dataclass(frozen=True, slots=True)
class Lines:
    """The rows of a CSV file, header first, without empty ones; what parts them, and what is to be known of that."""

    rows: list[list[str]]
    delimiter: str
    notes: tuple[str, ...] = ()


def parted(text: str, settings: FileSettings, usual: str | None, path: Path) -> Lines:
    """The rows of a text.

    Args:
        text: All of the file.
        settings: What is said of delimiter and quotes; the rest is found.
        usual: The delimiter by the file's name; None to find it.
        path: The file, for errors and notes.

    Raises:
        DataError: A row cannot be parted.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # Python's own limit is shorter than a report
    said = _SAID.match(text)
    body = text[said.end() :] if said else text
    quotes = (settings.quotes,) if settings.quotes else tuple(_QUOTES)
    delimiter = settings.delimiter or (said[1] if said else usual) or _delimiter_of(body, quotes)
    rows, notes = _with_quotes(body, delimiter, settings.quotes, path, first_line=2 if said else 1)
    return Lines(rows, delimiter, notes)


def _delimiter_of(text: str, quotes: Sequence[str]) -> str:
    """What parts the cells, as the first of the ways to take quotes shows it that shows any."""
    for each in quotes:
        fits = {delimiter: _fit(text, delimiter, each) for delimiter in _DELIMITERS}
        if any(fits.values()):
            return max(fits, key=lambda delimiter: fits[delimiter])
    return _DELIMITERS[0]


def _fit(text: str, delimiter: str, quotes: str) -> float:
    """Share of the first rows that have as many cells as the header, which must have two or more."""
    try:
        rows = list(islice(filter(None, _reader(text, delimiter, quotes)), _TRIED_ROWS))
    except csv.Error:
        return 0.0
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(cells) == len(rows[0]) for cells in rows) / len(rows)


def _reader(text: str, delimiter: str, quotes: str) -> _csv.Reader:
    return csv.reader(StringIO(text, newline=""), strict=True, delimiter=delimiter, quoting=_QUOTES[quotes])


def _with_quotes(
    text: str, delimiter: str, quotes: str | None, path: Path, *, first_line: int
) -> tuple[list[list[str]], tuple[str, ...]]:
    """The rows, header first, without those whose cells are all empty; and what is to be known of their quotes.

    Quotes that part no cells are taken for text where nothing else can be meant: each line has as many cells as the
    header then, and none stands whole in quotes.
    """
    try:
        rows, is_broken = _rows_of(text, delimiter, quotes or "cells", first_line), None
    except DataError as error:
        rows, is_broken = [], error
    if quotes or not (is_broken or any("\n" in cell or "\r" in cell for cells in rows for cell in cells)):
        if is_broken:
            raise DataError(f"{path}: {is_broken}: {_REMEDY}")
        return rows, ()
    plain = _rows_of(text, delimiter, "text", first_line)
    is_even = len(plain[0]) > 1 and all(len(cells) == len(plain[0]) for cells in plain)
    if not is_broken:
        merged = (
            f"{path}: cells in quotes hold new lines: {len(rows) - 1} rows on {len(plain) - 1} lines, each of which "
        )
        return rows, (f"{merged}could be a row; if it is one, set data.quotes = 'text'",) if is_even else ()
    if not is_even or any(_is_in_quotes(cell) for cells in plain for cell in cells):
        raise DataError(f"{path}: {is_broken}: {_REMEDY}")
    return plain, (f"{path}: quotes are read as characters, since they enclose no cells; data.quotes says it instead",)


def _rows_of(text: str, delimiter: str, quotes: str, first_line: int) -> list[list[str]]:
    """The rows with a cell that is not empty.

    Raises:
        DataError: One cannot be parted; says on which line it begins.
    """
    reader, rows, line = _reader(text, delimiter, quotes), [], first_line
    try:
        for cells in reader:
            line = first_line + reader.line_num
            if any(map(str.strip, cells)):
                rows.append(cells)
    except csv.Error as error:
        raise DataError(f"line {line}: not valid CSV ({' '.join(str(error).split())})") from None
    return rows


def _is_in_quotes(cell: str) -> bool:
    return len(cell) > 1 and cell.startswith('"') and cell.endswith('"')
