"""What is known of a base model from its files: its fingerprint, and the memory that its weights take."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from silotune.errors import ModelError
from silotune.models.load import nano_folder, pick_device, settled
from silotune.settings.sections import ModelSection

_PLAIN = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def folder_of(section: ModelSection) -> Path:
    """Folder of a base model's files: the shipped one, a local one, or the Hub's in its cache.

    Raises:
        ModelError: It is not on this machine.
    """
    if section.name == "nano":
        return nano_folder()
    if Path(section.name).is_dir():
        return Path(section.name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    found: object = None
    with suppress(HFValidationError):  # a path, and no folder
        found = try_to_load_from_cache(section.name, "config.json", revision=section.revision)
    if not isinstance(found, str):
        raise ModelError(f"model.name = {section.name!r} is not on this machine: give a folder, or download it first")
    return Path(found).parent


def fingerprint(folder: Path) -> str:
    """SHA-256 (hexadecimal) over the names and digests of weights, configuration and tokenizer.

    Raises:
        ModelError: The folder holds no weights in safetensors files.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{str(folder)!r} holds no *.safetensors: a base model's fingerprint is computed from these files"
        )
    total = hashlib.sha256()
    for path in [*(folder / name for name in _PLAIN if (folder / name).is_file()), *weights]:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def weights_bytes(section: ModelSection) -> int | None:
    """Bytes of the weights in memory, at least; None where the files are not on this machine, or not safetensors.

    Raises:
        ModelError: The device, by which the precision is picked, is not there.
    """
    size = _BYTES[settled(section).precision]
    try:
        paths = sorted(folder_of(section).glob("*.safetensors"))
        values = 0
        for path in paths:
            with safe_open(path, framework="pt") as file:
                values += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (ModelError, SafetensorError, OSError):  # loading says what is wrong with them
        return None
    return int(values * size) if paths else None


_BYTES: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0, "int4": 0.5}
"""Bytes of a value by precision; for int4 a lower bound, since embedding, head and scales take more."""


def check_memory(section: ModelSection, total: int | None) -> None:
    """Refuses a base whose weights exceed all main memory, before the system kills the process that reads them.

    Args:
        section: The ``[model]`` section.
        total: Bytes of main memory; None where the system does not say.

    Raises:
        ModelError: They do; says which precision would fit.
    """
    needed = None if total is None or pick_device(section.device).type != "cpu" else weights_bytes(section)
    if total is None or needed is None or needed <= total:
        return
    sizes = {name: needed * _BYTES[name] / _BYTES[settled(section).precision] for name in ("bfloat16", "int4")}
    ways = (
        f"in {name} they take {size / 1e9:.1f} GB: set model.precision = {name!r}"
        for name, size in sizes.items()
        if size <= total
    )
    raise ModelError(
        f"model.name = {section.name!r}: its weights alone take {needed / 1e9:.1f} GB in {settled(section).precision}, "
        f"and this machine has {total / 1e9:.1f} GB of memory; {next(ways, 'take a smaller model')}"
    )
