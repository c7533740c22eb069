"""Checkpoints of a run: one folder a checkpoint, there whole or not at all, only the newest kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError
from silotune.record.files import explained, new_folder, read_json, write_bytes
from silotune.record.tensor_files import read_groups, write_groups
from silotune.structs import ServerState, SiteState

_FOLDER = re.compile(r"checkpoint-(\d+)(?:\.(\d+))?")
STATE = "state.json"
_FILES = (STATE, "server.safetensors", "sites.safetensors")
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


def save(folder: Path, server: ServerState, sites: Mapping[str, SiteState]) -> Path:
    """Writes a checkpoint, then removes the older ones.

    Args:
        folder: Where the checkpoints of this run live.
        server: The coordinator's state after ``server.round_number`` rounds.
        sites: Each client's state; empty ones are left out.

    Returns:
        The checkpoint's folder, ``checkpoint-<round>``; ``.1``, ``.2`` follow when a round is written again.

    Raises:
        RunFolderError: The disk is full or the folder may not be written; older checkpoints are kept.
    """
    kept = {client: state for client, state in sites.items() if state.tensors or state.data}
    place = _free_name(folder, server.round_number)
    with new_folder(place) as building:
        groups = {group: getattr(server, name) for group, name in _SERVER_GROUPS.items()}
        state = {
            "server": {name: getattr(server, name) for name in _SERVER_VALUES},
            "server_tensors": write_groups(building / "server.safetensors", groups),
            "sites": [{"client": client, "data": dict(site.data)} for client, site in kept.items()],
            "site_tensors": write_groups(
                building / "sites.safetensors",
                {str(index): site.tensors for index, site in enumerate(kept.values())},
            ),
        }
        write_bytes(building / STATE, json.dumps(state, ensure_ascii=False).encode())
    with explained(folder):
        for old in _complete(folder):
            if old != place:
                shutil.rmtree(old)
    return place


def load(folder: Path) -> tuple[ServerState, dict[str, SiteState]] | None:
    """The states in the newest complete checkpoint; None when there is none.

    Raises:
        RunFolderError: The checkpoint was changed or damaged.
    """
    found = _complete(folder)
    if not found:
        return None
    place = found[-1]
    state = read_json(place / STATE)
    try:
        return _server(place, state), _sites(place, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{str(place)!r} is not a checkpoint of this version: {error}") from None


def _server(place: Path, state: Mapping[str, Any]) -> ServerState:
    groups = read_groups(place / "server.safetensors", state["server_tensors"])
    values: dict[str, Any] = {name: state["server"][name] for name in _SERVER_VALUES}
    values["holders"] = tuple(values["holders"])
    values.update({name: groups[group] for group, name in _SERVER_GROUPS.items()})
    return ServerState(**values)


def _sites(place: Path, state: Mapping[str, Any]) -> dict[str, SiteState]:
    groups = read_groups(place / "sites.safetensors", state["site_tensors"])
    return {
        entry["client"]: SiteState(tensors=groups[str(index)], data=entry["data"])
        for index, entry in enumerate(state["sites"])
    }


def _complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    with explained(folder):
        matches = [(_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    found = [
        (int(match[1]), int(match[2] or 0), path)
        for match, path in matches
        if match and all((path / name).is_file() for name in _FILES)
    ]
    return [path for _, _, path in sorted(found)]


def _free_name(folder: Path, round_number: int) -> Path:
    """``checkpoint-<round>``, or its next generation: a checkpoint in place is never written over."""
    taken = [_FOLDER.fullmatch(path.name) for path in folder.glob(f"checkpoint-{round_number}*")]
    generations = [int(match[2] or 0) for match in taken if match and int(match[1]) == round_number]
    ending = f".{max(generations) + 1}" if generations else ""
    return folder / f"checkpoint-{round_number}{ending}"
