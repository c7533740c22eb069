"""Bytes of a file as text: UTF-8, UTF-16 and Windows-1252 are found by themselves; never a wrong guess in silence."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from silotune.errors import DataError


@dataclass(frozen=True, slots=True)
class Decoded:
    """A file's text, the encoding that it was read with, and what a reader of results should know of that."""

    text: str
    encoding: str
    notes: tuple[str, ...] = ()


_MARKS: Final = (  # the longer ones first: UTF-32's begins as UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks -> what they say."""
_WESTERN: Final = "cp1252"
_REMEDY: Final = "save it as UTF-8, or name its encoding in data.encoding, such as 'cp1250' or 'shift_jis'"


def decoded(data: bytes, encoding: str | None, path: Path) -> Decoded:
    """The text of a file, without a byte order mark.

    Args:
        data: The file's bytes.
        encoding: As in ``data.encoding``; None to find it.
        path: The file, for errors and notes.

    Raises:
        DataError: The bytes are not of that encoding, or it cannot be found.
    """
    found = encoding or _shown(data)
    try:
        return Decoded(data.decode(found).removeprefix("\ufeff"), found)
    except UnicodeDecodeError:
        if encoding is not None or found != "utf-8":
            raise DataError(f"{path}: not {found} text: {_REMEDY}") from None
    return _western(data, path)


def _shown(data: bytes) -> str:
    """The encoding that the bytes show: by their mark, by zeros in every second place, else UTF-8."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    head = data[: 1 << 12]
    for place, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(head) > 1 and head[place::2].count(0) * 2 > len(head[place::2]) and not head[1 - place :: 2].count(0):
            return name
    return "utf-8"


def _western(data: bytes, path: Path) -> Decoded:
    """Text as older programs of Windows write it in Western Europe, where the bytes look like that."""
    letters = [char for char in data.decode("utf-8", "replace") if not char.isascii()]
    if letters.count("\ufffd") * 2 <= len(letters):
        raise DataError(f"{path}: not UTF-8 text in some places, and UTF-8 in others: save it anew as UTF-8")
    try:
        text = data.decode(_WESTERN)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text: {_REMEDY}") from None
    if _looks_foreign(text):
        raise DataError(f"{path}: not UTF-8 text, and not Western European: {_REMEDY}")
    return Decoded(text, _WESTERN, (f"{path}: not UTF-8, read as {_WESTERN}; data.encoding names another encoding",))


def _looks_foreign(text: str) -> bool:
    """Whether most letters beyond ASCII stand in rows of three or more, as those of no Western European word do."""
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return True
    rows = re.findall(r"[^\x00-\x7f]+", text)
    return sum(len(row) for row in rows if len(row) > 2) * 2 > sum(map(len, rows))
