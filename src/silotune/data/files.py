"""Reads rows from JSONL, JSON, CSV, TSV, Parquet, Excel and text files, also packed by gzip.

What is broken is named by file and line, not by content.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import Any, Final

from silotune.data.encodings import Decoded, decoded
from silotune.errors import DataError, require
from silotune.settings.base import composed
from silotune.settings.sections import FileSettings
from silotune.structs import Row


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be read: where it stands, such as ``line 3``, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Table:
    """What a file holds.

    Attributes:
        entries: Its rows in order, and a fault in place of each that cannot be read.
        notes: What a reader of results should know of how it was read.
        delimiter: What parts the cells of a CSV file; empty for other kinds of files.
        encoding: Of its text; empty for a file that is no text.
    """

    entries: list[Row | Fault]
    notes: tuple[str, ...] = ()
    delimiter: str = ""
    encoding: str = ""


def read_rows(path: str | Path, settings: FileSettings | None = None) -> list[Row]:
    """All rows of a file, by its suffix (``SUFFIXES``).

    Raises:
        DataError: As ``read_table``, or a row cannot be read.
    """
    rows = []
    for entry in read_table(path, settings).entries:
        if isinstance(entry, Fault):
            raise DataError(f"{path}: {entry}")
        rows.append(entry)
    return rows


def read_table(path: str | Path, settings: FileSettings | None = None) -> Table:
    """All rows of a file, by its suffix (``SUFFIXES``), with those that cannot be read.

    Raises:
        DataError: The file is missing, empty, unreadable, of an unknown kind, or broken as a whole.
    """
    path = Path(path)
    reader = _READERS.get(suffix_of(path).removesuffix(PACKED))
    if reader is None or suffix_of(path) not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {suffix_of(path)!r}; allowed: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"no file {str(path.absolute())!r}", beside=f"{path.parent} holds {listing(path.parent)}")
    try:
        table = reader(path, _unpacked(path), settings or FileSettings())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or type(error).__name__}") from None
    if not table.entries:
        raise DataError(f"{path}: is empty")
    return table


def suffix_of(path: Path) -> str:
    """The end of a file's name that says of what kind it is, in small letters: ``.csv``, or ``.csv.gz``."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last == PACKED else last


def listing(folder: Path, *, most: int = 12) -> str:
    """What a folder holds, in a few words."""
    if not folder.is_dir():
        return "nothing (it does not exist)"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    shown = ", ".join(names[:most]) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _unpacked(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read()
    if suffix_of(path).endswith(PACKED):
        try:
            return gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise DataError(f"{path}: not a valid gzip file, or cut off") from None
    return data


def _read_jsonl(path: Path, data: bytes, settings: FileSettings) -> Table:
    text = decoded(data, settings.encoding, path)
    lines = enumerate(re.split(r"\r\n|\n|\r", text.text), start=1)
    return _table(text, [_object(line, f"line {number}") for number, line in lines if line.strip()])


def _object(line: str, place: str) -> Row | Fault:
    try:
        return _named(_parse(line), place)
    except DataError as error:
        return Fault(place, str(error))


def _read_json(path: Path, data: bytes, settings: FileSettings) -> Table:
    text = decoded(data, settings.encoding, path)
    try:
        document = _parse(text.text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(document, list):
        raise DataError(f"{path}: holds no list of rows; if each line is a row, name the file .jsonl")
    return _table(text, [_named(row, f"row {number}") for number, row in enumerate(document, start=1)])


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"not valid JSON ({at}column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"JSON that nests too deep or holds too long a number ({type(error).__name__})") from None


def _named(value: Any, place: str) -> Row | Fault:
    return value if isinstance(value, dict) else Fault(place, "is not a JSON object with named fields")


def _table(text: Decoded, entries: list[Row | Fault], delimiter: str = "") -> Table:
    return Table(entries, text.notes, delimiter, text.encoding)


# --- tables ----------------------------------------------------------------------------------------------------------

_DELIMITERS: Final = (",", ";", "\t", "|")
"""What may part the cells of a CSV file that does not say it; the first of those that fit equally well is taken."""
_TRIED_ROWS: Final = 50


def _read_csv(path: Path, data: bytes, settings: FileSettings, *, usual: str | None = None) -> Table:
    text = decoded(data, settings.encoding, path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text.text)))  # Python's own limit is shorter than a report
    delimiter = settings.delimiter or usual or max(_DELIMITERS, key=lambda each: _fit(text.text, each))
    reader = csv.reader(StringIO(text.text, newline=""), strict=True, delimiter=delimiter)
    try:
        rows = [cells for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from None
    header, *rest = rows or [[]]
    _check_header(header, path)
    return _table(text, [_cells(header, cells, number) for number, cells in enumerate(rest, start=1)], delimiter)


def _fit(text: str, delimiter: str) -> float:
    """Share of the first rows that have as many cells as the header, which must have two or more."""
    reader = csv.reader(StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        rows = list(islice(filter(None, reader), _TRIED_ROWS))
    except csv.Error:
        return 0.0
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(cells) == len(rows[0]) for cells in rows) / len(rows)


def _check_header(header: list[str], path: Path) -> None:
    if len(set(map(composed, header))) != len(header):
        raise DataError(f"{path}: two columns have the same name")


def _cells(header: list[str], cells: list[Any], number: int) -> Row | Fault:
    if len(cells) != len(header):
        return Fault(f"row {number}", f"has {len(cells)} cells, the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read_excel(path: Path, data: bytes, settings: FileSettings) -> Table:
    """The first sheet; its first row names the columns."""
    import zipfile
    from xml.etree.ElementTree import ParseError

    openpyxl = require("openpyxl", extra="xlsx")
    try:
        book = openpyxl.load_workbook(BytesIO(data), read_only=True, data_only=True)
        sheets = book.worksheets
        found = [[(cell.value, cell.data_type) for cell in row] for row in sheets[0].iter_rows()] if sheets else []
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, ParseError):
        raise DataError(f"{path}: not a valid .xlsx file") from None
    rows = [row for row in found if any(value is not None for value, _ in row)]
    if not rows:
        return Table([])
    width = max(place for place, (value, _) in enumerate(rows[0], start=1) if value is not None)
    header = ["" if value is None else str(value) for value, _ in rows[0][:width]]
    _check_header(header, path)
    notes = (f"{path}: read the first of {len(sheets)} sheets",) if len(sheets) > 1 else ()
    return Table([_sheet_row(header, row, number) for number, row in enumerate(rows[1:], start=1)], notes)


def _sheet_row(header: list[str], row: list[tuple[Any, str]], number: int) -> Row | Fault:
    if any(value is not None for value, _ in row[len(header) :]):
        return Fault(f"row {number}", "has a cell beyond the columns that the first row names")
    if any(kind == "e" for _, kind in row):
        return Fault(f"row {number}", "has a cell that shows an error of its formula, such as #N/A")
    values = [value for value, _ in row[: len(header)]]
    return dict(zip(header, values + [None] * (len(header) - len(values)), strict=True))


def _read_parquet(path: Path, data: bytes, settings: FileSettings) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row | Fault] = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException:
        raise DataError(f"{path}: not a valid Parquet file") from None
    return Table(rows)


def _read_text(path: Path, data: bytes, settings: FileSettings) -> Table:
    """Blank lines separate the documents."""
    text = decoded(data, settings.encoding, path)
    parts = re.sub(r"\r\n|\r", "\n", text.text).split("\n\n")
    return _table(text, [{"text": part.strip("\n").rstrip()} for part in parts if part.strip()])


_READERS: Final[Mapping[str, Callable[[Path, bytes, FileSettings], Table]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".tsv": partial(_read_csv, usual="\t"),
    ".xlsx": _read_excel,
}
PACKED: Final = ".gz"
SUFFIXES: Final = (*_READERS, *(f"{suffix}{PACKED}" for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt")))
