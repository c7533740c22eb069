"""DP-SGD in the one loop: gradients by example against one at a time, and noise 0 against plain training."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

import tiny
from silotune.methods.corrections import proximal
from silotune.models import adapters
from silotune.privacy.audit import guesses_right, lower_bound
from silotune.sections import BY_EXAMPLE
from silotune.training.examplewise import LOSSES, _one_by_one, clipped_sum, gradients, linear_places, norms
from silotune.training.local import RoundPlace, train_round
from silotune.training.objectives import OBJECTIVES
from silotune.training.private import DpSgd, poisson_groups, private_gradient

EXAMPLES = tiny.encoded(tiny.closed())
ALIKE = [example for example in tiny.encoded(tiny.closed(24)) if len(example.answer) == len(EXAMPLES[0].answer)]
PLAIN = DpSgd(noise_multiplier=0.0, clip_norm=math.inf)


def seeded(seed: int = 0):
    """Bytes that a test can repeat."""
    return random.Random(seed).randbytes


def test_the_table_is_that_of_the_sections() -> None:
    assert tuple(LOSSES) == BY_EXAMPLE
    assert set(LOSSES) <= set(OBJECTIVES)


@pytest.fixture(scope="module")
def stirred():  # noqa: ANN201
    """An adapter as after training: with B at zero, A would have no gradient."""
    return tiny.adapted(stirred=True)


def of_objective(model, objective: str):
    if objective != "classify":
        return model, EXAMPLES
    made = tiny.classifier() if hasattr(tiny, "classifier") else None
    return made


@pytest.mark.parametrize("objective", ["sft", "choice"])
def test_norms_are_those_of_batches_of_one(stirred, objective: str) -> None:
    by_example, each = gradients(stirred, EXAMPLES, LOSSES[objective])
    for place, example in enumerate(EXAMPLES):
        loss = OBJECTIVES[objective].loss(stirred, [example])
        alone = tiny.gradients(stirred, loss.total / loss.count)
        tiny.assert_close({name: tensor[place] for name, tensor in by_example.items()}, alone, 1e-5)
        assert float(norms(by_example)[place]) == pytest.approx(
            math.sqrt(sum(float(tensor.square().sum()) for tensor in alone.values())), rel=1e-4
        )
        assert float(each[place]) == pytest.approx(float(loss.total.detach()) / loss.count, rel=1e-5)
    assert all(parameter.grad is None for parameter in stirred.parameters.values())
