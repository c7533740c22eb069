"""What a model gives for batches of examples: logits where they are needed, and the likelihood of answers and options.

Each function takes the shortest way that is found to leave the numbers as they are (``Adapted.fast``): the output head
and the last layer at needed positions only, options as branches of one prompt, what all prompts begin with computed
once. Without any of these it takes the plain way: each sequence in a row of its own, and all logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from silotune.errors import DataError
from silotune.models.adapters import Adapted
from silotune.models.elsewhere import Form, row_lengths
from silotune.models.fast import attention
from silotune.models.fast.last_layer import last_layer, needed_only
from silotune.models.fast.paths import longest_alike
from silotune.training.batches import (
    Batch,
    OptionBatch,
    answer_batch,
    class_batch,
    option_batch,
    packed_rows,
    separate_option_batch,
    shared_prefix,
)
from silotune.training.encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_at(adapted: Adapted, batch: Batch) -> torch.Tensor:
    """Logits at ``batch.positions`` only [needed, vocabulary], in float32.

    The output head is applied to the hidden states of these positions alone, if the model may do so. In closed-ended
    tasks they are one in thirty, and the [examples, length, vocabulary] tensor is never built. What all examples begin
    with goes through the model once; its keys and values are then read by all of them, and gradients flow back through
    both.
    """
    # some architectures know no position_ids: they are named only where the default does not do
    places = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    with autocast(adapted):
        if batch.prefix is None:
            made = _forward(adapted, batch.positions, batch.ids, attention_mask=batch.mask, use_cache=False, **places)
        else:
            cache = _prefix_cache(adapted, batch.prefix, copies=len(batch.ids))
            read = {"attention_mask": batch.mask, "past_key_values": cache, **places}
            made = _forward(adapted, batch.positions, batch.ids, **read)
    return made.float()


def _prefix_cache(adapted: Adapted, prefix: torch.Tensor, *, copies: int) -> Any:
    """Keys and values of the prefix [1, shared] in every layer, repeated for each example."""
    from transformers import DynamicCache

    cache = DynamicCache(config=adapted.base.model.config)
    nowhere = torch.empty(0, dtype=torch.long, device=prefix.device)
    _forward(adapted, nowhere, prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(copies)
    return cache


def _forward(adapted: Adapted, positions: torch.Tensor, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits at flat positions [positions, vocabulary]."""

    def keep(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = given[0]  # [examples, length, width]
        return (hidden.reshape(-1, hidden.shape[-1])[positions], *given[1:])

    if adapted.elsewhere is not None:
        adapted.elsewhere.form = _form(positions, ids, **inputs)
    is_short = adapted.fast.last_layer and can_shorten(adapted, ids.shape[1])
    layer = last_layer(adapted.base.model) if is_short else None
    head = adapted.model.get_output_embeddings() if adapted.fast.head else None  # type: ignore[operator]
    handle = None if head is None else head.register_forward_pre_hook(keep)
    try:
        with needed_only(layer, positions, ids.shape) if layer is not None else nullcontext():
            logits: torch.Tensor = adapted.model(input_ids=ids, **inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if handle is not None else logits.reshape(-1, logits.shape[-1])[positions]


def _form(
    positions: torch.Tensor,
    ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **inputs: Any,
) -> Form:
    """What the blocks that are elsewhere must know of a batch."""
    visible = None if attention_mask is None else attention_mask.squeeze(1) == 0
    return Form(row_lengths(positions, ids.shape), ids.shape[1], visible=visible, position_ids=position_ids)


def autocast(adapted: Adapted) -> AbstractContextManager[Any]:
    """bfloat16 autocast where the model section asks for it."""
    if not adapted.base.autocast:
        return nullcontext()
    return torch.autocast(adapted.base.device.type, dtype=torch.bfloat16)


def answer_losses(
    adapted: Adapted, examples: Sequence[Encoded], *, packed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every supervised answer id [needed], and the example it belongs to [needed].

    ``packed`` puts short examples into one row, if the model can keep them apart by a mask; the numbers are the same.
    """
    base = adapted.base
    longest = max(example.length for example in examples)
    shared = _shared(adapted, examples, longest)
    is_packed = packed and adapted.fast.branches and sees_branches(base.model, longest)
    rows = packed_rows(examples) if is_packed else None
    dtype = _mask_dtype(adapted)
    made = answer_batch(examples, pad_id=base.pad_id, device=base.device, dtype=dtype, shared=shared, rows=rows)
    logits = logits_at(adapted, made.batch)
    return torch.nn.functional.cross_entropy(logits, made.targets, reduction="none"), made.owner


def option_scores(adapted: Adapted, examples: Sequence[Encoded]) -> torch.Tensor:
    """Log-likelihood of each option given the prompt [examples, options]; a classifier's options are its classes.

    Raises:
        DataError: The examples do not have equally many options.
    """
    base = adapted.base
    if base.labels:
        return torch.log_softmax(class_logits(adapted, examples), dim=-1)
    closed_examples(examples)
    longest = max(len(example.prompt) + max(map(len, example.options)) for example in examples)
    if adapted.fast.branches and sees_branches(base.model, longest):
        shared = _shared(adapted, examples, longest)
        dtype = _mask_dtype(adapted)
        made = option_batch(examples, pad_id=base.pad_id, device=base.device, dtype=dtype, shared=shared)
    else:
        made = separate_option_batch(examples, pad_id=base.pad_id, device=base.device)
    return _sum_by_option(torch.log_softmax(logits_at(adapted, made.batch), dim=-1), made, len(examples))


def class_logits(adapted: Adapted, examples: Sequence[Encoded]) -> torch.Tensor:
    """What the head gives for each class [examples, classes], in float32.

    transformers reads a decoder at its last id that is no padding, and an encoder as its architecture says.
    """
    ids, mask = class_batch(examples, pad_id=adapted.base.pad_id, device=adapted.base.device)
    if adapted.elsewhere is not None:
        adapted.elsewhere.form = Form(tuple(mask.sum(1).tolist()), ids.shape[1], hides_padding=True)
    with autocast(adapted):
        logits: torch.Tensor = adapted.model(input_ids=ids, attention_mask=mask).logits
    return logits.float()


def sees_branches(model: PreTrainedModel, length: int) -> bool:
    """Whether a model follows an explicit mask and positions, for sequences of ``length``, in every layer.

    Not so: kernels without masks (flash attention), layers with memory instead of attention, positions that are
    not given from outside, and windows that are shorter than the sequence (the mask would open them).
    """
    config = model.config.get_text_config()
    most = longest_alike(config)
    layers = set(getattr(config, "layer_types", None) or ())
    return (
        config._attn_implementation in ("sdpa", "eager", attention.NAME)
        and layers <= {"full_attention", "sliding_attention"}
        and (most is None or length <= most)
        and not model._is_stateful
        and not getattr(config, "alibi", False)
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def can_shorten(adapted: Adapted, length: int) -> bool:
    """Whether sequences of ``length`` can begin with keys and values that were computed once for all of them, and
    leave out of the last layer what nobody reads.

    Not so where the model cannot follow a mask, where checkpointing gives up the cache, where training draws
    random numbers (all examples would draw the same), and where each example's own gradient is wanted.
    """
    base = adapted.base
    drawn = adapted.model.training and adapted.draws_randomly
    is_free = not (adapted.is_checkpointed or drawn or adapted.keeps_rows_apart)
    return is_free and sees_branches(base.model, length)


def _shared(adapted: Adapted, examples: Sequence[Encoded], longest: int) -> int:
    """Ids at the beginning of every prompt that are computed once for the batch."""
    return shared_prefix(examples) if adapted.fast.prefix and can_shorten(adapted, longest) else 0


def _mask_dtype(adapted: Adapted) -> torch.dtype:
    base = adapted.base
    return torch.bfloat16 if base.autocast else next(base.model.get_input_embeddings().parameters()).dtype


def _sum_by_option(log_probabilities: torch.Tensor, made: OptionBatch, num_examples: int) -> torch.Tensor:
    tokens = log_probabilities[made.rows, made.targets]
    scores = torch.zeros(num_examples * made.num_options, device=tokens.device)
    return scores.index_add(0, made.owner, tokens).view(num_examples, made.num_options)


def closed_examples(examples: Sequence[Encoded]) -> None:
    """Raises ``DataError`` unless all examples have the same number of options, at least one."""
    if len({len(example.options) for example in examples}) != 1 or not examples[0].options:
        raise DataError(
            "options can only be scored where all examples have the same number of them (at least one); "
            "use training.objective = 'sft' for open answers"
        )
