"""What fine-tuning made a model forget: its perplexity on a general text, before and after."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from silotune.data.embedded import corpus
from silotune.data.files import read_rows
from silotune.errors import DataError
from silotune.evaluation.metrics import language_modelling
from silotune.models.adapters import Adapted
from silotune.models.marks import templated
from silotune.training.batches import by_length
from silotune.training.encode import Encoded, ids_of, render
from silotune.training.scores import answer_losses

EMBEDDED = "embedded"
_MOST_DOCUMENTS = 100_000
Turns = Sequence[tuple[str, str]]
"""A document as (role, content): one turn of role ``text`` for prose, else a conversation."""


def general_text(source: str) -> Iterator[Turns]:
    """Documents as (role, content); prose is one turn of role ``text``.

    Args:
        source: ``embedded``; a ``.txt`` file, whose blank lines separate the documents; or a file of rows with
            ``text``.

    Raises:
        DataError: The file is missing, broken or empty, or a row has no text.
    """
    if source == EMBEDDED:
        for made in itertools.islice(corpus.talk(seed=0), _MOST_DOCUMENTS):  # the same for every seed of a run
            yield tuple((turn["role"], turn["content"]) for turn in made)
        return
    for number, row in enumerate(read_rows(source), start=1):
        text = row.get("text")
        if not isinstance(text, str) or not text:
            raise DataError(f"{source}: row {number}: has no key 'text' with text in it")
        yield (("text", text),)


def as_text(document: Turns, adapted: Adapted) -> str:
    """A document as the model was pre-trained on it: prose as it is, a conversation by the chat template.

    Control marks that it spells are parted: they are text.
    """
    document = [(role, adapted.base.marks.as_text(content)) for role, content in document]
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
        ids.extend(ids_of(as_text(document, adapted), tokenizer))
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
