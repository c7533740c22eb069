"""Canaries: examples put in or left out by coins, and the smallest epsilon that telling them apart still allows.

Their beginnings are prompts of the client's own, their ends are what nobody would write there. What a model knows of
those that were in, beyond those that were not, it has learnt from single examples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from silotune.privacy.audit import guesses_right, lower_bound
from silotune.training.encode import Encoded

CONFIDENCE = 0.95
_LONGEST_END = 8


@dataclass(frozen=True)
class Audited:
    """What guessing the coins proves.

    Attributes:
        epsilon: Lower bound at 95 % confidence; 0 where nothing is proved.
        right: Guesses that were right, of those that prove most.
        guesses: Of so many.
        canaries: Coins that were thrown.
        most: The largest bound that so many canaries could prove, if every guess were right.
    """

    epsilon: float
    right: int
    guesses: int
    canaries: int
    most: float


def with_odd_end(example: Encoded, *, seed: int, vocabulary: Sequence[int], classes: int = 0) -> Encoded:
    """The example as a canary: another option than the right one, or an answer of ids drawn at random.

    Args:
        example: Of the client's own.
        seed: The canary's own.
        vocabulary: Ids to draw from.
        classes: Of a classifier, whose examples have no answer; 0 for a language model.
    """
    draw = random.Random(seed)  # noqa: S311
    if classes:
        return replace(example, label=draw.choice([place for place in range(classes) if place != example.label]))
    choices = [place for place in range(len(example.options)) if place != example.label]
    if example.label >= 0 and choices:
        label = draw.choice(choices)
        end = example.answer[len(example.options[example.label]) :]
        return replace(example, label=label, answer=(*example.options[label], *end), unsupervised=())
    length = min(len(example.answer), _LONGEST_END)
    drawn = tuple(draw.choice(vocabulary) for _ in range(max(1, length - 1)))
    return replace(example, answer=(*drawn, *example.answer[-1:]), unsupervised=())


def audited_epsilon(scores: Sequence[float], was_in: Sequence[bool], *, delta: float) -> Audited | None:
    """The one-run lower bound on epsilon (Steinke, Nasr and Jagielski 2023); None of fewer than two canaries.

    Several numbers of guesses are tried, fixed beforehand: all, a half, a quarter and an eighth of the canaries. The
    confidence is shared between them (Bonferroni), so that the best of them may be taken.
    """
    count = len(scores)
    if count < 2:
        return None
    tried = sorted({max(2, count // part) // 2 * 2 for part in (1, 2, 4, 8)})
    confidence = 1 - (1 - CONFIDENCE) / len(tried)
    found = []
    for guesses in tried:
        right = guesses_right(scores, was_in, guesses)
        found.append((lower_bound(right, guesses, count, delta=delta, confidence=confidence), right, guesses))
    most = max(lower_bound(guesses, guesses, count, delta=delta, confidence=confidence) for guesses in tried)
    epsilon, right, guesses = max(found)
    return Audited(epsilon, right, guesses, count, most)


def exposures(scores: Sequence[float], was_in: Sequence[bool]) -> list[float]:
    """Exposure of each canary that was in, in bits (Carlini et al. 2019): log2 |R| - log2 rank among those left out.

    The reference R is the canary itself and all that were left out; one that the model knows no better than those has
    one bit on average.
    """
    out = [score for score, is_in in zip(scores, was_in, strict=True) if not is_in]
    size = len(out) + 1
    return [
        math.log2(size) - math.log2(1 + sum(other >= score for other in out))
        for score, is_in in zip(scores, was_in, strict=True)
        if is_in
    ]
