"""Reads rows from JSONL, JSON, CSV, Parquet and text files; names what is broken by file and line, not by content."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from silotune.errors import DataError
from silotune.structs import Row


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, by its suffix (``SUFFIXES``).

    Raises:
        DataError: The file is missing, empty, unreadable, of an unknown kind, or broken at some line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"no file {str(path)!r}", beside=f"{path.parent} holds {listing(path.parent)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or type(error).__name__}") from None
    if not rows:
        raise DataError(f"{path}: is empty")
    return rows


def listing(folder: Path, *, most: int = 12) -> str:
    """What a folder holds, in a few words."""
    if not folder.is_dir():
        return "nothing (it does not exist)"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    shown = ", ".join(names[:most]) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_object(_parse(line, f"{path}: line {number}"), f"{path}: line {number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    document = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(document, list):
        raise DataError(f"{path}: holds no list of rows; if each line is a row, name the file .jsonl")
    return [_object(row, f"{path}: row {number}") for number, row in enumerate(document, start=1)]


def _parse(text: str, spot: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{spot}: not valid JSON ({at}column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{spot}: JSON that nests too deep or holds too long a number ({type(error).__name__})"
        ) from None


def _object(value: Any, spot: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{spot}: is not a JSON object with named fields")
    return value


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path}: two columns have the same name")
            rows = []
            for number, cells in enumerate((cells for cells in reader if cells), start=1):
                if len(cells) != len(header):
                    raise DataError(f"{path}: row {number} has {len(cells)} cells, the header has {len(header)}")
                rows.append(dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from None
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException:
        raise DataError(f"{path}: not a valid Parquet file") from None
    return rows


def _read_text(path: Path) -> list[Row]:
    """Blank lines separate the documents."""
    parts = path.read_text(encoding="utf-8-sig").split("\n\n")
    return [{"text": part.strip()} for part in parts if part.strip()]


_READERS: Final[Mapping[str, Callable[[Path], list[Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
SUFFIXES: Final = tuple(_READERS)
