"""Finds the configuration that a user means: a dictionary, a file, or one that comes with silotune, by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.config import Config, from_mapping, load_config, merge
from silotune.errors import ConfigError, unknown_choice
from silotune.settings.places import anchored

ENDING = ".toml"


def folder() -> Path:
    """The folder of shipped configurations: package data of a wheel, else ``configs/`` of the checkout."""
    package = Path(__file__).parent
    in_wheel = package / "configs"
    return in_wheel if in_wheel.is_dir() else package.parents[1] / "configs"


def names() -> list[str]:
    """Names of the shipped configurations: paths below the folder without their ending, sorted."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob(f"*{ENDING}"))


def shipped(name: str) -> Path:
    """The file of a shipped configuration.

    Raises:
        ConfigError: No configuration of that name is shipped.
    """
    known = names()
    short = name.removesuffix(ENDING)
    if short not in known:
        raise ConfigError(unknown_choice("configuration", name, known))
    return folder() / f"{short}{ENDING}"


def find(name_or_path: str) -> Path:
    """The file that a command's CONFIG means: a path if there is such a file, else a shipped name.

    Raises:
        ConfigError: It is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.name != name_or_path and name_or_path not in names():
        raise ConfigError(f"no configuration file {name_or_path!r}; 'silotune configs list' shows those shipped")
    return shipped(name_or_path)


def is_grid(name: str) -> bool:
    """Whether a name is that of a shipped grid for ``silotune benchmark``."""
    return name.startswith("benchmarks/") and not Path(name).is_file()


def asked(config: Config | Mapping[str, Any] | str | Path, changes: Sequence[str] = ()) -> Config:
    """The configuration that a user gives in one way or another, with changes as ``--set`` takes them.

    A relative path begins at the working directory, in a file at the file's folder: from elsewhere it is found again.

    Raises:
        ConfigError: There is no such configuration, it is one of a grid, or it holds faults.
    """
    if isinstance(config, Config):
        config = config.model_dump(mode="json")
    if isinstance(config, Mapping):
        return from_mapping(anchored(merge(config, changes), Path.cwd()))
    name = str(config)
    if is_grid(name):
        raise ConfigError(f"{name!r} is a grid of runs: silotune benchmark {name.removeprefix('benchmarks/')}")
    return load_config(find(name), changes)


def find_grid(name_or_path: str) -> Path:
    """The file that GRID means: as ``find``, and the names below ``benchmarks/`` without it.

    Raises:
        ConfigError: There is no such file and no such name.
    """
    is_short = not Path(name_or_path).is_file() and f"benchmarks/{name_or_path}" in names()
    return find(f"benchmarks/{name_or_path}" if is_short else name_or_path)


def summary(name: str) -> str:
    """The first comment line of a shipped configuration: what it is for."""
    for line in shipped(name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
