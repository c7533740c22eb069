"""What fine-tuning made a model forget: its perplexity on a general text, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from silotune.errors import DataError
from silotune.evaluation.metrics import language_modelling
from silotune.models.adapters import Adapted
from silotune.training.batches import by_length
from silotune.training.encode import Encoded, render, templated
from silotune.training.scores import answer_losses

Turns = Sequence[tuple[str, str]]
"""A document as (role, content): one turn of role ``text`` for prose, else a conversation."""


def as_text(document: Turns, adapted: Adapted) -> str:
    """A document as the model was pre-trained on it: prose as it is, a conversation by the chat template."""
    if len(document) == 1 and document[0][0] == "text":
        return document[0][1]
    tokenizer = adapted.base.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return render(document, tokenizer)
    return templated(document, tokenizer)


def windows(adapted: Adapted, documents: Iterable[Turns], *, max_tokens: int, max_length: int) -> list[Encoded]:
    """The documents' token ids laid end to end, at most ``max_tokens``, cut into windows of ``max_length``.

    Every id but the first of a window is predicted from those before it in the window.

    Raises:
        DataError: There are fewer than two ids.
    """
    tokenizer = adapted.base.tokenizer
    ids: list[int] = []
    for document in documents:
        ids.extend(tokenizer(as_text(document, adapted), add_special_tokens=False)["input_ids"])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= max_tokens:
            break
    ids = ids[:max_tokens]
    parts = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    made = [Encoded(prompt=tuple(part[:1]), answer=tuple(part[1:])) for part in parts if len(part) > 1]
    if not made:
        raise DataError("the text of evaluation.forgetting has fewer than two tokens")
    return made


@torch.no_grad()
def perplexity(adapted: Adapted, text: Sequence[Encoded], *, batch_size: int) -> float:
    """exp of the mean negative log-likelihood a token, the model with its adapter as it is now."""
    total, count = 0.0, 0
    for _, batch in by_length(text, batch_size):
        losses, _ = answer_losses(adapted, batch)
        total, count = total + float(losses.double().sum()), count + losses.numel()
    return float(language_modelling([total], [count])["perplexity"])
