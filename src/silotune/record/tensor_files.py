"""Groups of named tensors in one safetensors file, bit for bit, with their order kept beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from silotune.errors import RunFolderError
from silotune.structs import Tensors

Order = dict[str, list[str]]
"""Group -> names in their original order; safetensors sorts them, and sums depend on the order."""


def write_groups(path: Path, groups: Mapping[str, Tensors]) -> Order:
    """Writes groups of tensors as ``group/name`` into a new file and flushes it to the disk.

    Tensors that share memory are stored one by one, so a group may hold the very tensors of another.

    Returns:
        The order of the names, which ``read_groups`` needs.

    Raises:
        OSError: The disk is full or the folder may not be written.
    """
    named = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    write_tensors(path, named)
    return {group: list(tensors) for group, tensors in groups.items()}


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes tensors under their own names, as ``write_groups`` does."""
    from safetensors.torch import save_file

    from silotune.tensors import apart  # imported here, as it brings torch, and reading a run's rows does not need it

    with writing(path):
        save_file(apart(tensors), path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns safetensors' own error about a file or folder that it writes into the system's.

    Raises:
        OSError: The disk is full or the folder may not be written.
        RunFolderError: Any other reason.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise RunFolderError(f"cannot write {str(path)!r}: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_groups(path: Path, order: Mapping[str, list[str]]) -> dict[str, Tensors]:
    """The groups that ``write_groups`` wrote, on the CPU, names in their original order.

    Raises:
        RunFolderError: The file is missing or damaged, or lacks a tensor.
    """
    tensors = read_tensors(path)
    try:
        return {group: {name: tensors[f"{group}/{name}"] for name in names} for group, names in order.items()}
    except KeyError as error:
        raise RunFolderError(f"{str(path)!r} holds no tensor {error}: the file was changed or damaged") from None


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        RunFolderError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"cannot read the tensors in {str(path)!r}: {error}") from None
