"""The classification head of a base model: which modules it is, its first weights, its precision and its padding.

A head is whatever ``AutoModelForSequenceClassification`` puts around the body (``score``, ``classifier``,
``pre_classifier``, a ``pooler`` of its own), and a pooler inside the body that the checkpoint has no weights for.
It is trained and sent with the adapter, so it is never kept in quantised or half precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from silotune.errors import ModelError
from silotune.seeds import derive

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Families whose kernels read the weights of some layers past the layers themselves, and so past an adapter on them."""


@dataclass(frozen=True)
class Classes:
    """The classes that a head tells apart, in order, and the run's seed, from which its first weights are drawn."""

    labels: tuple[str, ...]
    seed: int


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether the model reads in both directions, as BERT does: it was trained to fill masks and is no decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def check_use(config: PreTrainedConfig, name: str, *, classifies: bool) -> None:
    """Refuses a model that cannot be used as asked.

    Raises:
        ModelError: It is an encoder-decoder or a state-space model, or an encoder or a classifier is to write text.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    start = f"model.name = {name!r} is"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{start} an encoder-decoder ({config.model_type}), which is not trained here: take a causal language "
            "model, or an encoder with training.objective = 'classify'"
        )
    if config.model_type in STATE_SPACE:
        raise ModelError(
            f"{start} a state-space model ({config.model_type}), some of whose layers an adapter would be put on "
            "without effect: take a transformer, such as Llama or Qwen"
        )
    if classifies:
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ModelError(f"{start} of a family ({config.model_type}) of which transformers has no classifier")
        return
    if _has_head(config):
        raise ModelError(f"{start} a classifier, which writes no text; use it with training.objective = 'classify'")
    if is_encoder(config):
        raise ModelError(
            f"{start} an encoder ({config.model_type}), which writes no text; use training.objective = 'classify', "
            "or a causal language model"
        )


def prepare(config: PreTrainedConfig, classes: Classes, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Writes classes and padding into a configuration that is about to be loaded.

    Returns:
        Whether the checkpoint's own head tells just these classes apart, in this order, and so is kept.
    """
    old = getattr(config, "id2label", None) or {}
    is_kept = _has_head(config) and tuple(old[key] for key in sorted(old)) == classes.labels
    config.id2label = dict(enumerate(classes.labels))
    config.label2id = {label: number for number, label in enumerate(classes.labels)}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    # Decoders are read at the last id that is not this one, and transformers refuses batches where it is None.
    ids = (getattr(text, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id)
    text.pad_token_id = existing_id(ids, text.vocab_size)
    return is_kept


def existing_id(ids: Iterable[int | None], rows: int) -> int:
    """The first of some ids that a model with so many rows has; 0 where it has none of them."""
    return next((number for number in ids if number is not None and 0 <= number < rows), 0)


def unquantized(config: PreTrainedConfig) -> list[str]:
    """Modules that an int4 base keeps whole: the head, and the body's pooler, which may turn out to be part of it."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    pooler = _pooler(model)
    return [*_around(model), *([pooler] if pooler else [])]


def find_head(model: PreTrainedModel, drawn: Iterable[str], *, name: str) -> tuple[str, ...]:
    """Names of the head's modules.

    Args:
        model: The model with its head.
        drawn: Names of the tensors that the checkpoint did not have.
        name: The model's, for errors.

    Raises:
        ModelError: Tensors of the body are among them, so the checkpoint is not whole; or there is no head.
    """
    head, pooler = _around(model), _pooler(model)
    outside = sorted(tensor for tensor in drawn if not tensor.startswith(tuple(f"{part}." for part in head)))
    if pooler and outside and all(tensor.startswith(f"{pooler}.") for tensor in outside):
        head, outside = [pooler, *head], []
    if outside or not head:
        raise ModelError(
            f"model.name = {name!r} has no weights for {(outside or ['a head'])[0]!r} "
            f"({len(outside)} tensors are missing); take a whole checkpoint"
        )
    return tuple(head)


def draw(model: PreTrainedModel, head: Sequence[str], seed: int) -> None:
    """Draws a head's weights as its architecture does, on the CPU and in float32, so that a seed gives one head."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(derive(seed, "head-init"))
        for name in head:
            module = model.get_submodule(name)
            device = next(module.parameters()).device
            module.to("cpu", torch.float32)
            for part in module.modules():
                for item in (part, *part.parameters(recurse=False)):
                    setattr(item, "_is_hf_initialized", False)  # noqa: B010 - transformers' mark, which no type knows
                model._init_weights(part)
            module.to(device)


def keep_float32(model: PreTrainedModel, head: Sequence[str]) -> None:
    """Holds the head in float32, whatever the body's precision is: small updates would round away in bfloat16."""
    for name in head:
        module = model.get_submodule(name)
        module.to(torch.float32)
        if model.dtype != torch.float32 or getattr(model, "is_quantized", False):
            module.register_forward_pre_hook(_to_float32)


def _to_float32(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(item.float() if torch.is_tensor(item) and item.is_floating_point() else item for item in inputs)


def _has_head(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ())


def _around(model: PreTrainedModel) -> list[str]:
    """Modules beside the body that hold weights."""
    body = model.base_model_prefix
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


def _pooler(model: PreTrainedModel) -> str:
    """Name of the pooler inside the body; empty where there is none."""
    pooler = getattr(model.base_model, "pooler", None)
    if model.base_model is model or not isinstance(pooler, torch.nn.Module) or not list(pooler.parameters()):
        return ""
    return f"{model.base_model_prefix}.pooler"
