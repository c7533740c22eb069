"""Whether a model was trained on an example: scores of membership, and what they are worth over many examples.

Every score is higher for an example that was more likely trained on. Members and non-members must come from one split,
or the figures measure the difference of the splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.settings.sections import TrainingSection
from silotune.structs import Tensors
from silotune.training.batches import answer_batch, by_length
from silotune.training.encode import Encoded
from silotune.training.examplewise import losses_of
from silotune.training.scores import logits_at

LEAST_EACH = 20
"""Fewer members or non-members than this give an interval that says nothing: then there is no figure."""
_LOW_RATE = 0.01
_SAMPLES = 1000
_LOWEST_SHARE = 0.2
"""Of an example's tokens, those that Min-K%++ looks at (Zhang et al. 2024)."""


@dataclass(frozen=True)
class Advantage:
    """What a score of membership is worth.

    Attributes:
        auc: Chance that a member scores above a non-member; 1/2 says nothing.
        auc_interval: 95 %, by resampling members and non-members apart.
        tpr: Share of members found where one in a hundred non-members is taken for one.
        tpr_interval: 95 %, in the same way.
        members: How many were scored.
        others: How many non-members.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    members: int
    others: int

    @property
    def advantage(self) -> float:
        """2 AUC - 1: 0 says nothing, 1 tells every member."""
        return 2 * self.auc - 1

    @property
    def largest_advantage(self) -> float:
        """The same at the upper end of the interval, which a bound has to hold for."""
        return 2 * self.auc_interval[1] - 1


def advantage(members: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Advantage | None:
    """Area under the curve and true positives at 1 % false ones, with bootstrap intervals; None of too few examples."""
    inside, outside = np.asarray(members, dtype=float), np.asarray(others, dtype=float)
    if min(len(inside), len(outside)) < LEAST_EACH:
        return None
    draw = np.random.default_rng(seed)
    areas, rates = np.empty(_SAMPLES), np.empty(_SAMPLES)
    for place in range(_SAMPLES):
        one, two = draw.choice(inside, len(inside)), draw.choice(outside, len(outside))
        areas[place], rates[place] = auc(one, two), _true_positives(one, two)
    low, high = (np.percentile(areas, share) for share in (2.5, 97.5))
    least, most = (np.percentile(rates, share) for share in (2.5, 97.5))
    return Advantage(
        auc(inside, outside),
        (float(low), float(high)),
        _true_positives(inside, outside),
        (float(least), float(most)),
        len(inside),
        len(outside),
    )


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Chance that a member scores above a non-member; a tie counts a half (Mann and Whitney 1947)."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    up_to = np.searchsorted(ordered, members, side="right")
    return float((below + up_to).sum() / (2 * len(members) * len(others)))


def _true_positives(members: np.ndarray, others: np.ndarray) -> float:
    """Share of members above the smallest threshold that at most one in a hundred non-members is above."""
    allowed = int(_LOW_RATE * len(others))
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def losses(
    adapted: Adapted, weights: Tensors, examples: Sequence[Encoded], *, training: TrainingSection, batch_size: int
) -> list[float]:
    """The loss of every example under the run's own objective, at these adapter tensors."""
    adapters.write(adapted, weights)
    of_each, found = losses_of(training), [0.0] * len(examples)
    with torch.no_grad():
        for places, batch in by_length(examples, batch_size):
            for place, loss in zip(places, of_each(adapted, batch).tolist(), strict=True):
                found[place] = float(loss)
    return found


def min_k(adapted: Adapted, weights: Tensors, examples: Sequence[Encoded], *, batch_size: int) -> list[float]:
    """Min-K%++ of every example's answer (Zhang et al. 2024): mean of the lowest fifth of (log p - mu) / sigma.

    mu and sigma are of log p under the model's own distribution at the token's place.
    """
    adapters.write(adapted, weights)
    base, found = adapted.base, [0.0] * len(examples)
    with torch.no_grad():
        for places, batch in by_length(examples, batch_size):
            made = answer_batch(batch, pad_id=base.pad_id, device=base.device)
            scores = torch.log_softmax(logits_at(adapted, made.batch), dim=-1)  # [needed, vocabulary]
            chances = scores.exp()
            mean = (chances * scores).sum(dim=-1)
            spread = ((chances * scores.square()).sum(dim=-1) - mean.square()).clamp(min=1e-12).sqrt()
            own = scores.gather(1, made.targets[:, None])[:, 0]
            by_token = ((own - mean) / spread).tolist()
            owner = made.owner.tolist()
            for row, place in enumerate(places):
                tokens = sorted(value for value, who in zip(by_token, owner, strict=True) if who == row)
                lowest = tokens[: max(1, round(_LOWEST_SHARE * len(tokens)))]
                found[place] = sum(lowest) / len(lowest) if lowest else 0.0
    return found


def log_odds(values: Sequence[float]) -> np.ndarray:
    """log(p / (1 - p)) of p = exp(-loss), which is close to normal over models (Carlini et al. 2022)."""
    chances = np.clip(np.exp(-np.asarray(values, dtype=float)), 1e-9, 1 - 1e-9)
    return np.asarray(np.log(chances) - np.log1p(-chances))


def likelihood_ratio(target: Sequence[float], shadows: Sequence[Sequence[float]], was_in: np.ndarray) -> list[float]:
    """LiRA (Carlini et al. 2022) from losses, with one spread for all examples, as few shadows cannot tell them apart.

    Args:
        target: Loss of every example under the model that is attacked.
        shadows: The same under each shadow model.
        was_in: [shadows, examples]: whether the shadow model was trained on the example; each example is in some
            shadow model and not in another.

    Returns:
        log N(phi; mean in, spread in) - log N(phi; mean out, spread out) for each example.
    """
    phi, under = log_odds(target), np.stack([log_odds(each) for each in shadows])
    mean_in = np.where(was_in, under, 0).sum(axis=0) / was_in.sum(axis=0)
    mean_out = np.where(was_in, 0, under).sum(axis=0) / (~was_in).sum(axis=0)
    spread_in = max(float(np.std(np.where(was_in, under - mean_in, 0)[was_in])), 1e-3)
    spread_out = max(float(np.std(np.where(was_in, 0, under - mean_out)[~was_in])), 1e-3)
    shared = math.sqrt((spread_in**2 + spread_out**2) / 2)
    return list(((phi - mean_out) ** 2 - (phi - mean_in) ** 2) / (2 * shared**2))


def balanced_halves(examples: int, shadows: int, *, seed: int) -> np.ndarray:
    """Which shadow model is trained on which example [shadows, examples]: pairs of halves that complete each other."""
    draw = np.random.default_rng(seed)
    halves = []
    for _ in range(shadows // 2):
        chosen = np.zeros(examples, dtype=bool)
        chosen[draw.permutation(examples)[: examples // 2]] = True
        halves += [chosen, ~chosen]
    return np.stack(halves)


Scored = Mapping[str, Sequence[float]]
Score = Callable[[Scored], list[float]]
SCORES: Mapping[str, Score] = {
    "loss": lambda scored: [-value for value in scored["loss"]],
    "ratio": lambda scored: [base - tuned for base, tuned in zip(scored["base"], scored["loss"], strict=True)],
    "min-k": lambda scored: list(scored["min-k"]),
    "lira": lambda scored: list(scored["lira"]),
}
"""Name of a score -> what makes it of an example's figures: the loss, the gain over the base, Min-K%++, LiRA."""


def words_alone(members: Sequence[Encoded], others: Sequence[Encoded], *, seed: int = 0) -> Advantage | None:
    """What a classifier of words alone, which never saw the model, tells members by: it should be nothing.

    Naive Bayes over token ids, fitted on half of the examples and asked about the other half. Where it does better than
    guessing, members and non-members differ by themselves, and figures of membership are too high.
    """
    draw = np.random.default_rng(seed)
    parts = [draw.permutation(len(group)) for group in (members, others)]
    counts: list[dict[int, int]] = [{}, {}]
    for group, order, count in zip((members, others), parts, counts, strict=True):
        for place in order[: len(order) // 2]:
            for token in (*group[place].prompt, *group[place].answer):
                count[token] = count.get(token, 0) + 1
    totals = [sum(count.values()) + len({*counts[0], *counts[1]}) + 1 for count in counts]

    def score(example: Encoded) -> float:
        tokens = (*example.prompt, *example.answer)
        logs = [
            math.log((counts[0].get(token, 0) + 1) / totals[0]) - math.log((counts[1].get(token, 0) + 1) / totals[1])
            for token in tokens
        ]
        return sum(logs) / max(1, len(logs))

    scored = [
        [score(group[place]) for place in order[len(order) // 2 :]]
        for group, order in zip((members, others), parts, strict=True)
    ]
    return advantage(scored[0], scored[1], seed=seed)
