"""What a local round minimises, as values: a way to build batches and a loss over them.

``sft``: cross-entropy of the answer and the end of sequence. ``choice``: cross-entropy over a closed set of
options, each scored by the log-likelihood of its tokens given the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from silotune.errors import DataError
from silotune.models.adapters import Adapted
from silotune.training.batches import Batch, OptionBatch, answer_batch, option_batch
from silotune.training.encode import Encoded


@dataclass(frozen=True)
class Loss:
    """A summed loss and the number of terms in it; their quotient is the mean."""

    total: torch.Tensor
    count: int


@dataclass(frozen=True)
class Objective:
    """``loss(adapted, examples)`` for one batch of examples; ``check`` refuses examples it cannot use."""

    loss: Callable[[Adapted, Sequence[Encoded]], Loss]
    check: Callable[[Sequence[Encoded]], None]


def logits_at(adapted: Adapted, batch: Batch) -> torch.Tensor:
    """Logits at ``batch.positions`` only [needed, vocabulary], in float32.

    The output head is applied to the hidden states of these positions alone. In closed-ended tasks they are
    one in thirty, and the [examples, length, vocabulary] tensor is never built.
    """
    head = adapted.model.get_output_embeddings()  # type: ignore[operator]

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]  # [examples, length, width]
        return (hidden.reshape(-1, hidden.shape[-1])[batch.positions], *inputs[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        with autocast(adapted):
            logits = adapted.model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
            ).logits
    finally:
        handle.remove()
    return logits.float()


def autocast(adapted: Adapted) -> AbstractContextManager[Any]:
    """bfloat16 autocast where the model section asks for it."""
    if not adapted.base.autocast:
        return nullcontext()
    return torch.autocast(adapted.base.device.type, dtype=torch.bfloat16)


def answer_losses(adapted: Adapted, examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every answer id [needed], and the example it belongs to [needed]."""
    made = answer_batch(examples, pad_id=adapted.base.pad_id, device=adapted.base.device)
    logits = logits_at(adapted, made.batch)
    return torch.nn.functional.cross_entropy(logits, made.targets, reduction="none"), made.owner


def option_scores(adapted: Adapted, examples: Sequence[Encoded]) -> torch.Tensor:
    """Log-likelihood of each option given the prompt [examples, options]; all must have equally many."""
    base = adapted.base
    dtype = torch.bfloat16 if base.autocast else next(base.model.get_input_embeddings().parameters()).dtype
    made = option_batch(examples, pad_id=base.pad_id, device=base.device, dtype=dtype)
    return _sum_by_option(torch.log_softmax(logits_at(adapted, made.batch), dim=-1), made, len(examples))


def _sum_by_option(log_probabilities: torch.Tensor, made: OptionBatch, num_examples: int) -> torch.Tensor:
    tokens = log_probabilities[made.rows, made.targets]
    scores = torch.zeros(num_examples * made.num_options, device=tokens.device)
    return scores.index_add(0, made.owner, tokens).view(num_examples, made.num_options)


def _sft_loss(adapted: Adapted, examples: Sequence[Encoded]) -> Loss:
    losses, _ = answer_losses(adapted, examples)
    return Loss(losses.sum(), losses.numel())


def _choice_loss(adapted: Adapted, examples: Sequence[Encoded]) -> Loss:
    labels = torch.tensor([example.label for example in examples], device=adapted.base.device)
    scores = option_scores(adapted, examples)
    return Loss(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"), len(examples))


def _any_examples(examples: Sequence[Encoded]) -> None:
    if not all(example.answer for example in examples):
        raise DataError("an example has no supervised token")


def _closed_examples(examples: Sequence[Encoded]) -> None:
    if len({len(example.options) for example in examples}) != 1 or not examples[0].options:
        raise DataError(
            "training.objective = 'choice' needs a task whose examples all have the same number of options; "
            "use 'sft' for open answers"
        )


OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective(_sft_loss, _any_examples),
    "choice": Objective(_choice_loss, _closed_examples),
}
