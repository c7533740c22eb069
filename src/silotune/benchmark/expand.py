"""Expands a grid into cells, each with the whole configuration of its run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path, PurePath
from typing import Any

from silotune.benchmark.schema import AXES, Choice, Grid, PartitionChoice
from silotune.config import Config, faulty, from_mapping, merge, overlaid
from silotune.errors import ConfigError
from silotune.record.grids import Cell, cell_folder, config_digest, portable_digest
from silotune.settings.registry import TYPE

Key = tuple[str, str, str]
"""Task, model and adapter, for which hyper-parameters are chosen together."""
Setting = Mapping[str, Any]
"""``section.key`` -> value: one combination of candidates."""
_STANDS_FOR = {
    "task": ("data", "task"),
    "model": ("model", "name"),
    "adapter": ("adapter", TYPE),
    "algorithm": ("federation", "algorithm", TYPE),
}
_BASELINES = ("isolated", "centralized")


def _key(names: Mapping[str, Any]) -> Key:
    return (str(names["task"]), str(names["model"]), str(names["adapter"]))


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell and the configuration of its run."""

    cell: Cell
    config: Config

    @property
    def key(self) -> Key:
        """The task, model and adapter that the cell's hyper-parameters are chosen for."""
        return _key(asdict(self.cell))


@dataclass(frozen=True, slots=True)
class Trial:
    """A run that tries one combination of candidates on the validation split."""

    planned: Planned
    setting: Setting


@dataclass(frozen=True, slots=True)
class Changes:
    """What the command line changes in every cell: ``--data-root``, ``--set`` and ``--models-root``.

    Of a folder of models, a base named ``org/name`` or ``name`` is the folder ``name``.
    """

    data_root: Path | None = None
    settings: Sequence[str] = ()
    models_root: Path | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that ``--set`` names."""
        return tuple(setting.partition("=")[0].strip() for setting in self.settings)


def expand(grid: Grid, changes: Changes, chosen: Mapping[Key, Setting] | None = None) -> list[Planned]:
    """The cells of a grid, in an order that keeps cells of one model and adapter together.

    The baselines do not depend on the algorithm: of the cells that differ only in it, the first trains all modes, and
        the others only the federated mode.

    Args:
        grid: The grid.
        changes: What the command line adds.
        chosen: Hyper-parameters by task, model and adapter, where they were chosen.

    Raises:
        ConfigError: A cell's configuration holds faults (those of all cells are listed), or no cell is left.
    """
    planned: list[Planned] = []
    faults: dict[str, None] = dict.fromkeys(_misleading(grid, changes))
    has_baselines: set[tuple[str | int, ...]] = set()
    for names in _names(grid):
        twin = tuple(value for axis, value in names.items() if axis != "algorithm")
        modes = grid.modes if twin not in has_baselines else tuple(m for m in grid.modes if m not in _BASELINES)
        if not modes:
            continue
        has_baselines.add(twin)
        try:
            planned.append(_planned(grid, names, modes, changes, (chosen or {}).get(_key(names), {})))
        except ConfigError as error:
            faults.update(dict.fromkeys(error.faults or [str(error)]))
    if faults:
        raise faulty(list(faults), source=f"grid {grid.name!r}")
    if not planned:
        raise ConfigError(f"grid {grid.name!r}: include and exclude leave no cell")
    return planned


def trials(grid: Grid, changes: Changes) -> list[Trial]:
    """The runs that choose hyper-parameters. They are scored on the selection set, never on the gold-standard set."""
    tune = grid.tune
    if tune is None:
        return []
    partition = tune.partition or grid.partitions[0].name
    first: dict[Key, dict[str, str | int]] = {}
    for names in _names(grid):
        first.setdefault(_key(names), {**names, "partition": partition, "seed": tune.seed})
    combinations = [
        dict(zip(tune.candidates, values, strict=True)) for values in itertools.product(*tune.candidates.values())
    ]
    return [
        Trial(_planned(grid, names, grid.modes, changes, setting, is_trial=True), setting)
        for names in first.values()
        for setting in combinations
    ]


def _misleading(grid: Grid, changes: Changes) -> list[str]:
    """Changes of the command line that would make cells differ from their names in the report, one line each."""
    faults = []
    for key in changes.keys:
        if key in ("seed", "federation.modes"):
            faults.append(f"--set {key}: a grid has a list of its own for it: change 'seeds' or 'modes' in the file")
        if grid.tune is not None and key in grid.tune.candidates:
            faults.append(f"--set {key}: the grid chooses it among tune.candidates: change them in the file")
        axis = next((axis for axis, stands in _STANDS_FOR.items() if _is_name(key, stands)), None)
        if axis is None and any(key == f"data.partition.{name}" for name in _set_by(grid.partitions)):
            axis = "partition"
        if axis is not None and len(grid.choices(axis)) > 1:
            faults.append(
                f"--set {key}: it would make all {len(grid.choices(axis))} {axis}s of the grid the same: leave it out"
            )
    return faults


def _set_by(partitions: Sequence[PartitionChoice]) -> set[str]:
    """Settings that tell partitions apart."""
    return {name for partition in partitions for name in partition.model_fields_set} - {"name", "config"}


def _replaced(config: Config, changes: Changes) -> dict[str, str]:
    """Axis -> the value that the command line put in place of the axis's only entry."""
    return {
        axis: str(reduce(getattr, stands, config))
        for axis, stands in _STANDS_FOR.items()
        if any(_is_name(key, stands) for key in changes.keys)
    }


def _is_name(key: str, stands: Sequence[str]) -> bool:
    """Whether a key of ``--set`` is the one that an axis sets: a choice's type, or the choice itself."""
    return key.split(".") in (list(stands), [part for part in stands if part != TYPE])


def _names(grid: Grid) -> Iterator[dict[str, str | int]]:
    """The names of every cell that include and exclude leave; cells with one model and adapter come together."""
    axes = ("model", "adapter", "task", "partition")
    for chosen in itertools.product(*(grid.choices(axis) for axis in axes), grid.seeds, grid.algorithms):
        *entries, seed, algorithm = chosen
        found = {axis: entry.name for axis, entry in zip(axes, entries, strict=True)}  # type: ignore[union-attr]
        names: dict[str, str | int] = {**found, "algorithm": algorithm.name, "seed": seed}  # type: ignore
        is_in = not grid.include or any(condition.matches(names) for condition in grid.include)
        if is_in and not any(condition.matches(names) for condition in grid.exclude):
            yield names


def _planned(
    grid: Grid,
    names: Mapping[str, str | int],
    modes: Sequence[str],
    changes: Changes,
    setting: Setting,
    *,
    is_trial: bool = False,
) -> Planned:
    document = _document(grid, names, modes, changes, setting)
    if is_trial:
        document = _for_trial(grid, document)
    config = from_mapping(document, source=f"cell {', '.join(str(value) for value in names.values())}")
    resolved = config.model_dump(mode="json")
    digest = config_digest(resolved)
    axes = {axis: str(names[axis]) for axis in AXES} | _replaced(config, changes)
    seed = int(names["seed"])
    folder = cell_folder("tuning" if is_trial else "cells", (*axes.values(), f"seed{seed}"), digest)
    cell = Cell(**axes, seed=seed, modes=tuple(modes), folder=folder, digest=digest, portable=portable_digest(resolved))
    return Planned(cell, config)


def _document(
    grid: Grid, names: Mapping[str, str | int], modes: Sequence[str], changes: Changes, setting: Setting
) -> dict[str, Any]:
    """The cell's configuration: the base, each list's entry, overrides, chosen values, then the command line."""
    parts = [_part(axis, _entry(grid, axis, str(names[axis]))) for axis in AXES]
    parts += [override.config for override in grid.overrides if override.when.matches(names)]
    document = merge(overlaid(grid.base, *parts), [_assignment(key, value) for key, value in setting.items()])
    document = merge(document, changes.settings)
    if changes.data_root is not None:
        document = overlaid(document, {"data": {"root": str(changes.data_root)}})
    if changes.models_root is not None:
        folder = changes.models_root / PurePath(document["model"]["name"]).name
        document = overlaid(document, {"model": {"name": str(folder)}})
    return overlaid(document, {"seed": names["seed"], "federation": {"modes": list(modes)}})


def _part(axis: str, entry: Choice | PartitionChoice) -> dict[str, Any]:
    """The sections that an entry of a list sets: the key that the list stands for, and the entry's own ``config``."""
    if isinstance(entry, PartitionChoice):
        given = entry.model_dump(exclude_unset=True, exclude={"name", "config"}, mode="json")
        return overlaid({"data": {"partition": given}}, entry.config)
    stood: dict[str, Any] = reduce(lambda inner, key: {key: inner}, reversed(_STANDS_FOR[axis]), entry.name)  # type: ignore
    return overlaid(stood, entry.config)


def _entry(grid: Grid, axis: str, name: str) -> Choice | PartitionChoice:
    return next(choice for choice in grid.choices(axis) if choice.name == name)


def _assignment(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def _for_trial(grid: Grid, document: dict[str, Any]) -> dict[str, Any]:
    """The same run, scored on its selection set instead of the gold-standard set.

    Raises:
        ConfigError: The two are the same, or the selection set is the test split.
    """
    assert grid.tune is not None
    evaluation = document.get("evaluation", {})
    selection = evaluation.get("selection", "validation")
    if selection in ("test", evaluation.get("gold", "test")):
        raise ConfigError(
            f"evaluation.selection = {selection!r}: settings are not chosen on the set that is reported: give another"
        )
    changes: dict[str, Any] = {"evaluation": {"gold": selection}}
    if grid.tune.rounds is not None:
        changes["federation"] = {"rounds": grid.tune.rounds}
    return overlaid(document, changes)
