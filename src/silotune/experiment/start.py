"""Reads the adapter that training goes on from."""

from __future__ import annotations

from pathlib import Path

from silotune.errors import ModelError
from silotune.record.tensor_files import read_tensors
from silotune.structs import Tensors


def read_adapter(source: str) -> Tensors:
    """The tensors of a trained adapter.

    Args:
        source: A run folder, whose federated adapter is taken; a part of one, such as ``runs/demo/centralized``; or a
            folder in peft's format, such as ``silotune export`` writes.

    Raises:
        ModelError: There is none.
    """
    for folder in (Path(source), Path(source) / "adapter", Path(source) / "federated" / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return read_tensors(folder / "adapter_model.safetensors")
    raise ModelError(
        f"adapter.start = {source!r} holds no adapter; give a finished run, a part of one such as "
        "RUN/centralized, or what 'silotune export' wrote"
    )
