"""Checkpoints of a run: one folder a checkpoint, there whole or not at all, only the newest kept.

``state.json`` holds the SHA-256 of the files with tensors beside it, and in ``sha256`` that of all it says itself: one
hash stands for the whole checkpoint, and nothing of a checkpoint is used before all of it fits that hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError
from silotune.record.files import explained, new_folder, write_bytes
from silotune.record.tensor_files import read_groups, write_groups
from silotune.structs import ServerState, SiteState

_FOLDER = re.compile(r"checkpoint-(\d+)(?:\.(\d+))?")
STATE = "state.json"
SERVER_FILE, SITES_FILE = "server.safetensors", "sites.safetensors"
FILES = (STATE, SERVER_FILE, SITES_FILE)
_SHA256, _FILES = "sha256", "files"
_SERVER_GROUPS = {"weights": "weights", "memory": "memory", "best": "best_weights", "held": "held"}
_SERVER_VALUES = (
    "round_number",
    "best_round",
    "best_metric",
    "seconds",
    "bytes_up",
    "bytes_down",
    "joules",
    "stopped",
    "privacy",
    "excluded",
    "holders",
    "simulated_seconds",
)


def save(
    folder: Path,
    server: ServerState,
    sites: Mapping[str, SiteState],
    *,
    announce: Callable[[str], None] = lambda sha256: None,
) -> Path:
    """Writes a checkpoint, then removes the older ones.

    Args:
        folder: Where the checkpoints of this run live.
        server: The coordinator's state after ``server.round_number`` rounds.
        sites: Each client's state; empty ones are left out.
        announce: Called with the hash of the whole checkpoint once it is on the disk and before it is in its place, so
            that the audit trail vouches for it first and no kill leaves a checkpoint that nothing vouches for.

    Returns:
        The checkpoint's folder, ``checkpoint-<round>``; ``.1``, ``.2`` follow when a round is written again.

    Raises:
        RunFolderError: The disk is full or the folder may not be written; older checkpoints are kept.
    """
    kept = {client: state for client, state in sites.items() if not state.is_empty}
    place = _free_name(folder, server.round_number)
    with new_folder(place) as building:
        groups = {group: getattr(server, name) for group, name in _SERVER_GROUPS.items()}
        state = {
            "server": {name: getattr(server, name) for name in _SERVER_VALUES},
            "server_tensors": write_groups(building / SERVER_FILE, groups),
            "sites": [
                {"client": client, "data": dict(site.data), "groups": list(site.groups())}
                for client, site in kept.items()
            ],
            "site_tensors": write_groups(
                building / SITES_FILE,
                {
                    f"{index}/{name}": tensors
                    for index, site in enumerate(kept.values())
                    for name, tensors in site.groups().items()
                },
            ),
            _FILES: {name: file_sha256(building / name) for name in (SERVER_FILE, SITES_FILE)},
        }
        sha256 = _sha256_of(state)
        write_bytes(building / STATE, json.dumps({_SHA256: sha256, **state}, ensure_ascii=False).encode())
        announce(sha256)
    with explained(folder):
        for _, _, old in _named(folder):
            if old != place:
                shutil.rmtree(old)
    return place


def load(folder: Path) -> tuple[ServerState, dict[str, SiteState]] | None:
    """The states in the newest checkpoint; None when there is none.

    Raises:
        RunFolderError: The checkpoint was changed or damaged; the message names the file. An older one is not taken
            in its place.
    """
    place = newest(folder)
    if place is None:
        return None
    state = _verified(place)
    try:
        return _server(place, state), _sites(place, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{str(place)!r} is not a checkpoint of this version: {error}") from None


def newest(folder: Path) -> Path | None:
    """The folder of the newest checkpoint; None when there is none."""
    with explained(folder):
        found = [named for named in _named(folder) if any(named[2].iterdir())]
    return max(found)[2] if found else None


def sha256_of(place: Path) -> str:
    """The hash that stands for all of a checkpoint, once all of it was found to fit.

    Raises:
        RunFolderError: The checkpoint was changed or damaged; the message names the file.
    """
    return str(_verified(place)[_SHA256])


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(state: Mapping[str, Any]) -> str:
    """Hash of the JSON text. Canonical JSON has no infinities, and what a client keeps may hold one."""
    text = json.dumps({name: value for name, value in state.items() if name != _SHA256}, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _verified(place: Path) -> dict[str, Any]:
    """What ``state.json`` says, once it and the files that it names fit their hashes."""
    with explained(place):
        content = (place / STATE).read_bytes() if (place / STATE).is_file() else b""
        try:
            state = json.loads(content)
            is_as_written = json.dumps(state, ensure_ascii=False).encode() == content
        except (ValueError, RecursionError):
            state, is_as_written = None, False
        if not isinstance(state, dict) or not is_as_written:
            raise _damaged(place / STATE)
        if not isinstance(state.get(_FILES), dict) or not {SERVER_FILE, SITES_FILE} <= state[_FILES].keys():
            raise RunFolderError(f"{str(place)!r} is not a checkpoint of this version, or was damaged")
        if state.get(_SHA256) != _sha256_of(state):
            raise _damaged(place / STATE)
        for name in (SERVER_FILE, SITES_FILE):
            if not (place / name).is_file() or file_sha256(place / name) != state[_FILES][name]:
                raise _damaged(place / name)
    return state


def _damaged(path: Path) -> RunFolderError:
    return RunFolderError(
        f"{str(path)!r} was changed or damaged: put back a copy of {path.parent.name!r} that was made before, or begin "
        "a new run"
    )


def _server(place: Path, state: Mapping[str, Any]) -> ServerState:
    groups = read_groups(place / SERVER_FILE, state["server_tensors"])
    values: dict[str, Any] = {name: state["server"][name] for name in _SERVER_VALUES}
    values["holders"] = tuple(values["holders"])
    values.update({name: groups[group] for group, name in _SERVER_GROUPS.items()})
    return ServerState(**values)


def _sites(place: Path, state: Mapping[str, Any]) -> dict[str, SiteState]:
    groups = read_groups(place / SITES_FILE, state["site_tensors"])
    return {
        entry["client"]: SiteState(**{name: groups[f"{index}/{name}"] for name in entry["groups"]}, data=entry["data"])
        for index, entry in enumerate(state["sites"])
    }


def _named(folder: Path) -> list[tuple[int, int, Path]]:
    """Round, generation and folder of all that is called a checkpoint.

    A kill while an old one is removed leaves a part of it, or an empty folder. The newest was moved to its place whole.
    """
    with explained(folder):
        found = [(_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return [(int(match[1]), int(match[2] or 0), path) for match, path in found if match and path.is_dir()]


def _free_name(folder: Path, round_number: int) -> Path:
    """``checkpoint-<round>``, or its next generation: a checkpoint in place is never written over."""
    generations = [generation for number, generation, _ in _named(folder) if number == round_number]
    ending = f".{max(generations) + 1}" if generations else ""
    return folder / f"checkpoint-{round_number}{ending}"
