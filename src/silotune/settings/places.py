"""Which settings name a file or a folder that is read, and where a relative one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final


def _always(name: str, folder: Path) -> bool:
    return True


def _has_ending(name: str, folder: Path) -> bool:
    """Whether it is a file, and no word such as ``test``."""
    return bool(Path(name).suffix)


def _stands_there(name: str, folder: Path) -> bool:
    """Whether it is a folder, and no name on the Hub."""
    return name.startswith((".", "/")) or (name != "nano" and (folder / name).is_dir())


PLACES: Final[Mapping[str, Callable[[str, Path], bool]]] = {
    "model.name": _stands_there,
    "adapter.start": _always,
    "data.root": _always,
    "data.train": _always,
    "data.validation": _always,
    "data.test": _always,
    "data.partition.files": _always,
    "federation.policies": _always,
    "federation.clock.trace": _always,
    "privacy.dp.ledger": _always,
    "evaluation.gold": _has_ending,
    "evaluation.selection": _has_ending,
    "evaluation.forgetting": _has_ending,
    "record.audit_key": _always,
}
"""Dotted key -> whether a value of it names a place. ``record.folder`` is none: results are made where one works."""


def anchored(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A document of a run in which every relative place begins at a folder; ~ and absolute ones stay as they are."""
    whole = dict(document)
    for key, names_place in PLACES.items():
        whole = _at(whole, key.split("."), partial(_anchored, folder=folder, names_place=names_place))
    return whole


def _at(document: Mapping[str, Any], keys: list[str], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The document with one value changed, where it has it."""
    first, *rest = keys
    inner = document.get(first)
    if inner is None or (rest and not isinstance(inner, Mapping)):
        return dict(document)
    return {**document, first: _at(inner, rest, change) if rest else change(inner)}


def _anchored(value: Any, folder: Path, names_place: Callable[[str, Path], bool]) -> Any:
    if isinstance(value, Mapping):
        return {name: _anchored(each, folder, names_place) for name, each in value.items()}
    value = str(value) if isinstance(value, Path) else value
    if not isinstance(value, str) or not value or value.startswith("~") or not names_place(value, folder):
        return value
    place = folder / value
    return str(place.resolve() if ".." in place.parts else place)
