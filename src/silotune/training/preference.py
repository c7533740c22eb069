"""Preference objectives: which of two answers a model should rather give, and which answers are wanted at all.

Both compare the model with a reference, which is the model that training began with: the base, or the model of
``adapter.start``. There is no second model in memory; the adapter takes its first values for one pass without gradient.

DPO: Rafailov et al., "Direct Preference Optimization", 2023. Label smoothing: Mitchell, "A note on DPO with noisy
preferences", 2023. Robust: Chowdhury et al., "Provably Robust DPO", 2024. IPO: Azar et al., "A General Theoretical
Paradigm to Understand Learning from Human Preferences", 2023. KTO: Ethayarajh et al., "KTO: Model Alignment as Prospect
Theoretic Optimization", 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from silotune.errors import DataError
from silotune.models.adapters import Adapted, at_start
from silotune.settings.objectives import Dpo, Kto
from silotune.training.encode import Encoded
from silotune.training.losses import Loss
from silotune.training.scores import option_scores

PairLoss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Dpo], torch.Tensor]
"""``loss(ratios, lengths, settings)``: from log-ratios [pairs, 2] (preferred answer first) and the answers' ids
[pairs, 2] to a loss a pair [pairs]."""


def log_ratios(adapted: Adapted, examples: Sequence[Encoded]) -> torch.Tensor:
    """log p(answer | prompt) - log p_reference(answer | prompt) of each option [examples, options].

    Raises:
        DataError: The examples do not have equally many options.
        ModelError: All weights are trained, so that there is no reference.
    """
    reference = reference_scores(adapted, examples)  # first, as it overwrites the adapter
    return option_scores(adapted, examples) - reference


@torch.no_grad()
def reference_scores(adapted: Adapted, examples: Sequence[Encoded]) -> torch.Tensor:
    """log p_reference of each option [examples, options], without dropout; the adapter is as before afterwards."""
    with at_start(adapted):
        return option_scores(adapted, examples)


def dpo_loss(adapted: Adapted, examples: Sequence[Encoded], settings: Dpo) -> Loss:
    """One term a pair, by ``preference_loss``."""
    losses = pair_losses(adapted, examples, settings)
    return Loss(losses.sum(), len(examples))


def pair_losses(adapted: Adapted, examples: Sequence[Encoded], settings: Dpo) -> torch.Tensor:
    """Loss of each pair [pairs], a function of that pair alone."""
    ratios = log_ratios(adapted, examples)
    lengths = torch.tensor([[len(option) for option in example.options] for example in examples], device=ratios.device)
    order = torch.tensor([(example.label, 1 - example.label) for example in examples], device=ratios.device)
    return PAIR_LOSSES[settings.preference_loss](ratios.gather(1, order), lengths.gather(1, order), settings)


def _sigmoid(ratios: torch.Tensor, lengths: torch.Tensor, settings: Dpo) -> torch.Tensor:
    """-(1 - e) log s(b d) - e log s(-b d), d the difference of the log-ratios (DPO, equation 7; Mitchell 2023)."""
    margin = settings.beta * (ratios[:, 0] - ratios[:, 1])
    log_sigmoid = torch.nn.functional.logsigmoid
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def _robust(ratios: torch.Tensor, lengths: torch.Tensor, settings: Dpo) -> torch.Tensor:
    """(-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e): unbiased where a share e of the pairs is the wrong way round
    (Chowdhury et al. 2024, equation 12)."""
    margin = settings.beta * (ratios[:, 0] - ratios[:, 1])
    log_sigmoid = torch.nn.functional.logsigmoid
    smoothing = settings.label_smoothing
    return (-(1 - smoothing) * log_sigmoid(margin) + smoothing * log_sigmoid(-margin)) / (1 - 2 * smoothing)


def _ipo(ratios: torch.Tensor, lengths: torch.Tensor, settings: Dpo) -> torch.Tensor:
    """(d - 1 / (2 b))², d the difference of the log-ratios a token (Azar et al. 2023, equation 17).

    A token, not an answer: the authors' own results are of this form, as trl's notes say.
    """
    per_token = ratios / lengths
    return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * settings.beta)).square()


PAIR_LOSSES: Mapping[str, PairLoss] = {"sigmoid": _sigmoid, "robust": _robust, "ipo": _ipo}


def kto_loss(adapted: Adapted, examples: Sequence[Encoded], settings: Kto) -> Loss:
    """One term an answer: w (1 - s(b (r - z))) if it is wanted, w (1 - s(b (z - r))) if not (KTO, equations 7 and 8).

    Of an example's options, the one that its label names is wanted; a label of -1 says that none is.
    r is an answer's log-ratio. z estimates how far the model has moved from the reference: the mean log-ratio, at least
    0, of the answers of the example before each one, to the wrong prompt. No gradient flows through it; a batch of one
    example has none, and takes 0.
    """
    own = len(examples[0].options)
    lines = _with_answers_of_others(examples, adapted.base.context_length) if len(examples) > 1 else examples
    ratios = log_ratios(adapted, lines)  # [examples, own + others']
    moved = ratios[:, own:].detach().mean().clamp(min=0) if len(examples) > 1 else torch.zeros((), device=ratios.device)
    labels = torch.tensor([example.label for example in examples], device=ratios.device)
    is_wanted = torch.arange(own, device=ratios.device) == labels.unsqueeze(1)  # [examples, own]
    sign = torch.where(is_wanted, settings.beta, -settings.beta)
    weight = torch.where(is_wanted, settings.desirable_weight, settings.undesirable_weight)
    losses = weight * (1 - torch.sigmoid(sign * (ratios[:, :own] - moved)))
    return Loss(losses.sum(), losses.numel())


def _with_answers_of_others(examples: Sequence[Encoded], context: int | None) -> list[Encoded]:
    """Each example with the answers of the one before it, cut to what the context leaves beside its own prompt."""
    others = [*examples[-1:], *examples[:-1]]
    return [
        replace(
            example,
            options=(
                *example.options,
                *(option if context is None else option[: context - len(example.prompt)] for option in other.options),
            ),
        )
        for example, other in zip(examples, others, strict=True)
    ]


def check_pairs(examples: Sequence[Encoded]) -> None:
    """Raises ``DataError`` unless every example is a pair of answers whose label says which is preferred."""
    if any(len(example.options) != 2 or example.label not in (0, 1) for example in examples):
        raise DataError("training.objective = 'dpo' needs pairs: a preferred and a rejected answer to each prompt")
