"""What a run goes on from: a trained adapter, and the examples that it was begun with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.errors import DataError, ModelError
from silotune.record.files import read_document
from silotune.record.runs import RunFolder
from silotune.record.tensor_files import read_tensors
from silotune.settings.adapters import AdapterSettings, Lora
from silotune.structs import Tensors


def read_adapter(source: str) -> Tensors:
    """The tensors of a trained adapter.

    Args:
        source: A run folder, whose federated adapter is taken; a part of one, such as ``runs/demo/centralized``; or a
            folder in peft's format, such as ``silotune export`` writes.

    Raises:
        ModelError: There is none.
    """
    return read_tensors(adapter_folder(source) / "adapter_model.safetensors")


def check_same_function(source: str, section: AdapterSettings) -> int:
    """Checks that a trained LoRA adapter computes the same function under this section as when it was trained.

    Returns:
        Its rank; 0 where it has none.

    Raises:
        ModelError: There is no adapter, it has another rank, it was scaled otherwise, or has DoRA where this section
            has not.
    """
    saved = read_document(adapter_folder(source) / "adapter_config.json", ModelError)
    rank = saved.get("r")
    if not isinstance(section, Lora) or not isinstance(rank, int):
        return 0
    alpha, rslora, dora = saved["lora_alpha"], bool(saved.get("use_rslora")), bool(saved.get("use_dora"))
    if rank != section.rank:
        raise ModelError(
            f"adapter.start does not fit the adapter of this run: {source!r} has rank {rank}, its residual "
            f"included where it has one; set adapter.rank = {rank} and adapter.alpha = {alpha}"
        )
    there = _factor(alpha, section.rank, is_rank_stable=rslora)
    asked = _factor(section.alpha, section.rank, is_rank_stable=section.rslora)
    if dora != section.dora or not math.isclose(asked, there):
        raise ModelError(
            f"adapter.start = {source!r} was trained with lora_alpha = {alpha}, use_rslora = {rslora} and use_dora = "
            f"{dora}: with other values its tensors are another function; set adapter.alpha, adapter.rslora and "
            "adapter.dora to the same"
        )
    return rank


def _factor(alpha: float, rank: int, *, is_rank_stable: bool) -> float:
    """The factor that LoRA's product is multiplied by."""
    return alpha / (math.sqrt(rank) if is_rank_stable else rank)


def adapter_folder(source: str) -> Path:
    """The folder in peft's format of a trained adapter, as ``read_adapter`` finds it.

    Raises:
        ModelError: There is none.
    """
    for folder in (Path(source), Path(source) / "adapter", Path(source) / "federated" / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ModelError(
        f"adapter.start = {source!r} holds no adapter; give a finished run, a part of one such as "
        "RUN/centralized, or what 'silotune export' wrote"
    )


def check_same_data(folder: RunFolder, skew: Mapping[str, Any]) -> None:
    """Checks that a resumed run has the same examples that it began with.

    Raises:
        DataError: The data changed since.
    """
    began = folder.read_json("partition").get("data_sha256") if folder.has("partition") else None
    if began is not None and began != skew["data_sha256"]:
        raise DataError(
            f"{str(folder.path)!r} was begun with other examples: the data changed since. Put them back as they were, "
            "or run the configuration anew"
        )
