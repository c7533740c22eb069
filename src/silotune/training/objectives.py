"""What a local round minimises, as values: a way to build batches and a loss over them.

``sft``: cross-entropy of the answers and their ends; ``pretrain``: of plain text. ``choice``: cross-entropy over a
closed set of options, each scored by the log-likelihood of its tokens given the prompt. ``classify``: cross-entropy
over the classes of a head that is trained with the adapter. ``dpo`` and ``kto``: see ``training.preference``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from silotune.errors import DataError
from silotune.models.adapters import Adapted
from silotune.models.load import Base
from silotune.settings.objectives import (
    Classify,
    ClosedSettings,
    Dpo,
    Kto,
    LanguageSettings,
    ObjectiveSettings,
    Pretrain,
    Sft,
    SoftmaxOverOptions,
)
from silotune.settings.registry import implemented
from silotune.settings.sections import TrainingSection, Truncate
from silotune.structs import Example
from silotune.training.encode import Encoded
from silotune.training.encoder import ClassEncoder, Encoder
from silotune.training.losses import Loss, LossFunction
from silotune.training.preference import check_pairs, dpo_loss, kto_loss
from silotune.training.scores import answer_losses, class_logits, closed_examples, option_scores


@dataclass(frozen=True)
class Objective:
    """``loss(adapted, examples, settings)`` for one batch of examples; ``check`` refuses examples it cannot use."""

    loss: LossFunction
    check: Callable[[Sequence[Encoded]], None]


class Encode(Protocol):
    """``encode(examples)`` gives examples as ids in their order; ``first`` is the number of the first, for errors."""

    def __call__(self, examples: Iterable[Example], *, first: int = 1) -> list[Encoded]: ...


def encoder_of(base: Base, objective: ObjectiveSettings, *, max_length: int, truncate: Truncate = "left") -> Encode:
    """The encoder that turns examples into ids for this model: a classifier's examples have no answer."""
    if base.labels:
        wording = objective.wording if isinstance(objective, Classify) else "auto"
        return ClassEncoder(base, max_length=max_length, wording=wording, truncate=truncate)
    turns = objective.turns if isinstance(objective, Sft) else "all"
    return Encoder(base.tokenizer, max_length=max_length, turns=turns, truncate=truncate)


def _sft_loss(adapted: Adapted, examples: Sequence[Encoded], settings: LanguageSettings) -> Loss:
    losses, _ = answer_losses(adapted, examples, packed=settings.packs)
    return Loss(losses.sum(), losses.numel())


def adjusted(examples: Sequence[Encoded], settings: ObjectiveSettings, *, classes: int) -> Sequence[Encoded]:
    """A client's examples with what its own shares of the answers add to their scores in training.

    Menon et al. 2021 (Long-tail learning via logit adjustment), equation 10, with one example of each answer more than
    there are, so that an answer that a client has none of keeps a finite score; for clients, FedLC (Zhang et al. 2022).

    Args:
        examples: The client's.
        settings: Of the objective.
        classes: Number of the classes of a head; 0 where each example has its options.
    """
    strength = settings.logit_adjustment if isinstance(settings, ClosedSettings) else 0.0
    if not strength:
        return examples
    counts = Counter(example.label for example in examples)
    number = classes or len(examples[0].options)
    shares = [(counts[label] + 1) / (len(examples) + number) for label in range(number)]
    added = tuple(strength * math.log(share) for share in shares)
    return [replace(example, adjustment=added) for example in examples]


def _choice_loss(adapted: Adapted, examples: Sequence[Encoded], settings: ObjectiveSettings) -> Loss:
    return _closed_loss(option_scores(adapted, examples), examples)


def _class_loss(adapted: Adapted, examples: Sequence[Encoded], settings: ObjectiveSettings) -> Loss:
    return _closed_loss(class_logits(adapted, examples), examples)


def _closed_loss(scores: torch.Tensor, examples: Sequence[Encoded]) -> Loss:
    labels = torch.tensor([example.label for example in examples], device=scores.device)
    if examples[0].adjustment:
        scores = scores + torch.tensor(examples[0].adjustment, device=scores.device)
    return Loss(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"), len(examples))


def _labelled_examples(examples: Sequence[Encoded]) -> None:
    if any(example.label < 0 or example.answer for example in examples):
        raise DataError("a classifier trains on examples with a class and without an answer's tokens")


def _any_examples(examples: Sequence[Encoded]) -> None:
    if not all(example.answer for example in examples):
        raise DataError("an example has no supervised token")
    if any(len(example.options) == 1 and example.label < 0 for example in examples):
        raise DataError("an answer that is not wanted is not to be learnt: use training.objective = 'kto'")


OBJECTIVES: Mapping[type[ObjectiveSettings], Objective] = {
    Sft: Objective(_sft_loss, _any_examples),
    SoftmaxOverOptions: Objective(_choice_loss, closed_examples),
    Classify: Objective(_class_loss, _labelled_examples),
    Dpo: Objective(dpo_loss, check_pairs),
    Kto: Objective(kto_loss, closed_examples),
    Pretrain: Objective(_sft_loss, _any_examples),
}
"""Settings -> the objective that they are of."""


def objective_of(settings: TrainingSection) -> Objective:
    """The objective that a ``[training]`` section names."""
    return implemented(OBJECTIVES, settings.objective)
