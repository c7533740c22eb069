"""Writes the first configuration for somebody's own files, with a task that is guessed from their columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any, Final

from silotune.config import Config, from_mapping, merge, overlaid
from silotune.data.files import SUFFIXES, Table, listing, read_table, suffix_of
from silotune.data.guess import Guess, guess_from
from silotune.data.load import Dataset, fitting, load
from silotune.data.partition import partition
from silotune.data.rows import SPLITS
from silotune.data.tasks import resolve
from silotune.data.toml import written
from silotune.errors import DataError
from silotune.settings.places import anchored

_CLIENTS, _EXAMPLES_A_CLIENT = 4, 8
"""Most clients that a single file is dealt to, and training examples that each of them should have."""
_TRAINING: Final = {"learning_rate": 1e-3, "batch_size": 16}
_MODES: Final = ("federated", "isolated", "centralized")


def first_config(source: Path, out: Path, settings: Sequence[str] = ()) -> tuple[str, list[str]]:
    """A configuration for a file, or for a folder with one file an institution.

    Args:
        source: The file or the folder.
        out: Where the configuration will stand; its paths begin there.
        settings: ``section.key=value`` for values of it, also for how the files are read.

    Returns:
        The configuration as TOML, and notes on what was decided.

    Raises:
        DataError: There are no files, one is broken, their columns do not show a task, or there are too few examples.
    """
    given = anchored(merge({}, settings), Path.cwd())
    read = from_mapping(given).data
    owned, scored = _files(source)
    tables = {path: read_table(path, read) for path in (*owned.values(), *scored.values())}
    found = guess_from({path: tables[path] for path in owned.values()})
    data: dict[str, Any] = {key: value for key, value in found.data.items() if key != "definition"}
    data |= {split: _relative(path, out) for split, path in scored.items()}
    notes = _notes(found)
    if bad := _bad_rows(found, tables):
        data["on_bad_row"] = "skip"
        notes.append(f"{bad} of all rows do not fit: data.on_bad_row = 'skip' leaves them out")
    data |= {"definition": found.data["definition"]} if "definition" in found.data else {}
    if len(owned) > 1:
        data["partition"] = {"scheme": "file", "files": {name: _relative(path, out) for name, path in owned.items()}}
    else:
        [path] = owned.values()
        data["train"] = _relative(path, out)
        data["partition"] = {"scheme": "iid", "clients": _clients(len(tables[path].entries))}
        notes.append(f"one file: its rows are dealt to {data['partition']['clients']} clients by chance")
    document = {
        "model": {"name": "nano"},
        "data": data,
        "training": {"objective": found.objective, **_TRAINING},
        "federation": {"modes": list(_MODES), "rounds": 5},
    }
    document = overlaid(document, given)
    config = from_mapping(anchored(document, out.absolute().parent), source=str(out))
    notes += _loaded(config).notes
    return f"# Written by 'silotune init'. Every key: docs/configuration.md.\n\n{written(document)}", notes


def _loaded(config: Config) -> Dataset:
    """The examples of a run, which can be dealt to its clients and scored.

    Raises:
        DataError: They cannot.
    """
    dataset = load(config.data, seed=config.seed)
    if dataset.clients is None:
        partition(dataset.splits["train"], config.data.partition, seed=config.seed)
    for split in ("validation", "test"):
        if any(example.wanted is not None for example in dataset.splits[split]):
            raise DataError(
                "the answers are judged one by one: training.objective = 'kto' learns from them, but only pairs "
                f"(prompt, chosen, rejected) can be scored: put a file {split}.jsonl with pairs into the folder"
            )
    return dataset


def _files(source: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Client -> its file, and split -> the file that all are scored on; a file alone belongs to one client."""
    if source.is_file():
        return {"all": source}, {}
    if not source.is_dir():
        raise DataError(f"no file or folder {str(source.absolute())!r}")
    paths = sorted(path for path in source.iterdir() if path.is_file() and suffix_of(path) in SUFFIXES)
    split_of = {stem: split for split, stems in SPLITS.items() if split != "train" for stem in stems}
    scored: dict[str, Path] = {}
    owned: dict[str, Path] = {}
    for path in paths:
        stem = path.name[: -len(suffix_of(path))]
        split = split_of.get(stem.lower())
        if split is not None and split not in scored:
            scored[split] = path
        else:
            owned[_named(stem, owned)] = path
    if not owned:
        raise DataError(f"no files of examples in {source.absolute()}", beside=f"it holds {listing(source)}")
    return owned, scored


def _named(stem: str, taken: Mapping[str, Path]) -> str:
    """A client's name from that of its file: letters, digits and . _ - only, each once."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:90] or "client"
    same = sum(other == name or other.startswith(f"{name}-") for other in taken)
    return f"{name}-{same + 1}" if name in taken else name


def _relative(path: Path, out: Path) -> str:
    return Path(relpath(path.absolute(), out.absolute().parent)).as_posix()


def _bad_rows(found: Guess, tables: Mapping[Path, Table]) -> int:
    """How many rows do not fit.

    Raises:
        DataError: None of a file does.
    """
    task = resolve(from_mapping({"data": found.data}).data)
    bad = 0
    for path, table in tables.items():
        examples, faults = fitting(table, task, str(path))
        if not examples:
            raise DataError(
                f"{path}: no row fits what the columns of all files show ({faults[0].reason}): give its columns the "
                "names that those of the other files have"
            )
        bad += len(faults)
    return bad


def _clients(rows: int) -> int:
    return max(2, min(_CLIENTS, rows // (2 * _EXAMPLES_A_CLIENT)))


def _notes(found: Guess) -> list[str]:
    definition = found.data.get("definition")
    if definition is None:
        return [f"the columns are those of task {found.data['task']!r}"]
    options = definition.get("options")
    asked = f"one of {', '.join(options)}" if options else "open text"
    notes = [f"guessed: column {definition['answer']!r} is the answer ({asked})"]
    if found.unused:
        notes.append(f"columns that are not used: {', '.join(found.unused)}")
    return notes
