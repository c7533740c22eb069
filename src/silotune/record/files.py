"""Files that are written whole or not at all: replaced atomically, flushed to the disk, errors in one line.

A file is first written beside its place under a name that ends in ``.tmp``, flushed, then renamed. A process
that dies at any moment leaves the old file or the new one, and at worst a ``.tmp`` that nobody reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from silotune.errors import RunFolderError, SilotuneError
from silotune.structs import JSON

TEMPORARY = ".tmp"
MOST_DEPTH = 64
"""Objects and lists within one another in a JSON file; what is written here has ten at most."""
_TOO_DEEP = f"is not a JSON file of ours: it nests more than {MOST_DEPTH} lists and objects"
_BLOCK_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` in the block into a ``RunFolderError`` of one line about ``path``."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(_explain(error, path)) from None


def _explain(error: OSError, path: Path) -> str:
    if error.errno in _FULL:
        folder = next(parent for parent in path.parents if not parent.name.endswith(TEMPORARY))
        return (
            f"no space left in {str(folder)!r}: free some, then repeat the command; what has begun as a run "
            "goes on with 'silotune resume'"
        )
    if error.errno in _FORBIDDEN:
        return f"no permission for {str(path)!r}: change its rights, or choose another with --set record.folder=..."
    return f"cannot use {str(path)!r}: {error.strerror or error}"


def plain(value: Any) -> JSON:
    """The value as strict JSON: paths as text, tuples as lists, NaN and infinities as null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    return plain(_simpler(value))


def _simpler(value: Any) -> Any:
    """One step towards JSON for a path, a dataclass, or values of numpy or torch."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON, newline included."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A free name in the same folder that readers ignore."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path``, whole, when the block ends without an error.

    Raises:
        RunFolderError: The disk is full, or the folder may not be written; nothing is left behind.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears as ``path``, whole, when the block ends without an error.

    An existing ``path`` is kept and its files are replaced one by one, so that it is never missing.

    Raises:
        RunFolderError: The disk is full, or the folder may not be written; nothing is left behind.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
            if path.exists():
                for file in sorted(temporary.iterdir()):
                    file.replace(path / file.name)
                sync_folder(path)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file by this content."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file by this value as indented JSON; NaN and infinities become null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        RunFolderError: The file is missing, unreadable or broken.
    """
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        raise RunFolderError(f"{str(path.parent)!r} holds no {path.name}: the run did not get that far") from None
    except OSError as error:
        raise RunFolderError(_explain(error, path)) from None
    except ValueError as error:
        raise RunFolderError(f"{str(path)!r} {error}: the file was changed or damaged") from None


def read_document(path: Path, fault: Callable[[str], SilotuneError]) -> Any:
    """The value in a JSON file that no run wrote, such as one that a person gives.

    Args:
        path: The file.
        fault: Makes the error from its line, for a file that is missing, unreadable or broken.
    """
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        raise fault(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise fault(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise fault(f"{str(path)!r} {error}") from None


def _parsed(content: bytes) -> Any:
    """The value in the text, nested no deeper than later readers can follow; ``ValueError`` names the fault."""
    try:
        document = json.loads(content)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError:
        raise ValueError("is not valid JSON") from None
    waiting: list[tuple[Any, int]] = [(document, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (dict, list)):
            if depth > MOST_DEPTH:
                raise ValueError(_TOO_DEEP)
            waiting.extend((inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))
    return document


def append_line(path: Path, line: bytes) -> None:
    """Adds one line, or several, to a file and flushes it to the disk, all or nothing.

    A torn last line is cut first, and the log says so.

    Raises:
        RunFolderError: The disk is full or the file may not be written; the lines that were there are as before.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with _opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as descriptor:
            end, torn = _last_torn(descriptor)
            if torn:
                _cut(descriptor, end)
                logging.getLogger("silotune").warning("%s", _cut_note(path, torn))
            try:
                _write(descriptor, line)
                os.fsync(descriptor)
                if is_new:
                    sync_folder(path.parent)
            except BaseException:  # Ctrl-C too: a caller who is not told that a line was added must not find one
                os.ftruncate(descriptor, end)
                raise


def mend(path: Path) -> str:
    """Cuts a torn last line, as a power cut leaves one; only whoever holds the file's lock may do so.

    Nobody was told that such a line is there: ``append_line`` returns when it is on the disk.

    Returns:
        What was cut, in one line for people; empty where nothing was.

    Raises:
        RunFolderError: The file may not be written.
    """
    with explained(path):
        if not path.exists():
            return ""
        with _opened(path, os.O_RDWR) as descriptor:
            end, torn = _last_torn(descriptor)
            if torn:
                _cut(descriptor, end)
    return _cut_note(path, torn) if torn else ""


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor without a buffer: what a buffer still holds after an error is written when it is closed."""
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    """Writes all of it: a disk that is nearly full takes a part, and gives its error at the next call."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _last_torn(descriptor: int) -> tuple[int, int]:
    """The offset behind the last whole line, and how many torn bytes follow there."""
    size = os.fstat(descriptor).st_size
    start, tail = size, b""
    while start and b"\n" not in tail[:-1]:
        step = min(start, max(len(tail), _BLOCK_BYTES))
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    last = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    return (size, 0) if not last or _is_whole(last) else (size - len(last), len(last))


def _is_whole(line: bytes) -> bool:
    """Whether a line is a JSON object and has its end; blocks that a power cut left unwritten hold zeros."""
    return line.endswith(b"\n") and _row(line) is not None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _cut(descriptor: int, end: int) -> None:
    os.ftruncate(descriptor, end)
    os.fsync(descriptor)


def _cut_note(path: Path, torn: int) -> str:
    return (
        f"the last line of {str(path)!r} was torn when a process or the machine stopped: its {torn} bytes were cut; "
        "no later step relied on it"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none when it is missing; a torn last line is left out.

    Raises:
        RunFolderError: Another line is not a JSON object; it is named by its number.
    """
    with explained(path):
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if not lines.pop() and lines and _row(lines[-1]) is None:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            raise RunFolderError(f"{str(path)!r} line {number} is not a JSON object: the file was changed or damaged")
        rows.append(row)
    return rows


def remove_temporary(folder: Path) -> None:
    """Removes what processes that died left half-written below a folder; call it only while nobody else writes."""
    with explained(folder):
        for path in sorted(folder.rglob(f".*{TEMPORARY}")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
