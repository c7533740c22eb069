"""The fingerprint of a base model's files, so that two parties know that they hold the same."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from silotune.errors import ModelError
from silotune.models.load import nano_folder
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
