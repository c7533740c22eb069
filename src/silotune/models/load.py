"""Loads a base model and its tokenizer from the Hub, a local folder, or the package (``nano``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from silotune.config import ModelSection
from silotune.errors import ModelError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A base model in memory.

    Attributes:
        model: The causal language model, all parameters frozen, in evaluation mode.
        tokenizer: Its tokenizer.
        device: Where it lies.
        name: As given: Hub id, folder or ``nano``.
        autocast: Whether forward passes run under bfloat16 autocast.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    name: str
    autocast: bool = False

    @property
    def pad_id(self) -> int:
        """Token id that fills up batches; never supervised, whatever it is."""
        tokenizer = self.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return int(next(number for number in ids if number is not None))

    @property
    def context_length(self) -> int | None:
        """Most positions the model was built for; None when its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


def nano_folder() -> Path:
    """Folder of the shipped base model."""
    return Path(str(files("silotune.models"))) / "nano"


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` means here.

    Raises:
        ModelError: The named device is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[name]:
        there = ", ".join(kind for kind, found in available.items() if found)
        raise ModelError(f"model.device = {name!r} is not available on this machine; there is: {there}")
    return torch.device(name)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Loads the tokenizer alone (fast; for counting tokens and estimates).

    Raises:
        ModelError: It is not found.
    """
    from transformers import AutoTokenizer

    with _one_line_errors(section.name):
        return AutoTokenizer.from_pretrained(_source(section), **_where(section))


def load_base(section: ModelSection) -> Base:
    """Loads a base model in the asked precision, frozen, in evaluation mode.

    Args:
        section: The ``[model]`` section.

    Raises:
        ModelError: Model, revision or device are not found, or its context is shorter than ``max_length``.
        MissingPackageError: ``int4`` without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    device = pick_device(section.device)
    options: dict[str, Any] = {**_where(section)}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    if section.precision == "int4":
        options.update(_int4_options(device))
    else:
        options["dtype"] = DTYPES[section.precision]
    tokenizer = load_tokenizer(section)
    with _one_line_errors(section.name), _progress_bars_off():
        loaded: Any = AutoModelForCausalLM.from_pretrained(_source(section), output_loading_info=True, **options)
    model: PreTrainedModel
    model, found = loaded
    if found["missing_keys"]:  # transformers would go on with random numbers
        raise ModelError(
            f"model.name = {section.name!r} has no weights for {sorted(found['missing_keys'])[0]!r} "
            f"({len(found['missing_keys'])} tensors are missing); take a whole checkpoint of a causal language model"
        )
    if section.precision != "int4":
        torch.nn.Module.to(model, device)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if section.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    base = Base(model, tokenizer, device, section.name, section.autocast)
    if base.context_length and section.max_length > base.context_length:
        raise ModelError(
            f"model.max_length = {section.max_length} exceeds the {base.context_length} positions of "
            f"{section.name!r}; set model.max_length to at most {base.context_length}"
        )
    return base


def _source(section: ModelSection) -> str:
    return str(nano_folder()) if section.name == "nano" else section.name


def _where(section: ModelSection) -> dict[str, Any]:
    return {"revision": section.revision or "main", "local_files_only": section.offline or _hub_is_off()}


def _hub_is_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _int4_options(device: torch.device) -> dict[str, Any]:
    with _kernels_notice_off():
        require("bitsandbytes", extra="int4")
    from transformers import BitsAndBytesConfig

    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantization, "device_map": {"": device}, "dtype": compute}


@contextmanager
def _kernels_notice_off() -> Iterator[None]:
    """Keeps a notice about an optional package, printed when bitsandbytes is imported, from the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextmanager
def _progress_bars_off() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = Path(name).expanduser()
        if where.is_dir():
            advice = "is a folder, but not one that transformers can load (config.json, weights, tokenizer)"
        else:
            advice = "is neither a local folder nor a model that the Hub gave; check the name, HF_TOKEN and the network"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.name = {name!r} {advice} ({reason[:200]})") from error
