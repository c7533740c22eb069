"""Reads rows from JSONL, JSON, CSV, TSV, Parquet, Excel and text files, also packed by gzip.

What is broken is named by file and line, not by content.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from silotune.data.delimited import parted
from silotune.data.disguise import check_kind
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
    kind = suffix_of(path).removesuffix(PACKED)
    reader = _READERS.get(kind)
    if reader is None or suffix_of(path) not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {suffix_of(path)!r}; allowed: {', '.join(SUFFIXES)}")
    return _read(path, kind, reader, settings)


def read_lines(path: Path) -> Table:
    """The lines of a text file that are not empty, each as a row with a ``prompt``.

    Raises:
        DataError: The file is missing, empty, unreadable, or no text.
    """
    return _read(path, ".txt", _read_prompts, None)


def _read(
    path: Path, kind: str, reader: Callable[[Path, bytes, FileSettings], Table], settings: FileSettings | None
) -> Table:
    if not path.is_file():
        raise DataError(f"no file {str(path.absolute())!r}", beside=f"{path.parent} holds {listing(path.parent)}")
    try:
        data = _unpacked(path)
        check_kind(path, data, kind)
        table = reader(path, data, settings or FileSettings())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or type(error).__name__}") from None
    except MemoryError:
        raise DataError(f"{path}: does not fit into this machine's memory: split it, or take fewer rows") from None
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


_MOST_TIMES, _ALWAYS_TAKEN = 100, 64 << 20
"""A packed file may become so many times as long, and so many bytes in any case: tables of text become ten times as
long, a file that is made to fill a memory a thousand times."""


def _unpacked(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read()
    if not suffix_of(path).endswith(PACKED):
        return data
    most = _most_unpacked(len(data))
    try:
        with gzip.GzipFile(fileobj=BytesIO(data)) as packed:
            text = packed.read(most + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        remedy = "copy it anew" if data.startswith(b"\x1f\x8b") else f"leave {PACKED} out of its name"
        raise DataError(f"{path}: not a valid gzip file, or cut off: {remedy}") from None
    _check_unpacked(path, len(text), most)
    return text


def _most_unpacked(packed: int) -> int:
    return max(_ALWAYS_TAKEN, _MOST_TIMES * packed)


def _check_unpacked(path: Path, size: int, most: int) -> None:
    if size > most:
        raise DataError(
            f"{path}: unpacks to more than {most >> 20} MB, {_MOST_TIMES} times its size: if that is meant, unpack it"
        )


def _read_jsonl(path: Path, data: bytes, settings: FileSettings) -> Table:
    text = decoded(data, settings.encoding, path)
    if text.text.lstrip().startswith("[") and _is_list(text.text):
        raise DataError(f"{path}: holds one list, and not an object a line: let its name end in .json")
    lines = enumerate(re.split(r"\r\n|\n|\r", text.text), start=1)
    return _table(text, [_object(line, f"line {number}") for number, line in lines if line.strip()])


def _is_list(text: str) -> bool:
    try:
        return isinstance(_parse(text), list)
    except DataError:
        return False


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
        raise DataError(f"{path}: {error}; if each line is a row, let its name end in .jsonl") from None
    if not isinstance(document, list):
        raise DataError(
            f"{path}: holds no list of rows; if each line is a row, let its name end in .jsonl; if a list of rows "
            "stands within it, save that list alone"
        )
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


def _read_csv(path: Path, data: bytes, settings: FileSettings, *, usual: str | None = None) -> Table:
    text = decoded(data, settings.encoding, path)
    lines = parted(text.text, settings, usual, path)
    if not lines.rows:
        return _table(text, [], lines.delimiter)
    header, *rest = lines.rows
    columns = _Columns(header, path)
    if not rest:
        raise DataError(f"{path}: is empty below the row that names its columns")
    entries = [columns.row(cells, number, parted_by=lines.delimiter) for number, cells in enumerate(rest, start=1)]
    table = _table(text, entries, lines.delimiter)
    return replace(table, notes=(*table.notes, *lines.notes, *columns.notes(rest)))


class _Columns:
    """The columns that the first row of a table names; one without a name is not read."""

    def __init__(self, header: Sequence[str], path: Path) -> None:
        self._header, self._path = header, path
        self._named = [place for place, name in enumerate(header) if name.strip()]
        places: dict[str, int] = {}
        for place in self._named:
            first = places.setdefault(composed(header[place]), place)
            if first != place:
                raise DataError(
                    f"{path}: columns {first + 1} and {place + 1} have the same name: rename one; if the first row "
                    "holds an example, put a row of names above it"
                )

    def row(self, cells: Sequence[Any], number: int, *, parted_by: str) -> Row | Fault:
        """A row by its columns' names."""
        if len(cells) != len(self._header):
            remedy = (
                f": a cell that holds {parted_by!r} needs quotes around it" if len(cells) > len(self._header) else ""
            )
            return Fault(f"row {number}", f"has {len(cells)} cells, the header has {len(self._header)}{remedy}")
        return self.named(cells)

    def named(self, cells: Sequence[Any]) -> Row:
        """Cells of the columns that have a name."""
        return {self._header[place]: cells[place] if place < len(cells) else None for place in self._named}

    def notes(self, rows: Sequence[Sequence[Any]]) -> tuple[str, ...]:
        """A note on columns that hold something and have no name."""
        unnamed = [place for place in range(len(self._header)) if place not in self._named]
        filled = [
            place for place in unnamed if any(not _is_blank(cell) for row in rows for cell in row[place : place + 1])
        ]
        if not filled:
            return ()
        which = ", ".join(str(place + 1) for place in filled)
        return (f"{self._path}: not read, because the first row does not name it: column {which}",)


def _is_blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _read_excel(path: Path, data: bytes, settings: FileSettings) -> Table:
    """The first sheet; its first row names the columns."""
    import zipfile
    from xml.etree.ElementTree import ParseError

    openpyxl = require("openpyxl", extra="xlsx")
    try:
        with zipfile.ZipFile(BytesIO(data)) as packed:
            _check_unpacked(path, sum(part.file_size for part in packed.infolist()), _most_unpacked(len(data)))
        book = openpyxl.load_workbook(BytesIO(data), read_only=True, data_only=True)
        sheets = book.worksheets
        cells = _filled_rows(sheets[0], path) if sheets else []
    except (zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError, ParseError):
        raise DataError(f"{path}: not a valid .xlsx file") from None
    except (RuntimeError, NotImplementedError, EOFError, zlib.error):
        raise DataError(f"{path}: not a valid .xlsx file, or protected by a password: save it without one") from None
    others = f"read the first of {len(sheets)} sheets"
    if len(cells) < 2:
        beside = f" ({others}: put the one with the examples first)" if len(sheets) > 1 else ""
        raise DataError(f"{path}: is empty below the row that names its columns{beside}")
    header, *rest = cells
    names = ["" if cell.value is None else str(cell.value) for cell in header]
    columns = _Columns(names, path)
    notes = [f"{path}: {others}"] if len(sheets) > 1 else []
    notes += [*columns.notes([[cell.value for cell in row] for row in rest]), *_formats(names, rest, path)]
    entries = [_sheet_row(columns, len(names), row, number) for number, row in enumerate(rest, start=1)]
    return Table(entries, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Cell:
    """What a cell of a sheet holds: its value, openpyxl's letter for its kind, and the format of numbers."""

    value: Any
    kind: str
    format: str

    def is_shown_as(self, pattern: str) -> bool:
        """Whether it is a number that is shown in such a format."""
        return self.kind == "n" and self.value is not None and re.search(pattern, self.format) is not None


_MOST_SHEET_ROWS, _MOST_EMPTY_CELLS = 1 << 20, 1 << 24
"""Rows of a sheet, as Excel has them, and empty cells before others, which a file need not hold to have."""


def _filled_rows(sheet: Any, path: Path) -> list[list[_Cell]]:
    """The rows of a sheet that hold something, each up to its last cell that does.

    Raises:
        DataError: It has more rows or empty cells than a sheet of examples can have.
    """
    sheet.reset_dimensions()  # the file's own word for it, whatever is there
    rows, empty = [], 0
    for number, row in enumerate(sheet.iter_rows(), start=1):
        width = max((place for place, cell in enumerate(row, start=1) if not _is_blank(cell.value)), default=0)
        empty += sum(cell.value is None for cell in row)
        if number > _MOST_SHEET_ROWS or empty > _MOST_EMPTY_CELLS:
            raise DataError(
                f"{path}: its first sheet has more than {_MOST_SHEET_ROWS} rows, or cells far to the right of the "
                "others: take these away, or save the sheet as CSV"
            )
        if width:
            rows.append([_Cell(cell.value, cell.data_type, cell.number_format or "") for cell in row[:width]])
    return rows


_FORMATS: Final = (
    (r"%", "shows percent, read as fractions, such as 0.05 for 5 %"),
    (r"\A0{2,}\Z", "shows zeros before its numbers, which are not read; format it as text to keep them"),
)
"""Formats of numbers -> what a column says otherwise than it is read."""


def _formats(names: Sequence[str], rows: Sequence[Sequence[_Cell]], path: Path) -> tuple[str, ...]:
    """Notes on columns whose numbers are shown otherwise than they are read."""
    return tuple(
        f"{path}: column {place + 1} {said}"
        for place in range(len(names))
        for pattern, said in _FORMATS
        if any(cell.is_shown_as(pattern) for row in rows for cell in row[place : place + 1])
    )


def _sheet_row(columns: _Columns, width: int, row: Sequence[_Cell], number: int) -> Row | Fault:
    if any(cell.value is not None for cell in row[width:]):
        return Fault(f"row {number}", "has a cell beyond the columns that the first row names")
    if any(cell.kind == "e" for cell in row):
        return Fault(f"row {number}", "has a cell that shows an error of its formula, such as #N/A")
    return columns.named([cell.value for cell in row[:width]])


def _read_parquet(path: Path, data: bytes, settings: FileSettings) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row | Fault] = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException:
        raise DataError(f"{path}: not a valid Parquet file") from None
    return Table(rows)


def _read_prompts(path: Path, data: bytes, settings: FileSettings) -> Table:
    text = decoded(data, settings.encoding, path)
    return _table(text, [{"prompt": line} for line in re.split(r"\r\n|\n|\r", text.text) if line.strip()])


def _read_text(path: Path, data: bytes, settings: FileSettings) -> Table:
    """Blank lines separate the documents."""
    text = decoded(data, settings.encoding, path)
    whole = re.sub(r"\r\n|\r", "\n", text.text)
    parts = whole.split("\n\n")
    table = _table(text, [{"text": part.strip("\n").rstrip()} for part in parts if part.strip()])
    tabs = {line.count("\t") for line in whole.split("\n") if line.strip()}
    if len(tabs) != 1 or tabs == {0} or whole.strip().count("\n") < 1:
        return table
    said = f"{path}: looks like a table parted by tabs and is read as running text; as a table if its name ends in .tsv"
    return replace(table, notes=(*table.notes, said))


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
