"""The manifest of a run folder: every file in it with its size and SHA-256, which the end of its audit trail signs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.errors import AuditError
from silotune.record.audit import COUNTERSIGNED, KEY_FILE
from silotune.record.checkpoints import file_sha256
from silotune.record.files import TEMPORARY, explained, read_json, write_json

MANIFEST = "manifest.json"
_LOCK = ".lock"
_HELD, _LONGEST_LOCK = re.compile(rb"(\d{1,20} on [\w.-]+\n)?"), 300
_MOST_NAMED = 8
"""The most files that one error names; it always says how many there are."""


@dataclass(frozen=True)
class Coverage:
    """What a manifest vouches for.

    Attributes:
        covered: Files, by their place in the run folder, that are to the byte what they were when it was written.
        uncovered: All else in the run folder, of which it says nothing: pictures that were drawn later, links, pipes.
    """

    covered: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()


def write_manifest(root: Path, *, trail: str) -> tuple[str, int]:
    """Writes ``manifest.json`` over all files of a run folder.

    Args:
        root: The run folder; nobody else may write to it.
        trail: Place in it of the trail that is to hold the manifest's hash.

    Returns:
        SHA-256 of the manifest, and how many files it lists.

    Raises:
        RunFolderError: A file cannot be read, or the disk is full.
    """
    with explained(root):
        files = {name: _facts(path) for name, path in sorted(_files(root, trail).items())}
    write_json(root / MANIFEST, {"files": files})
    with explained(root / MANIFEST):
        return file_sha256(root / MANIFEST), len(files)


def check_manifest(root: Path, sha256: str, *, trail: str) -> Coverage:
    """Compares a run folder with its manifest.

    Args:
        root: The run folder.
        sha256: Of the manifest, as the trail says.
        trail: The trail's place in the folder.

    Raises:
        AuditError: The manifest is missing or another one, or files are missing or were changed; they are named.
    """
    place = root / MANIFEST
    with explained(root):
        if not _is_file(place):
            raise AuditError(f"{MANIFEST} is missing: nothing says what the files of this run were")
        if file_sha256(place) != sha256:
            raise AuditError(f"{MANIFEST} is not the one that the trail was closed over: it was changed")
        listed, there = _listed(place), _files(root, trail)
        beside = _walked(root, _is_told).keys() - {MANIFEST, trail, _countersigned(trail)}
        missing = sorted(listed.keys() - there.keys())
        changed = sorted(name for name in listed.keys() & there.keys() if _is_other(there[name], listed[name]))
    faults = [f"{which} {_named(names)}" for which, names in (("changed:", changed), ("missing:", missing)) if names]
    if faults:
        count = len(missing) + len(changed)
        raise AuditError(
            f"{count} file{' is' if count == 1 else 's are'} not what the trail was closed over; {'; '.join(faults)}"
        )
    if _is_own_lock(root / _LOCK):
        beside -= {_LOCK}
    return Coverage(tuple(sorted(listed)), tuple(sorted(beside - listed.keys())))


def _files(root: Path, trail: str) -> dict[str, Path]:
    """The files that a manifest covers, by name; what is written or removed after it is left out."""
    out = {MANIFEST, _LOCK, trail, _countersigned(trail), (Path(trail).parent / KEY_FILE).as_posix()}
    found = _walked(root, _is_file)
    return {name: path for name, path in found.items() if name not in out and not name.endswith(TEMPORARY)}


def _countersigned(trail: str) -> str:
    """Place of the sites' signatures under a trail, which verify themselves."""
    return (Path(trail).parent / COUNTERSIGNED).as_posix()


def _walked(root: Path, is_meant: Callable[[Path], bool]) -> dict[str, Path]:
    """Place in the folder -> path, for each path that is meant; links are not followed, and broken UTF-8 is escaped."""
    found = {}
    for folder, folders, names in os.walk(root, onerror=_fail):
        for path in (Path(folder) / name for name in (*folders, *names)):
            if is_meant(path):
                name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
                found[name] = path
    return found


def _fail(error: OSError) -> None:
    """Raises the error of a folder that cannot be read, because its files would otherwise be passed over."""
    raise error


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_told(path: Path) -> bool:
    """Whether a path has to be listed: every one but a real folder, whose own files are listed instead."""
    return path.is_symlink() or not path.is_dir()


def _is_own_lock(path: Path) -> bool:
    """Whether it is the lock file of the folder's writer and holds nothing but the writer's process and machine."""
    return _is_file(path) and path.stat().st_size < _LONGEST_LOCK and bool(_HELD.fullmatch(path.read_bytes()))


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _is_other(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file is not the listed one; its size first, which costs nothing."""
    return path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]


def _listed(place: Path) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists; nothing in it is trusted, since its author could have signed anything.

    Raises:
        AuditError: It is not a manifest.
    """
    read = read_json(place)
    files = read.get("files") if isinstance(read, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)
        for facts in files.values()
    ):
        raise AuditError(f"{MANIFEST} is not a manifest: it does not list files with their bytes and sha256")
    return files


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(ascii, names[:_MOST_NAMED])) + more
