"""Scores a model on examples: closed-ended ones by option likelihood or by generated text, open ones by perplexity,
pairs of answers by which one is likelier."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import torch

from silotune.errors import ConfigError, DataError, unknown_choice
from silotune.evaluation.generate import greedy_answers
from silotune.evaluation.metrics import UNPARSED, calibration, classification, language_modelling, preference
from silotune.models.adapters import Adapted
from silotune.training.batches import by_length
from silotune.training.encode import Encoded
from silotune.training.preference import reference_scores
from silotune.training.scores import answer_losses, option_scores

_Value = TypeVar("_Value")


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
        examples: What to score; all closed-ended, all open or all pairs of answers.
        labels: The options' names; empty for open answers.
        batch_size: Examples a forward pass.
        scoring: ``likelihood`` takes the option with the highest log-likelihood; ``generation`` generates greedily
            and looks for an exact option in the text.
        max_new_tokens: Of a generated answer.
        bootstrap_samples: Behind the 95 % intervals; 0 for none.

    Returns:
        What ``figures`` gives.

    Raises:
        DataError: There is nothing to score.
        ConfigError: The scoring is unknown.
    """
    answered = answers(
        adapted, examples, labels=labels, batch_size=batch_size, scoring=scoring, max_new_tokens=max_new_tokens
    )
    return figures(answered, bootstrap_samples=bootstrap_samples)


@dataclass(frozen=True)
class Answers:
    """What a model said to each example, in their order: enough for the figures of all of them or of some.

    Attributes:
        names: The options' names; empty for open answers.
        scoring: How the options were chosen; empty for open answers.
        labels: Index of each right option.
        options: Index of each predicted option, or ``UNPARSED``.
        confidences: Probability of each predicted option among the options; empty where there is none.
        losses: Negative log-likelihood of each open answer, in nats.
        tokens: Supervised tokens of each open answer.
        margins: Of each pair, by how much its preferred answer is likelier than the other, in nats.
        start_margins: The same of the model that training began with.
    """

    names: tuple[str, ...] = ()
    scoring: str = ""
    labels: tuple[int, ...] = ()
    options: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    start_margins: tuple[float, ...] = ()

    def __len__(self) -> int:
        return max(len(self.labels), len(self.losses), len(self.margins))

    def of(self, places: Sequence[int]) -> Answers:
        """The answers to some of the examples."""

        def chosen(values: tuple[_Value, ...]) -> tuple[_Value, ...]:
            return tuple(values[place] for place in places) if values else ()

        return Answers(
            self.names,
            self.scoring,
            chosen(self.labels),
            chosen(self.options),
            chosen(self.confidences),
            chosen(self.losses),
            chosen(self.tokens),
            chosen(self.margins),
            chosen(self.start_margins),
        )


def answers_together(parts: Sequence[Answers]) -> Answers:
    """The answers to several sets of examples of one kind, in this order; never none."""

    by_example = [each.name for each in fields(Answers) if each.name not in ("names", "scoring")]
    joined = {name: tuple(value for part in parts for value in getattr(part, name)) for name in by_example}
    return Answers(parts[0].names, parts[0].scoring, **joined)


def answers(
    adapted: Adapted,
    examples: Sequence[Encoded],
    *,
    labels: Sequence[str],
    batch_size: int,
    scoring: str = "likelihood",
    max_new_tokens: int = 16,
    start_margins: Sequence[float] = (),
) -> Answers:
    """One pass of the model over the examples; arguments and errors as for ``evaluate``.

    Of pairs a second one, by the model that training began with, unless its ``start_margins`` are known already.
    """
    if not examples:
        raise DataError("there are no examples to evaluate on")
    if not labels:
        if not examples[0].options:
            return _open_answers(adapted, examples, batch_size)
        if any(len(example.options) != 2 for example in examples):
            raise DataError(
                "answers that were judged one by one can be learnt from (training.objective = 'kto'), not scored on: "
                "give pairs as data.test and data.validation"
            )
        start = start_margins or _margins(adapted, examples, batch_size, reference_scores)
        return Answers(margins=_margins(adapted, examples, batch_size, option_scores), start_margins=tuple(start))
    if scoring not in SCORINGS:
        raise ConfigError(unknown_choice("scoring", scoring, SCORINGS))
    options, confidences = SCORINGS[scoring](adapted, examples, labels, batch_size, max_new_tokens)
    right = tuple(example.label for example in examples)
    return Answers(tuple(labels), scoring, right, tuple(options), tuple(confidences))


def figures(answered: Answers, *, bootstrap_samples: int = 0) -> dict[str, Any]:
    """``num_examples`` and the figures of answers, at least one.

    Closed-ended: those of ``metrics.classification``, and of ``metrics.calibration`` where confidences are known.
    Open: those of ``metrics.language_modelling``. Pairs: those of ``metrics.preference``.
    """
    if answered.margins:
        made = preference(answered.margins, answered.start_margins, bootstrap_samples=bootstrap_samples)
        return {"num_examples": len(answered), **made}
    if not answered.names:
        made = language_modelling(answered.losses, answered.tokens, bootstrap_samples=bootstrap_samples)
        return {"num_examples": len(answered), **made}
    made = classification(answered.options, answered.labels, answered.names, bootstrap_samples=bootstrap_samples)
    if answered.confidences:
        is_right = [option == label for option, label in zip(answered.options, answered.labels, strict=True)]
        made.update(calibration(answered.confidences, is_right))
    return {"num_examples": len(answered), "scoring": answered.scoring, **made}


def parse_option(text: str, labels: Sequence[str]) -> int:
    """Index of the option that an answer names, or ``UNPARSED``.

    The whole answer in lower case must be one option; failing that, the answer stripped of punctuation, or its first
    word. ``Positive.`` names positive; ``not positive`` names nothing. Options that differ in punctuation alone are
    told apart by the whole answer only.
    """
    exact = [label.strip().lower() for label in labels]
    if text.strip().lower() in exact:
        return exact.index(text.strip().lower())
    strip = string.whitespace + string.punctuation
    answer = text.strip(strip).lower()
    names = [label.strip(strip).lower() for label in labels]
    if not all(names) or len(set(names)) < len(names):
        return UNPARSED
    first = answer.split()[0].strip(strip) if answer.split() else ""
    for candidate in (answer, first):
        if candidate in names:
            return names.index(candidate)
    return UNPARSED


def _generated(
    adapted: Adapted, examples: Sequence[Encoded], labels: Sequence[str], batch_size: int, max_new_tokens: int
) -> tuple[list[int], list[float]]:
    texts = greedy_answers(adapted, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    decode = adapted.base.tokenizer.decode
    choices = ([str(decode(list(ids), skip_special_tokens=True)) for ids in example.options] for example in examples)
    return [parse_option(text, options) for text, options in zip(texts, choices, strict=True)], []


@torch.no_grad()
def _likeliest(
    adapted: Adapted, examples: Sequence[Encoded], labels: Sequence[str], batch_size: int, max_new_tokens: int
) -> tuple[list[int], list[float]]:
    predictions, confidences = [UNPARSED] * len(examples), [0.0] * len(examples)
    for places, batch in by_length(examples, batch_size):
        scores = option_scores(adapted, batch)
        best = scores.argmax(dim=1)  # of the scores: the softmax can make two of them equal
        shares = scores.softmax(dim=1).gather(1, best.unsqueeze(1)).squeeze(1)
        for place, option, confidence in zip(places, best.tolist(), shares.tolist(), strict=True):
            predictions[place], confidences[place] = option, confidence
    return predictions, confidences


_Scoring: TypeAlias = Callable[[Adapted, Sequence[Encoded], Sequence[str], int, int], tuple[list[int], list[float]]]
SCORINGS: Mapping[str, _Scoring] = {
    "likelihood": _likeliest,
    "generation": _generated,
}


@torch.no_grad()
def _open_answers(adapted: Adapted, examples: Sequence[Encoded], batch_size: int) -> Answers:
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    for places, batch in by_length(examples, batch_size):
        losses, owner = answer_losses(adapted, batch)
        totals = torch.zeros(len(batch), dtype=torch.float64, device=losses.device).index_add(0, owner, losses.double())
        for place, total, example in zip(places, totals.tolist(), batch, strict=True):
            sums[place], counts[place] = total, example.supervised
    return Answers(losses=tuple(sums), tokens=tuple(counts))


@torch.no_grad()
def _margins(
    adapted: Adapted,
    examples: Sequence[Encoded],
    batch_size: int,
    scores_of: Callable[[Adapted, Sequence[Encoded]], torch.Tensor],
) -> tuple[float, ...]:
    """By how much the preferred answer of each pair is likelier than the other."""
    margins = [0.0] * len(examples)
    for places, batch in by_length(examples, batch_size):
        scores = scores_of(adapted, batch)  # [pairs, 2]
        for place, margin in zip(places, (scores[:, 0] - scores[:, 1]).tolist(), strict=True):
            margins[place] = margin
    return tuple(margins)
