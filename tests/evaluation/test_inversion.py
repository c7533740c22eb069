"""What is read off what crosses the cut: known answers, and that a test without anything to read says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from silotune.evaluation import inversion
from silotune.evaluation.inversion import Inverted, lines_of
from silotune.models.adapters import Adapted, attach, on
from silotune.settings.split import SplitSection
from silotune.training.encode import Encoded


@pytest.fixture(scope="module")
def deep() -> Adapted:
    import transformers

    sizes = {**tiny.configuration("llama").to_dict(), "num_hidden_layers": 4, "initializer_range": 0.05}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(sizes))
    made.requires_grad_(False)
    base = replace(tiny.base("llama"), model=made.eval())
    return on(attach(base, tiny.adapter(targets="all-linear"), seed=0), tiny.USUAL.only("head"))


def found(adapted: Adapted, examples: Sequence[Encoded], **section: Any) -> Inverted:
    training = tiny.training(objective="choice" if examples[0].options else "sft")
    return inversion.tested(adapted, SplitSection(**section), examples, training)


@pytest.fixture(scope="module")
def made(deep: Adapted) -> Inverted:
    before, state = dict(deep.model.state_dict()), torch.get_rng_state()
    tests = found(deep, tiny.examples_for("choice", 24))
    tiny.assert_same_bits(before, dict(deep.model.state_dict()))  # the model and the generators are as they were
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in deep.parameters.values())
    return tests


def test_states_that_are_nearly_the_embedding_are_read_and_noise_that_stops_it_stops_training(made: Inverted) -> None:
    by_noise = {row["noise"]: row["probe"] for row in made.cuts if row["first"] == 1}
    assert by_noise[0.0] > 0.93 > 0.6 > by_noise[2.0]
    assert {row["first"] for row in made.cuts} == {1, 2}
    prices = [row["cosine"] for row in made.prices]
    assert prices[0] > 0.999 and prices[-1] < 0.8
    assert 0 <= made.labels["probe"] <= 1 and made.labels["examples"] == 12


def test_the_statement_says_the_share_that_was_read(made: Inverted) -> None:
    told = made.as_json(SplitSection())
    said = lines_of(told)
    assert said[0].startswith("split training moves compute, not trust") and "compress = 'int8'" in said[0]
    assert f"{told['cuts'][0]['probe']:.1%} of {told['tokens']} tokens" in said[0]
    assert f"read {told['labels']['probe']:.1%} of the labels of 12 examples" in said[1]


def test_open_answers_have_no_labels_to_read(deep: Adapted) -> None:
    tests = found(deep, tiny.examples_for("sft", 12))
    assert tests.labels == {} and len(lines_of(tests.as_json(SplitSection()))) == 1
