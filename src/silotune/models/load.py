"""Loads a base model and its tokenizer from the Hub, a local folder, or the package (``nano``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from silotune.errors import ModelError, require
from silotune.models.head import (
    Classes,
    check_use,
    draw,
    existing_id,
    find_head,
    is_encoder,
    keep_float32,
    prepare,
    unquantized,
)
from silotune.models.marks import DATE_KEY, Marks, asks_for_date, day_of, marks_of
from silotune.settings.sections import ModelSection

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A base model in memory.

    Attributes:
        model: The causal language model or the classifier, all parameters frozen, in evaluation mode.
        tokenizer: Its tokenizer.
        device: Where it lies.
        name: As given: Hub id, folder or ``nano``.
        autocast: Whether forward passes run under bfloat16 autocast.
        labels: The classes that a classifier tells apart; empty for a causal language model.
        head: Names of a classifier's modules that are trained and sent with the adapter.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    name: str
    autocast: bool = False
    labels: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    @property
    def task_type(self) -> str:
        """The name that peft has for the use of the model."""
        return "SEQ_CLS" if self.labels else "CAUSAL_LM"

    @property
    def is_encoder(self) -> bool:
        """Whether the model reads in both directions, as BERT does."""
        return is_encoder(self.model.config)

    @property
    def pad_id(self) -> int:
        """Token id that fills up batches; never supervised, whatever it is."""
        if self.labels:  # the one that the model looks for
            return int(self.model.config.get_text_config().pad_token_id)
        return existing_id((self.tokenizer.pad_token_id, self.tokenizer.eos_token_id), rows_of(self.model))

    @cached_property
    def marks(self) -> Marks:
        """The tokenizer's control marks."""
        return marks_of(self.tokenizer)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's end of a turn, the tokenizer's own, and those that the model names."""
        return _ends(getattr(self.model, "generation_config", None), self.tokenizer, self.marks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results should know of the base."""
        found = []
        pad, rows = self.tokenizer.pad_token_id, rows_of(self.model)
        if pad is None or pad >= rows:
            why = "no padding mark" if pad is None else f"a padding mark of id {pad}, beyond the model's {rows} rows"
            mark = self.tokenizer.convert_ids_to_tokens(self.pad_id)
            found.append(
                f"the tokenizer has {why}: batches are filled up with {mark!r} (id {self.pad_id}), which is masked"
            )
        if asks_for_date(self.tokenizer):
            found.append(f"the chat template writes today's date, which is {day_of(self.tokenizer)} here (model.date)")
        return tuple(found)

    @property
    def context_length(self) -> int | None:
        """Most positions the model was built for; None when its config does not say."""
        for name, module in self.model.named_modules():
            # models like RoBERTa number positions from the padding's on: 514 in the config leave 512 for a text
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return int(module.num_embeddings) - int(module.padding_idx) - 1
        return getattr(self.model.config, "max_position_embeddings", None)


def rows_of(model: PreTrainedModel) -> int:
    """Rows of a model's embedding: ids from 0 on that it knows."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def nano_folder() -> Path:
    """Folder of the shipped base model."""
    return Path(str(files("silotune.models"))) / "nano"


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` means here.

    Raises:
        ModelError: The named device is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    device = torch.device(name)
    gpus = torch.cuda.device_count() if available["cuda"] else 0
    if not available[device.type] or (device.index or 0) >= max(1, gpus):
        numbered = [f"cuda:{number}" for number in range(gpus)]
        there = ", ".join([*(kind for kind, found in available.items() if found), *numbered])
        raise ModelError(f"model.device = {name!r} is not available on this machine; there is: {there}")
    return device


def settled(section: ModelSection) -> ModelSection:
    """The section with the precision that ``auto`` means on its device.

    Raises:
        ModelError: The device is not there.
    """
    if section.precision != "auto":
        return section
    multiplies = _MULTIPLIES_BFLOAT16[pick_device(section.device).type]
    return section.model_copy(update={"precision": "bfloat16" if multiplies() else "float32"})


_MULTIPLIES_BFLOAT16: Mapping[str, Callable[[], bool]] = {
    "cpu": lambda: any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")),
    "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
    "mps": lambda: False,
}
"""Whether a device multiplies bfloat16 by itself: one that does not converts every value, and is slower for it."""


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Loads the tokenizer alone (fast; for counting tokens and estimates).

    Raises:
        ModelError: It is not found.
    """
    from transformers import AutoTokenizer

    with _one_line_errors(section.name):
        return AutoTokenizer.from_pretrained(_source(section), **_where(section), **{DATE_KEY: section.date})


def load_generation(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How a base model generates by its own files, but for where answers end, as this software trains them.

    Raises:
        ModelError: The model is not found.
    """
    from transformers import AutoConfig, GenerationConfig

    with _one_line_errors(section.name):
        try:
            made = GenerationConfig.from_pretrained(_source(section), **_where(section))
        except OSError:  # it has no generation_config.json
            made = GenerationConfig.from_model_config(AutoConfig.from_pretrained(_source(section), **_where(section)))
    made.eos_token_id = list(_ends(made, tokenizer, marks_of(tokenizer)))
    return made


def _ends(named: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> tuple[int, ...]:
    own = named.eos_token_id if named else None
    ids = (*marks.end.ids, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]))
    return tuple(sorted({each for each in ids if each is not None}))


def load_base(section: ModelSection, classes: Classes | None = None) -> Base:
    """Loads a base model in the asked precision, frozen, in evaluation mode.

    Args:
        section: The ``[model]`` section.
        classes: What it is to tell apart; None for a causal language model. A head that the checkpoint has for
            these very classes is kept, any other is drawn from the seed.

    Raises:
        ModelError: Model, revision or device are not found, the model is of another kind, or its context is shorter
            than ``max_length``.
        MissingPackageError: ``int4`` without bitsandbytes.
    """
    section = settled(section)
    device = pick_device(section.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # what is counted and made without a device is then of this one
    tokenizer = load_tokenizer(section)
    model, head = _load_model(section, _config_of(section, classes), tokenizer, device=device, classes=classes)
    if section.precision != "int4":
        with _one_line_errors(section.name):
            torch.nn.Module.to(model, device)
    else:
        _keep_as_quantised(model)
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if section.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    labels = classes.labels if classes else ()
    base = Base(model, tokenizer, device, section.name, section.autocast, labels, head)
    _check_ids(base)
    if base.context_length and section.max_length > base.context_length:
        raise ModelError(
            f"model.max_length = {section.max_length} exceeds the {base.context_length} positions of "
            f"{section.name!r}; set model.max_length to at most {base.context_length}"
        )
    return base


def _check_ids(base: Base) -> None:
    """Refuses a tokenizer that has ids beyond the model's rows: of words, or of marks that prompts and answers hold.

    Raises:
        ModelError: It has; names the token, its id and the rows.
    """
    rows, tokenizer = rows_of(base.model), base.tokenizer
    if max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0) < rows:
        return
    marks = base.marks
    framing = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    needed = {*framing, *marks.around}
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    for token, number in sorted(beyond.items(), key=lambda item: item[1]):
        if token in needed or token not in marks.ids:
            raise ModelError(
                f"model.name = {base.name!r}: the tokenizer's {token!r} has id {number}, and the model has rows for "
                f"the ids 0 to {rows - 1} alone; give the model rows for it (resize_token_embeddings), or take the "
                "tokenizer that the model was made with"
            )


def _config_of(section: ModelSection, classes: Classes | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _one_line_errors(section.name):
        config = AutoConfig.from_pretrained(_source(section), **_where(section))
    _check_kernels(config, section.name)
    check_use(config, section.name, classifies=classes is not None)
    return config


def _check_kernels(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose files name code on the Hub for its attention or experts, which would be fetched and run.

    Raises:
        ModelError: They do.
    """
    parts = [config, *(getattr(config, part, None) for part in config.sub_configs)]
    for part in filter(None, parts):
        for kind in ("_attn_implementation", "_experts_implementation"):
            named = getattr(part, kind, None)
            if isinstance(named, str) and "/" in named:
                raise ModelError(
                    f"model.name = {name!r} names code to be fetched from the Hub ({kind.lstrip('_')} = {named!r} in "
                    "its config.json), which is never run here: take that line out of a copy of the folder"
                )


def _load_model(
    section: ModelSection,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: torch.device,
    classes: Classes | None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model with its weights, and the names of its head's modules (none for a causal language model)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {**_where(section)}
    keeps_head = prepare(config, classes, tokenizer) if classes else False
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    if section.precision == "int4":
        options.update(_int4_options(device, unquantized(config) if classes else None))
    else:
        options["dtype"] = DTYPES[section.precision]
    kind: Any = AutoModelForCausalLM
    if classes:
        kind = AutoModelForSequenceClassification
        options.update(config=config, ignore_mismatched_sizes=True)
    with _one_line_errors(section.name), _quiet_loading(), torch.random.fork_rng():
        torch.manual_seed(0)  # for any tensor that the checkpoint lacks and that is not drawn again below
        loaded: Any = kind.from_pretrained(_source(section), output_loading_info=True, **options)
    model, found = loaded
    if classes is None:
        _check_whole(section.name, found["missing_keys"])
        return model, ()
    drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    head = find_head(model, drawn, name=section.name)
    keep_float32(model, head)
    if drawn or not keeps_head:
        draw(model, head, classes.seed)
    return model, head


def _check_whole(name: str, missing: Iterable[str]) -> None:
    """Refuses a checkpoint without all weights: transformers would go on with random numbers."""
    names = sorted(missing)
    if names:
        raise ModelError(
            f"model.name = {name!r} has no weights for {names[0]!r} "
            f"({len(names)} tensors are missing); take a whole checkpoint of a causal language model"
        )


def _source(section: ModelSection) -> str:
    return str(nano_folder()) if section.name == "nano" else section.name


def _where(section: ModelSection) -> dict[str, Any]:
    """Options that say where transformers looks for a model's files, and that code among them is never run."""
    return {
        "revision": section.revision or "main",
        "local_files_only": section.offline or _hub_is_off(),
        "trust_remote_code": False,
    }


def _hub_is_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _int4_options(device: torch.device, whole: list[str] | None) -> dict[str, Any]:
    """Options that pack the weights; ``whole`` names modules that are left alone beside transformers' own choice."""
    with _kernels_notice_off():
        require("bitsandbytes", extra="int4")
    from transformers import BitsAndBytesConfig

    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=whole,
    )
    return {"quantization_config": quantization, "device_map": {"": device}, "dtype": compute}


def _keep_as_quantised(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking int4 weights for scoring on CPUs that multiply bfloat16.

    It would score with other numbers than it trains with, and such CPUs with others than the rest; widths below a
    quantisation block it cannot repack at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


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
def _quiet_loading() -> Iterator[None]:
    """Hides progress bars and the table of tensors that a checkpoint lacks: the caller checks what is lacking."""
    from transformers.utils import logging as transformers_logging

    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.name = {name!r} cannot be loaded with these settings: {reason[:300]}") from error
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"model.name = {name!r} does not fit into the GPU's memory; set model.precision = 'bfloat16' or 'int4', "
            "model.device = 'cpu', or take a smaller model"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model.name = {name!r} comes with code of its own (auto_map in its config.json or "
                "tokenizer_config.json), which is never run here: take a model that transformers knows by itself"
            ) from error
        where = Path(name).expanduser()
        if where.is_dir():
            advice = "is a folder, but not one that transformers can load (config.json, weights, tokenizer)"
        else:
            advice = "is neither a local folder nor a model that the Hub gave; check the name, HF_TOKEN and the network"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.name = {name!r} {advice} ({reason[:200]})") from error
