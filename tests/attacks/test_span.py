"""What updates of plain gradient steps give away: the attack that a run with plain SGD warns of, and its rule.

For y = W x the rows of the gradient of W, and of LoRA's first factor, lie in the span of the inputs x. Those of the
first block are the normed embeddings of the tokens, which everybody knows (DAGER, Petrov et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import tiny
from silotune import tensors as arithmetic
from silotune.evaluation.leakage import span
from silotune.experiment.exposure import Exposed, exposed_by
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace, train_round

RANK, WIDTH = 4, 32
TEXTS = ((270, 281, 292, 303), (281, 305, 40), (270, 66, 307))
"""Of three institutions: eight distinct tokens, and the last one of each carries no loss."""


@pytest.fixture(scope="module")
def model() -> Adapted:
    return tiny.adapted(rank=RANK, alpha=8, targets=["q_proj", "k_proj", "v_proj"])


def update(model: Adapted, start: Tensors, text: Sequence[int], *, optimizer: str, number: int = 1) -> Tensors:
    """What an institution sends after two local steps on one text."""
    example = Encoded(tuple(text[:1]), tuple(text[1:]))
    settings = tiny.training(optimizer=optimizer, learning_rate=0.01, objective="sft", batch_size=1)
    place = RoundPlace(1, number, 3)
    return train_round(model, start, [example], settings=settings, place=place).delta


def found(model: Adapted, updates: Sequence[Tensors]) -> set[int]:
    """Tokens that the audit's own attack names."""
    made = span.attack(model, updates)
    assert made is not None
    return set(made.tokens)


def summed(model: Adapted, start: Tensors, *, optimizer: str, number: int = 1) -> Tensors:
    """All that a secure sum gives to the coordinator."""
    each = [update(model, start, text, optimizer=optimizer, number=number) for text in TEXTS]
    return arithmetic.add(arithmetic.add(each[0], each[1]), each[2])


def with_loss() -> set[int]:
    return {token for text in TEXTS for token in text[:-1]}


def test_a_secure_sum_gives_back_every_token_of_plain_steps(model: Adapted) -> None:
    start = adapters.read(model)
    exposed = exposed_by(start)
    assert exposed == Exposed((RANK, RANK, RANK), WIDTH) and len(with_loss()) < exposed.tokens(1)
    assert found(model, [summed(model, start, optimizer="sgd")]) == with_loss()  # all of them, and no other
    assert not found(model, [summed(model, start, optimizer="adamw")])  # which is no proof that nothing is left


def test_rounds_add_up_until_the_rule_is_met() -> None:
    """Rank 2 on queries alone: one round has too few directions, three have enough.

    A text's first token looks at nothing but itself, so its query gets no gradient.
    """
    model = tiny.adapted(rank=2, alpha=4, targets=["q_proj"])
    start, sums = adapters.read(model), []
    asked = {token for text in TEXTS for token in text[1:-1]}
    exposed = exposed_by(start)
    assert exposed.tokens(1) < len(asked) < exposed.tokens(3)
    for number in (1, 2, 3):
        sums.append(summed(model, start, optimizer="sgd", number=number))
        start = arithmetic.add_scaled(start, sums[-1], 1 / len(TEXTS))
    assert found(model, sums[:1]) == set() and found(model, sums) == asked


def test_noise_stops_this_attack(model: Adapted) -> None:
    """A tenth of the update's norm, far less than a guarantee takes; other attacks may do better."""
    total = summed(model, adapters.read(model), optimizer="sgd")
    assert not found(model, [tiny.stir(total, size=0.1 * arithmetic.norm(total) / arithmetic.count(total) ** 0.5)])
