"""What a grid file may say: lists of tasks, models, adapters, algorithms, partitions and seeds over a common base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from silotune.config import read_toml, validated
from silotune.errors import unknown_choice
from silotune.settings.base import Positive, Section
from silotune.settings.places import anchored
from silotune.settings.sections import Mode, PartitionSection

AXES = ("task", "model", "adapter", "algorithm", "partition")
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _named(value: Any) -> Any:
    """A bare name stands for an entry without changes."""
    return {"name": value} if isinstance(value, str) else value


def _several(value: Any) -> Any:
    """A single value stands for a list with this value."""
    return value if isinstance(value, (list, tuple)) else (value,)


class Choice(Section):
    """An entry of one of the grid's lists: its name in tables, and the sections of a run that it changes."""

    name: Annotated[str, Field(min_length=1)] = Field(
        description="in tables; also the value of the key that the list stands for, where config does not set it"
    )
    config: dict[str, Any] = Field({}, description="sections of a run that this entry changes")


class PartitionChoice(PartitionSection):
    """An entry of the list of partitions: a name, and the keys of [data.partition] that it sets."""

    name: Annotated[str, Field(min_length=1)] = Field(description="in tables, such as 'alpha 0.1'")
    config: dict[str, Any] = Field({}, description="sections of a run that this entry changes")


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]
Choices = tuple[Annotated[Choice, BeforeValidator(_named)], ...]


class Condition(Section):
    """Selects the cells that match every given key; a key takes one value or several."""

    task: Names = ()
    model: Names = ()
    adapter: Names = ()
    algorithm: Names = ()
    partition: Names = ()
    seed: Annotated[tuple[Seed, ...], BeforeValidator(_several)] = ()

    def matches(self, names: Mapping[str, str | int]) -> bool:
        """Whether the condition selects a cell with these names."""
        given: dict[str, tuple[str | int, ...]] = {axis: getattr(self, axis) for axis in (*AXES, "seed")}
        return all(names[axis] in allowed for axis, allowed in given.items() if allowed)


class Override(Section):
    """A change of the configuration of some cells."""

    when: Condition = Condition()
    config: dict[str, Any] = Field(description="sections of a run that are changed")


class Tune(Section):
    """How hyper-parameters are chosen: on the validation split alone, once for each task, model and adapter."""

    seed: Seed = Field(description="of the runs that choose; none of the grid's seeds")
    candidates: dict[str, tuple[Any, ...]] = Field(
        description="'section.key' -> values; every combination of them is tried"
    )
    partition: str | None = Field(None, description="name of the partition that is tried on; default: the first")
    rounds: Positive | None = Field(None, description="of the trials; default: as in the grid")


class Grid(Section):
    """A whole grid file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")] = Field(
        description="of the grid, and of its folder"
    )
    title: str = Field("", description="heading of the report")
    modes: tuple[Mode, ...] = Field(
        ("federated", "isolated", "centralized"), description="how each cell trains; baselines once for all algorithms"
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(description="three or more, or nothing is claimed")
    tasks: Annotated[Choices, Field(min_length=1)] = Field(description="names from 'silotune tasks', or your own")
    models: Annotated[Choices, Field(min_length=1)] = (Choice(name="nano"),)
    adapters: Annotated[Choices, Field(min_length=1)] = (Choice(name="lora"),)
    algorithms: Annotated[Choices, Field(min_length=1)] = (Choice(name="fedavg"),)
    partitions: Annotated[tuple[PartitionChoice, ...], Field(min_length=1)] = Field(
        description="how examples are spread over institutions"
    )
    include: tuple[Condition, ...] = Field((), description="if given, only cells that match one of these")
    exclude: tuple[Condition, ...] = Field((), description="cells that match one of these are left out")
    overrides: tuple[Override, ...] = Field((), description="changes of some cells, in order")
    tune: Tune | None = None
    budget_megabytes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="most megabytes (2^20 bytes) that a federated cell may send, both ways; more is reported"
    )
    base: dict[str, Any] = Field({}, description="sections of a run that all cells share")

    @model_validator(mode="after")
    def _parts_fit(self) -> Grid:
        names = {axis: [choice.name for choice in self.choices(axis)] for axis in AXES}
        faults = [
            f"{axis}s: {name!r} is listed twice"
            for axis, given in names.items()
            for name in sorted({name for name in given if given.count(name) > 1})
        ]
        if len(set(self.seeds)) != len(self.seeds):
            faults.append("seeds: one seed is listed twice")
        if not self.modes or len(set(self.modes)) != len(self.modes):
            faults.append("modes must name at least one mode, each once")
        conditions = [*self.include, *self.exclude, *(override.when for override in self.overrides)]
        faults += self._unknown(conditions, names)
        faults += [
            f"algorithms: {choice.name!r} sets federation.budget_match, which the baselines of all algorithms depend "
            "on: set it in [base.federation], or in the config of a partition of its own"
            for choice in self.algorithms
            if "budget_match" in choice.config.get("federation", {})
        ]
        faults += self._tuning_faults(names["partition"])
        if faults:
            raise ValueError("\n".join(dict.fromkeys(faults)))
        return self

    def _unknown(self, conditions: list[Condition], names: Mapping[str, list[str]]) -> list[str]:
        """Faults for names in conditions that are in no list, because such a condition would silently match nothing."""
        faults = [
            unknown_choice(axis, name, names[axis])
            for condition in conditions
            for axis in AXES
            for name in getattr(condition, axis)
            if name not in names[axis]
        ]
        strangers = [seed for condition in conditions for seed in condition.seed if seed not in self.seeds]
        return faults + [f"seed {seed} of a condition is not among seeds" for seed in strangers]

    def _tuning_faults(self, partitions: list[str]) -> list[str]:
        tune = self.tune
        if tune is None:
            return []
        faults = []
        if tune.seed in self.seeds:
            faults.append(
                f"tune.seed = {tune.seed} is among seeds: what is chosen on a seed must not be reported on it"
            )
        if not tune.candidates or not all(tune.candidates.values()):
            faults.append("tune.candidates needs at least one key with at least one value")
        if tune.partition is not None and tune.partition not in partitions:
            faults.append(f"tune.partition: {unknown_choice('partition', tune.partition, partitions)}")
        return faults

    def choices(self, axis: str) -> tuple[Choice | PartitionChoice, ...]:
        """The entries of a list, by the name of one entry: ``task``, ``model``, ..."""
        found: tuple[Choice | PartitionChoice, ...] = getattr(self, f"{axis}s")
        return found


def load_grid(path: str | Path) -> Grid:
    """Reads a grid file.

    Raises:
        ConfigError: The file is missing or broken, or holds faults (all of them are listed).
    """
    return validated(Grid, _anchored(read_toml(path), Path(path).absolute().parent), source=str(path))


def _anchored(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The document of a grid in which every relative place of its runs begins at a folder."""
    made = dict(document)
    if isinstance(base := made.get("base"), Mapping):
        made["base"] = anchored(base, folder)
    for name in (*(f"{axis}s" for axis in AXES), "overrides"):
        if isinstance(entries := made.get(name), list):
            made[name] = [_entry(entry, folder) if isinstance(entry, Mapping) else entry for entry in entries]
    return made


def _entry(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An entry of one of the grid's lists: what it changes, and the files that a partition of it names."""
    own = anchored({"data": {"partition": entry}}, folder)["data"]["partition"]
    changes = entry.get("config")
    return {**own, "config": anchored(changes, folder)} if isinstance(changes, Mapping) else dict(own)
