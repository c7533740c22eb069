"""Tells from a file's first bytes that it is not of the kind that its name says, and what to do about that."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from silotune.errors import DataError


@dataclass(frozen=True, slots=True)
class _Kind:
    """How files of a kind begin, what they are called, by which suffix they are read, and what to do with others."""

    beginnings: tuple[bytes, ...]
    name: str
    suffix: str
    remedy: str = ""


_ARCHIVES: Final = (
    _Kind((b"PK\x03\x04",), "a zip archive, as an Excel workbook is one", ".xlsx"),
    _Kind((b"\x1f\x8b",), "a file packed by gzip", ".gz"),
    _Kind((b"PAR1",), "a Parquet file", ".parquet"),
    _Kind(
        (b"\xd0\xcf\x11\xe0",),
        "a workbook of an old Excel, or one with a password",
        "",
        "save it as .xlsx or .csv without",
    ),
    _Kind((b"%PDF",), "a PDF document", "", "save its table as .csv or .xlsx"),
)
"""Files that are no text."""
_MARKUP: Final = _Kind(
    (b"<!doctype", b"<html", b"<table", b"<?xml", b"<head", b"<body"),
    "HTML or XML, as some programs name .xls or .csv",
    "",
    "open it in a spreadsheet and save it as .csv or .xlsx",
)
_JSON: Final = (_Kind((b'{"',), "JSON", ".jsonl"), _Kind((b'[{"',), "a list in JSON", ".json"))
_TABLES: Final = (".csv", ".tsv")
_NO_TEXT: Final[Mapping[str, bytes]] = {".xlsx": b"PK", ".parquet": b"PAR1"}
"""Kinds of files that are no text -> how they begin."""


def check_kind(path: Path, data: bytes, suffix: str) -> None:
    """Refuses a file that shows to be of another kind.

    Args:
        path: The file, for errors.
        data: What it holds, unpacked.
        suffix: By which it would be read, without that of packing.

    Raises:
        DataError: It is of another kind; says which, and what to do.
    """
    head = b"".join(data[:200].removeprefix(codecs.BOM_UTF8).lower().split())
    texts = () if suffix == ".txt" else (_MARKUP, *_JSON) if suffix in _TABLES else (_MARKUP,)
    shown = next((kind for kind in _ARCHIVES if data.startswith(kind.beginnings)), None)
    shown = shown or next((kind for kind in texts if head.startswith(kind.beginnings)), None)
    if shown is not None and shown.suffix != suffix:
        remedy = shown.remedy or f"let its name end in {shown.suffix}"
        raise DataError(f"{path}: holds {shown.name}, and no {suffix}: {remedy}")
    if suffix in _NO_TEXT and data and not data.startswith(_NO_TEXT[suffix]) and _is_text(data[:200]):
        raise DataError(f"{path}: holds text, and no {suffix}: let its name end in .csv or .jsonl, whichever it is")


def _is_text(head: bytes) -> bool:
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or not any(
        byte < 32 and byte not in b"\t\r\n\f" for byte in head
    )
