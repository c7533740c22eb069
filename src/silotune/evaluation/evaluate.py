"""Scores a model on examples: closed-ended ones by option likelihood or by generated text, open ones by perplexity."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from silotune.errors import ConfigError, DataError, unknown_choice
from silotune.evaluation.generate import greedy_answers
from silotune.evaluation.metrics import UNPARSED, classification, language_modelling
from silotune.models.adapters import Adapted
from silotune.training.batches import by_length
from silotune.training.encode import Encoded
from silotune.training.objectives import answer_losses, option_scores


def evaluate(
    adapted: Adapted,
    examples: Sequence[Encoded],
    *,
    labels: Sequence[str],
    batch_size: int,
    scoring: str = "likelihood",
    max_new_tokens: int = 16,
    bootstrap_samples: int = 0,
) -> dict[str, Any]:
    """Metrics of the model, with its adapter as it is now, on encoded examples.

    Args:
        adapted: The model.
        examples: What to score; all closed-ended or all open.
        labels: The options' names; empty for open answers.
        batch_size: Examples a forward pass.
        scoring: ``likelihood`` takes the option with the highest log-likelihood; ``generation`` generates greedily
            and looks for an exact option in the text.
        max_new_tokens: Of a generated answer.
        bootstrap_samples: Behind the 95 % intervals; 0 for none.

    Returns:
        ``num_examples`` and the figures of ``metrics.classification`` or ``metrics.language_modelling``.

    Raises:
        DataError: There is nothing to score.
        ConfigError: The scoring is unknown.
    """
    if not examples:
        raise DataError("there are no examples to evaluate on")
    if not labels:
        return {"num_examples": len(examples), **_perplexity(adapted, examples, batch_size)}
    if scoring not in SCORINGS:
        raise ConfigError(unknown_choice("scoring", scoring, SCORINGS))
    predictions = SCORINGS[scoring](adapted, examples, labels, batch_size, max_new_tokens)
    figures = classification(
        predictions, [example.label for example in examples], labels, bootstrap_samples=bootstrap_samples
    )
    return {"num_examples": len(examples), "scoring": scoring, **figures}


def parse_option(text: str, labels: Sequence[str]) -> int:
    """Index of the option that an answer names, or ``UNPARSED``.

    The whole answer, stripped of space and punctuation and in lower case, must be one option; failing that, its
    first word must be. ``Positive.`` names positive; ``not positive`` names nothing.
    """
    strip = string.whitespace + string.punctuation
    answer = text.strip(strip).lower()
    names = [label.strip(strip).lower() for label in labels]
    first = answer.split()[0].strip(strip) if answer.split() else ""
    for candidate in (answer, first):
        if candidate in names:
            return names.index(candidate)
    return UNPARSED


def _generated(
    adapted: Adapted, examples: Sequence[Encoded], labels: Sequence[str], batch_size: int, max_new_tokens: int
) -> list[int]:
    texts = greedy_answers(adapted, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    decode = adapted.base.tokenizer.decode
    choices = ([str(decode(list(ids), skip_special_tokens=True)) for ids in example.options] for example in examples)
    return [parse_option(text, options) for text, options in zip(texts, choices, strict=True)]


@torch.no_grad()
def _likeliest(
    adapted: Adapted, examples: Sequence[Encoded], labels: Sequence[str], batch_size: int, max_new_tokens: int
) -> list[int]:
    predictions = [UNPARSED] * len(examples)
    for places, batch in by_length(examples, batch_size):
        best = option_scores(adapted, batch).argmax(dim=1).tolist()
        for place, option in zip(places, best, strict=True):
            predictions[place] = option
    return predictions


SCORINGS: Mapping[str, Callable[[Adapted, Sequence[Encoded], Sequence[str], int, int], list[int]]] = {
    "likelihood": _likeliest,
    "generation": _generated,
}


@torch.no_grad()
def _perplexity(adapted: Adapted, examples: Sequence[Encoded], batch_size: int) -> dict[str, Any]:
    total, count = 0.0, 0
    for _, batch in by_length(examples, batch_size):
        losses, _ = answer_losses(adapted, batch)
        total, count = total + float(losses.double().sum()), count + losses.numel()
    return language_modelling(total, count)
