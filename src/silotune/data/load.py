"""Loads examples as train, validation and test splits, from local files, the Hub or the embedded generator."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from silotune.data.embedded import finance, medicine, notes
from silotune.data.files import SUFFIXES, Fault, Table, listing, read_rows, read_table
from silotune.data.rows import SPLITS, Task, folded, to_example, unit_of
from silotune.data.tasks import resolve
from silotune.errors import ConfigError, DataError
from silotune.seeds import derive
from silotune.settings.sections import DataSection, FileSettings
from silotune.structs import Example, Row

__all__ = ["Dataset", "load", "load_scored", "read_examples", "read_noted", "read_rows", "read_whole"]

CARVED: Final[Mapping[str, float]] = {"test": 0.2, "validation": 0.1}
"""Share of the training examples that is set aside as a split when the data have no such split."""
EMBEDDED_SIZES: Final[Mapping[str, int]] = {"train": 1600, "validation": 300, "test": 600}


@dataclass(frozen=True)
class Dataset:
    """A task's examples.

    Attributes:
        task: What they are examples of.
        splits: ``train``, ``validation`` and ``test``.
        clients: Client -> indices into ``train``, if each client gave its own file; else None.
        notes: What a reader of results should know: where each split came from, what was carved or left out.
        tasks: Of a mixture, those that it is made of.
    """

    task: Task
    splits: Mapping[str, tuple[Example, ...]]
    clients: Mapping[str, tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True, slots=True)
class _Record:
    """An example with what decides who gets it.

    Attributes:
        example: The example.
        unit: The text that identifies it; rows that share it stay together when a split is carved.
        twin: The unit up to case, spaces and punctuation.
        client: Whose file it came from.
        split: Of a file that holds all splits, the one that its row names.
    """

    example: Example
    unit: str
    twin: str
    client: str = ""
    split: str = "train"


_Pools = dict[str, list[_Record]]
_Found = TypeVar("_Found")


def load(section: DataSection, *, seed: int) -> Dataset:
    """All examples of a run.

    Args:
        section: ``[data]`` of the configuration.
        seed: The run's seed; decides what is generated, carved and sampled.

    Raises:
        ConfigError: The task or the source does not hold together.
        DataError: A file is missing or broken, a row does not fit, or the Hub cannot be reached.
    """
    task = resolve(section)
    pools, notes = _SOURCES[_source(section, task)](section, task, seed)
    notes += _hold_out(pools, section)
    notes += _carve(pools, seed)
    wanted = {"train": section.num_train, "validation": section.num_validation, "test": section.num_test}
    for split, most in wanted.items():
        pools[split], note = _limit(pools[split], most, split, seed)
        notes += note
    notes += _overlap(pools)
    splits = {split: tuple(record.example for record in pools[split]) for split in SPLITS}
    clients = _owners(section, pools["train"]) if section.partition.scheme == "file" else None
    return Dataset(task, splits, clients, tuple(notes))


def load_scored(section: DataSection, *, seed: int) -> Dataset:
    """What a coordinator scores on, where the training examples are elsewhere: ``train`` is empty.

    Raises:
        ConfigError: The task does not hold together.
        DataError: A file is missing or broken, or a row does not fit.
    """
    task = resolve(section)
    given = {"validation": section.validation, "test": section.test}
    if task.embedded and not any(given.values()) and section.root is None:
        whole = load(section, seed=seed)
        return Dataset(task, {**whole.splits, "train": ()}, None, whole.notes)
    wanted = {"validation": section.num_validation, "test": section.num_test}
    splits, notes = {}, []
    for split, path in given.items():
        if path is not None:
            records, read = _file_records(path, task, section)
            notes += [f"{split}: {path}, {len(records)} examples", *read]
            records, note = _limit(records, wanted[split], split, seed)
            splits[split] = tuple(record.example for record in records)
            notes += note
    return Dataset(task, {"train": (), **splits}, None, tuple(notes))


def read_examples(path: str | Path, task: Task, settings: FileSettings | None = None) -> tuple[Example, ...]:
    """The examples of one file, of which no row is left out.

    Raises:
        DataError: As ``read_whole``.
    """
    return read_whole(path, task, settings or FileSettings())[0]


def read_whole(path: str | Path, task: Task, settings: FileSettings) -> tuple[tuple[Example, ...], list[str]]:
    """As ``read_noted``, of a file that is read whole, such as a gold-standard set: no row of it is left out.

    Raises:
        DataError: The file is missing, empty or broken, or a row does not fit the task.
    """
    return read_noted(path, task, settings, is_whole=True)


def read_noted(
    path: str | Path, task: Task, settings: FileSettings, *, is_whole: bool = False
) -> tuple[tuple[Example, ...], list[str]]:
    """The examples of one file, and what a reader of results should know of how it was read.

    Args:
        path: The file.
        task: What its rows are examples of.
        settings: How it is read.
        is_whole: No row may be left out, whatever the settings say.

    Raises:
        DataError: The file is missing, empty or broken, or a row does not fit the task and is not to be left out.
    """
    if task.answer == "mixture":
        raise DataError(f"{path}: a mixture of tasks has no rows of its own; name a split")
    records, notes = _file_records(path, task, settings, is_whole=is_whole)
    return tuple(record.example for record in records), notes


def _file_records(
    path: str | Path,
    task: Task,
    settings: FileSettings,
    client: str = "",
    *,
    is_pooled: bool = False,
    is_whole: bool = False,
) -> tuple[list[_Record], list[str]]:
    """The records of a file, and notes on how it was read."""
    table = read_table(path, settings)
    records, notes = _records(
        table.entries, task, str(path), settings, client=client, is_pooled=is_pooled, is_whole=is_whole
    )
    return records, [*table.notes, *notes]


def _records(
    entries: Iterable[Row | Fault],
    task: Task,
    where: str,
    settings: FileSettings,
    *,
    client: str = "",
    is_pooled: bool = False,
    is_whole: bool = False,
) -> tuple[list[_Record], list[str]]:
    """The records of rows that fit, and a note on those that were left out.

    Raises:
        DataError: A row does not fit, and ``data.on_bad_row`` says to stop; or none fits.
    """
    records, faults = _sorted_out(entries, task, where, client=client, is_pooled=is_pooled)
    if faults and (is_whole or settings.on_bad_row == "stop" or not records):
        raise DataError(f"{where}: {_all_of(faults, len(records) + len(faults), may_skip=not is_whole)}")
    return records, [f"{where}: left out {counted(faults)}"] if faults else []


def readable(table: Table, where: str) -> list[Row]:
    """The rows of a file that can be read.

    Raises:
        DataError: None can.
    """
    rows = [entry for entry in table.entries if not isinstance(entry, Fault)]
    if not rows:
        faults = [entry for entry in table.entries if isinstance(entry, Fault)]
        raise DataError(f"{where}: {_all_of(faults, len(faults))}")
    return rows


def fitting(table: Table, task: Task, where: str) -> tuple[list[Example], list[Fault]]:
    """The examples that a file's rows make, and what is wrong with the other rows."""
    records, faults = _sorted_out(table.entries, task, where)
    return [record.example for record in records], faults


def _sorted_out(
    entries: Iterable[Row | Fault], task: Task, where: str, *, client: str = "", is_pooled: bool = False
) -> tuple[list[_Record], list[Fault]]:
    """The records of rows that fit, and the faults of those that do not."""
    records, faults = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            records.append(_record(entry, task, where, number, client=client, is_pooled=is_pooled))
        except DataError as error:
            place = entry.place if isinstance(entry, Fault) else f"row {number}"
            faults.append(Fault(place, error.told.removeprefix(f"{where}: ").removeprefix(f"{place}: ")))
    return records, faults


def _record(entry: Row | Fault, task: Task, where: str, number: int, *, client: str, is_pooled: bool) -> _Record:
    if isinstance(entry, Fault):
        raise DataError(f"{where}: {entry}")
    example = to_example(task, entry, where=where, number=number)
    split = _NAMED_SPLITS.get(str(entry.get("split", "train"))) if is_pooled else "train"
    if split is None:
        raise DataError(f"{where}: row {number}: split is not one of {', '.join(_NAMED_SPLITS)}")
    unit = unit_of(task, entry)
    twin = folded(unit) if unit else repr(folded_of(example))
    return _Record(example, unit or repr(asked_of(example)), twin, client, split)


_NAMED_SPLITS: Final[Mapping[str, str]] = {name: split for split, stems in SPLITS.items() for name in stems}
_MOST_NAMED: Final = 10
"""Most rows, and most kinds of faults, that one message names."""


def _all_of(faults: Sequence[Fault], total: int, *, may_skip: bool = True) -> str:
    """Every fault of a file in one line: the kinds with their counts, and the first rows."""
    if len(faults) == 1:
        return str(faults[0])
    if len(faults) == total and len({fault.reason for fault in faults}) == 1:
        return f"none of {total} rows fits: {faults[0].reason}"
    first = "; ".join(map(str, faults[:_MOST_NAMED]))
    rest = f"; and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
    otherwise = ", or set data.on_bad_row = 'skip' to leave such rows out" if may_skip else ", or take them out"
    return f"{first}{rest}. In all {counted(faults)} of {total} do not fit: mend them{otherwise}"


def counted(faults: Sequence[Fault]) -> str:
    """How many rows have faults, and how many of each kind."""
    kinds = Counter(fault.reason for fault in faults).most_common()
    shown = [f"{count} x {reason}" for reason, count in kinds[:_MOST_NAMED]]
    more = [f"{len(kinds) - _MOST_NAMED} other kinds"] if len(kinds) > _MOST_NAMED else []
    return f"{len(faults)} {'row' if len(faults) == 1 else 'rows'} ({'; '.join((*shown, *more))})"


def asked_of(example: Example) -> object:
    """The text that two examples share if one gives the other away: the prompt, or all of a plain text."""
    return example.messages or example.answer


def folded_of(example: Example) -> object:
    """What ``asked_of`` gives, up to case, spaces, punctuation and the form of accents."""
    return tuple((role, folded(content)) for role, content in example.messages) or folded(example.answer)


# --- sources ---------------------------------------------------------------------------------------------------------


def _source(section: DataSection, task: Task) -> str:
    """The source that ``data.source`` names, or for ``auto`` the first that has what it needs."""
    by_file = section.partition.scheme == "file"
    given = by_file or any((section.root, section.train, section.validation, section.test))
    usable = {"local": given, "embedded": task.embedded and not given, "hub": task.hub is not None and not given}
    if section.source == "auto":
        found = [name for name, ready in usable.items() if ready]
        if not found:
            raise ConfigError(f"task {task.name!r} needs data.root or data.train: it has no other source")
        return found[0]
    if usable[section.source]:
        return section.source
    if section.source == "local":
        raise ConfigError("data.source = 'local' needs data.root (a folder) or data.train (a file)")
    if given:
        raise ConfigError(f"data.source = {section.source!r} does not go with files of your own; use 'local' or 'auto'")
    raise ConfigError(f"data.source = {section.source!r}: task {task.name!r} has no such source")


def _from_embedded(section: DataSection, task: Task, seed: int) -> tuple[_Pools, list[str]]:
    asked = {"train": section.num_train, "validation": section.num_validation, "test": section.num_test}
    sizes = {split: size or EMBEDDED_SIZES[split] for split, size in asked.items()}
    try:
        made = _GENERATORS[task.name](
            num_train=sizes["train"], num_validation=sizes["validation"], num_test=sizes["test"], seed=seed
        )
    except ValueError as error:
        raise DataError(f"task {task.name!r}: {error}") from None
    pools = {split: _records(rows, task, f"{task.name} {split}", section)[0] for split, rows in made.items()}
    return pools, [f"{split}: generated, {len(pool)} examples" for split, pool in pools.items()]


def _from_hub(section: DataSection, task: Task, seed: int) -> tuple[_Pools, list[str]]:
    import datasets

    assert task.hub is not None
    name = f"{task.hub.id} ({task.hub.config})" if task.hub.config else task.hub.id
    try:
        found = datasets.load_dataset(task.hub.id, task.hub.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"task {task.name!r}: cannot load {name} from the Hugging Face Hub ({type(error).__name__}); "
            f"without a network pass data.root=FOLDER with {task.folder or 'your'} files (train.jsonl, test.jsonl)"
        ) from None
    chosen = _choose(task.hub.splits, lambda stem: stem if stem in found else None)
    if "train" not in chosen:
        raise DataError(f"{name} has no train split; it has {', '.join(sorted(found))}")
    pools: _Pools = {}
    notes = []
    for split, stem in chosen.items():
        pools[split], left_out = _records(found[stem], task, f"{name} {stem}", section)
        notes += [f"{split}: {name} {stem}, {len(pools[split])} examples", *left_out]
    return pools, notes


def _from_local(section: DataSection, task: Task, seed: int) -> tuple[_Pools, list[str]]:
    files = local_files(section, task)
    pools: _Pools = {}
    notes = []
    _refuse_twice([path for group in files.values() for path, _ in group])
    for split, group in files.items():
        for path, client in group:
            is_pooled = split == "pooled"
            records, read = _file_records(path, task, section, client, is_pooled=is_pooled)
            for part, own in (_by_split(records) if is_pooled else {split: records}).items():
                pools.setdefault(part, []).extend(own)
                notes.append(f"{part}: {path}, {len(own)} examples")
            notes += read
    if not pools.get("train"):
        raise DataError(f"task {task.name!r}: no training examples; pass data.train=FILE")
    return pools, notes


def local_files(section: DataSection, task: Task) -> dict[str, list[tuple[Path, str]]]:
    """Split (or ``pooled``) -> files with their client; given files win over those of the folder."""
    given = {"train": section.train, "validation": section.validation, "test": section.test}
    files = {split: [(path, "")] for split, path in given.items() if path is not None}
    if section.partition.scheme == "file":
        _check_owned(section)
        files["train"] = [(path, _client(name)) for name, path in sorted(section.partition.files.items())]
    if section.root is None:
        return files
    folder = _folder(section.root, task)
    taken = {path.resolve() for group in files.values() for path, _ in group}
    found = _choose(
        {split: stems for split, stems in task.files.items() if split not in files},
        lambda stem: next((path for path in _paths(folder, stem) if path.resolve() not in taken), None),
    )
    pooled = [path for stem in task.pooled for path in _paths(folder, stem)[:1]]
    if "train" not in found and "train" not in files and pooled:
        return {**files, "pooled": [(path, "") for path in pooled]}
    if "train" not in found and "train" not in files:
        where = folder.absolute()
        raise DataError(f"task {task.name!r}: no train file in {where}", beside=f"it holds {listing(folder)}")
    return {**files, **{split: [(path, "")] for split, path in found.items()}}


def _check_owned(section: DataSection) -> None:
    """Checks that, with a file for each client, every training example is in one of these files.

    Raises:
        ConfigError: Other examples would be trained on, or be left out without a word.
    """
    if section.train is not None:
        raise ConfigError(
            f"data.partition.scheme = 'file' takes each client's file, and data.train = '{section.train}' would not be "
            "read: leave it out, or name it in data.partition.files"
        )
    others = [name for name in ("validation", "test", "root") if getattr(section, name) is not None]
    if section.holdout is not None and others:
        raise ConfigError(
            f"data.holdout pools all files and draws from them, but the rows of data.{others[0]} belong to no client: "
            f"leave out data.holdout or data.{others[0]}"
        )


def _folder(root: Path, task: Task) -> Path:
    if root.is_file():
        raise DataError(f"data.root = {str(root)!r} is a file; data.root takes a folder, data.train a file")
    if not root.is_dir():
        beside = f"{root.parent} holds {listing(root.parent)}"
        raise DataError(f"no folder {str(root.absolute())!r} (data.root)", beside=beside)
    own = root / task.folder
    return own if task.folder and own.is_dir() else root


def _paths(folder: Path, stem: str) -> list[Path]:
    return [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]


def _choose(names: Mapping[str, tuple[str, ...]], find: Callable[[str], _Found | None]) -> dict[str, _Found]:
    """Split -> the first of its names that is found; no name serves two splits, and test chooses before validation."""
    chosen: dict[str, _Found] = {}
    used: set[str] = set()
    for split in ("train", "test", "validation"):
        for stem in names.get(split, ()):
            hit = find(stem) if stem not in used else None
            if hit is not None:
                chosen[split] = hit
                used.add(stem)
                break
    return chosen


def _refuse_twice(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(f"{path} is given twice; each split and each client needs a file of its own")
        seen.add(path.resolve())


def _by_split(records: Sequence[_Record]) -> _Pools:
    pools: _Pools = {}
    for record in records:
        pools.setdefault(record.split, []).append(record)
    return pools


def _client(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"data.partition.files: client name {name!r} may hold letters, digits and . _ - only, 100 of them at most"
        )
    return name


_SOURCES: Final[Mapping[str, Callable[[DataSection, Task, int], tuple[_Pools, list[str]]]]] = {
    "local": _from_local,
    "embedded": _from_embedded,
    "hub": _from_hub,
}
_GENERATORS: Final[Mapping[str, Callable[..., dict[str, list[Row]]]]] = {
    "finance-news": finance.generate,
    "medical-choice": medicine.generate,
    "client-notes": notes.generate,
    "note-preference": notes.generate,
}


# --- splits ----------------------------------------------------------------------------------------------------------


def _hold_out(pools: _Pools, section: DataSection) -> list[str]:
    """Pools all splits and draws the test set from them, as ``datasets.Dataset.train_test_split`` does.

    The draw depends on the order of the rows and on its seed, so the same rows in another order give another test set.
    """
    if section.holdout is None:
        return []
    import numpy as np

    rows = [record for split in ("train", "validation", "test") for record in pools.pop(split, [])]
    order = np.random.default_rng(section.holdout_seed).permutation(len(rows)).tolist()
    count = math.ceil(section.holdout * len(rows))
    pools["test"], pools["train"] = ([rows[place] for place in part] for part in (order[:count], order[count:]))
    if not pools["train"]:
        raise DataError(f"data.holdout = {section.holdout}: {len(rows)} examples are too few to hold some out")
    return [f"test: {count} of all {len(rows)} examples, held out with seed {section.holdout_seed}"]


def _carve(pools: _Pools, seed: int) -> list[str]:
    """Moves part of ``train`` to each missing split; rows of one unit (the same text but for case, spaces and
    punctuation) stay together.
    """
    notes = []
    total = len(pools["train"])
    pools["train"] = _with_twins_together(pools["train"])
    for split, share in CARVED.items():
        if split in pools:
            continue
        count = max(1, round(share * total))
        units = sorted({record.unit for record in pools["train"]})
        random.Random(derive(seed, f"carve-{split}")).shuffle(units)
        sizes = Counter(record.unit for record in pools["train"])
        moved: set[str] = set()
        for unit in units:
            if count <= 0:
                break
            moved.add(unit)
            count -= sizes[unit]
        pools[split] = [record for record in pools["train"] if record.unit in moved]
        pools["train"] = [record for record in pools["train"] if record.unit not in moved]
        if not pools["train"]:
            raise DataError(
                f"{total} training examples are too few to carve a {split} split from; pass data.{split}=FILE"
            )
        notes.append(f"{split}: carved from train, {len(pools[split])} of {total} examples ({share:.0%} by seed)")
    return notes


def _with_twins_together(records: Sequence[_Record]) -> list[_Record]:
    """The records, each with the unit of the first one that is its twin."""
    first: dict[str, str] = {}
    return [replace(record, unit=first.setdefault(record.twin, record.unit)) for record in records]


def _limit(records: list[_Record], most: int | None, split: str, seed: int) -> tuple[list[_Record], list[str]]:
    """At most ``most`` records, drawn by seed, and a note on it."""
    if most is None or most == len(records):
        return records, []
    if most > len(records):
        return records, [f"{split}: {len(records)} examples, fewer than the {most} asked for"]
    chosen = random.Random(derive(seed, f"sample-{split}")).sample(records, most)
    return chosen, [f"{split}: {most} of {len(records)} examples, drawn by seed"]


def _overlap(pools: _Pools) -> list[str]:
    known = {asked_of(record.example) for record in pools["train"]}
    alike = {folded_of(record.example) for record in pools["train"]}
    notes = []
    for split in ("validation", "test"):
        shared = sum(folded_of(record.example) in alike for record in pools[split])
        other = shared - sum(asked_of(record.example) in known for record in pools[split])
        if shared:
            but_for = f" ({other} of them but for case, spaces or punctuation)" if other else ""
            notes.append(f"{split}: {shared} of {len(pools[split])} prompts also stand in train{but_for}")
    return notes


def _owners(section: DataSection, records: Sequence[_Record]) -> dict[str, tuple[int, ...]]:
    """Client -> indices of its records; a client whose records were all carved or left out has none."""
    owners: dict[str, list[int]] = {name: [] for name in sorted(section.partition.files)}
    for index, record in enumerate(records):
        owners[record.client].append(index)
    return {name: tuple(indices) for name, indices in owners.items()}
