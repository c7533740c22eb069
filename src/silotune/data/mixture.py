"""Loads the examples of a run: of one task, or of several in the shares that ``[data.mixture]`` asks for."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from silotune.data.load import Dataset, load, load_scored
from silotune.data.rows import Task
from silotune.data.tasks import resolve
from silotune.errors import DataError
from silotune.seeds import derive
from silotune.settings.sections import DataSection
from silotune.structs import Example


def load_examples(section: DataSection, *, seed: int) -> Dataset:
    """All examples of a run; those of a mixture carry their task's name as the field ``task``.

    Args:
        section: ``[data]`` of the configuration; of a mixture, ``num_train`` and so on are those of all its tasks.
        seed: The run's seed.

    Raises:
        ConfigError: A task or its source does not hold together.
        DataError: A file is missing or broken, or a task has too few examples for its share.
    """
    if section.task != "mixture":
        return load(section, seed=seed)
    whole = resolve(section)
    parts = {name: load(_alone(section, name), seed=seed) for name in section.mixture}
    wanted = {"train": section.num_train, "validation": section.num_validation, "test": section.num_test}
    splits = {split: _mixed(parts, section, split, most, seed) for split, most in wanted.items()}
    notes = [f"{name}: {note}" for name, part in parts.items() for note in part.notes]
    counts = {name: sum(example.fields["task"] == name for example in splits["train"]) for name in parts}
    notes.append("mixture: " + ", ".join(f"{count} training examples of {name}" for name, count in counts.items()))
    return Dataset(whole, splits, None, tuple(notes), tuple(part.task for part in parts.values()))


def load_scored_examples(section: DataSection, *, seed: int) -> Dataset:
    """The examples that a coordinator scores on when the training examples are elsewhere: ``train`` is empty.

    Raises:
        ConfigError: A task or its source does not hold together.
        DataError: A file is missing or broken; of a mixture, a task is neither generated nor below ``data.root``.
    """
    if section.task != "mixture":
        return load_scored(section, seed=seed)
    whole = load_examples(section, seed=seed)
    return replace(whole, splits={**whole.splits, "train": ()})


def tasks_of(section: DataSection) -> dict[str, Task]:
    """Name -> task, of the one that a run is for or of those that it mixes.

    Raises:
        ConfigError: A task does not hold together.
    """
    names = section.mixture if section.task == "mixture" else (section.task,)
    found = [resolve(_alone(section, name) if section.task == "mixture" else section) for name in names]
    return {task.name: task for task in found}


def _alone(section: DataSection, name: str) -> DataSection:
    """The section for one of the tasks alone; an embedded task ignores a root that has nothing for it."""
    changes: dict[str, object] = {"task": name, "mixture": {}}
    changes.update(num_train=None, num_validation=None, num_test=None)
    task = resolve(section.model_copy(update=changes))
    if task.embedded and section.root is not None and not (section.root / task.folder).is_dir():
        changes["root"] = None
    return section.model_copy(update=changes)


def _mixed(
    parts: Mapping[str, Dataset], section: DataSection, split: str, most: int | None, seed: int
) -> tuple[Example, ...]:
    """Examples of all tasks in their shares, as many as ``most`` or as the scarcest task allows, drawn by seed."""
    total = sum(section.mixture.values())
    shares = {name: weight / total for name, weight in section.mixture.items()}
    possible = min(int(len(parts[name].splits[split]) / share) for name, share in shares.items())
    size = possible if most is None else min(most, possible)
    chosen: list[Example] = []
    for name, share in shares.items():
        examples, count = parts[name].splits[split], round(share * size)
        if count == 0:
            raise DataError(
                f"data.mixture: task {name!r} with a share of {share:.0%} gets none of {size} {split} examples; "
                "give it more or ask for more examples"
            )
        drawn = random.Random(derive(seed, f"mixture-{split}-{name}")).sample(range(len(examples)), count)  # noqa: S311
        chosen += [replace(examples[place], fields={**examples[place].fields, "task": name}) for place in sorted(drawn)]
    return tuple(chosen)
