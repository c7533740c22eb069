"""Each fast path against the slow one: full logits, no padding, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import tiny
from silotune.errors import DataError
from silotune.settings.objectives import Classify, Sft, SoftmaxOverOptions
from silotune.training.batches import answer_batch, shared_prefix
from silotune.training.encode import Encoded
from silotune.training.objectives import OBJECTIVES, adjusted
from silotune.training.scores import answer_losses, can_shorten, logits_at, option_scores, sees_branches

EVERY = (*tiny.ARCHITECTURES, *tiny.WINDOWED)
WORDINGS = {
    "one id each": ((50,), (51,), (52,)),
    "several ids": ((50, 60), (51, 61, 62), (52, 63, 64, 65)),
    "one and several": ((50,), (51, 61, 62), (51, 63)),
}


def sequence(length: int, start: int) -> tuple[int, ...]:
    return tuple(10 + (start * 7 + place * 13) % 290 for place in range(length))


def batch_of(options: tuple[tuple[int, ...], ...]) -> list[Encoded]:
    return [
        Encoded(sequence(length, number), (*options[number % 3], 2), options, number % 3)
        for number, length in enumerate((11, 3, 6, 1))
    ]


def open_batch() -> list[Encoded]:
    return [Encoded(sequence(length, length), (*sequence(answer, 5), 2)) for length, answer in ((9, 3), (2, 6), (5, 1))]


@pytest.fixture(scope="module", params=EVERY)
def model(request: pytest.FixtureRequest):
    return tiny.adapted(request.param, targets="all-linear")


def test_logits_at_is_a_slice_of_all_logits(model) -> None:
    made = answer_batch(open_batch(), pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        full = model.model(input_ids=made.batch.ids, use_cache=False).logits.float()
        fast = logits_at(model, made.batch)
    assert fast.shape == (len(made.targets), 320)
    torch.testing.assert_close(fast, full.reshape(-1, 320)[made.batch.positions], rtol=1e-5, atol=1e-5)


def test_answer_losses_and_gradients_equal_the_slow_path(model) -> None:
    examples = open_batch()
    slow = torch.cat([-tiny.log_probabilities(model, example.prompt, example.answer) for example in examples])
    expected = tiny.gradients(model, slow.mean())
    fast, owner = answer_losses(model, examples)
    assert owner.tolist() == [row for row, example in enumerate(examples) for _ in example.answer]
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, fast.mean()), expected, 1e-5)
    assert any(bool(value.abs().max() > 1e-3) for value in expected.values())


def slow_scores(model, examples: list[Encoded]) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack([tiny.log_probabilities(model, example.prompt, option).sum() for option in example.options])
            for example in examples
        ]
    )


def compare_options(
    model, options: tuple[tuple[int, ...], ...], prepare: Callable[[list[Encoded]], list[Encoded]] = list
) -> None:
    examples = prepare(batch_of(options))
    labels = torch.tensor([example.label for example in examples])
    slow = slow_scores(model, examples)
    expected = tiny.gradients(model, torch.nn.functional.cross_entropy(slow, labels))
    fast = option_scores(model, examples)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-5)
    tiny.assert_close(tiny.gradients(model, torch.nn.functional.cross_entropy(fast, labels)), expected, 1e-5)


@pytest.mark.parametrize("wording", WORDINGS)
def test_option_scores_equal_each_option_in_its_own_pass(model, wording: str) -> None:
    compare_options(model, WORDINGS[wording])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_option_scores_with_eager_attention(name: str) -> None:
    model = tiny.adapted(name, attention="eager", targets="all-linear")
    assert model.base.model.config._attn_implementation == "eager"
    compare_options(model, WORDINGS["one and several"])


def test_a_model_without_position_ids_scores_options_too() -> None:
    model = tiny.adapted("bloom", targets="all-linear")
    assert not sees_branches(model.base.model, 4)
    compare_options(model, WORDINGS["one and several"])


def test_options_may_be_worded_differently_in_one_batch() -> None:
    model = tiny.adapted()
    examples = [
        Encoded(sequence(4, 1), (50, 2), ((50,), (51,)), 0),
        Encoded(sequence(9, 2), (60, 61, 2), ((60, 61), (62, 63, 64, 65)), 1),
    ]
    torch.testing.assert_close(option_scores(model, examples), slow_scores(model, examples), rtol=1e-5, atol=1e-5)


INSTRUCTION = sequence(9, 3)


def instructed(examples: list[Encoded]) -> list[Encoded]:
    """The examples behind an instruction that they share."""
    return [replace(example, prompt=(*INSTRUCTION, *example.prompt)) for example in examples]


def passes(model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the inputs that go through the model from now on."""
    seen: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **inputs: seen.append(inputs["input_ids"].numel()) or forward(**inputs)
    )
    return seen


def test_a_shared_instruction_changes_no_answer_loss_and_no_gradient(model, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = instructed(open_batch())
    slow = torch.cat([-tiny.log_probabilities(model, example.prompt, example.answer) for example in examples])
    expected = tiny.gradients(model, slow.mean())
    seen = passes(model, monkeypatch)
    fast, _ = answer_losses(model, examples)
    once = [len(INSTRUCTION), 3 * 12]
    assert seen == (once if can_shorten(model, 22) else [3 * 21])
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, fast.mean()), expected, 1e-5)


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_shared_instruction_changes_no_option_score(model, wording: str) -> None:
    assert shared_prefix(instructed(batch_of(WORDINGS[wording]))) == len(INSTRUCTION)
    compare_options(model, WORDINGS[wording], prepare=instructed)


def test_a_shared_instruction_with_ia3_and_dora() -> None:
    for section in ({"type": "ia3"}, {"type": "lora", "dora": True, "targets": "all-linear"}):
        compare_options(tiny.adapted(**section), WORDINGS["several ids"], prepare=instructed)


def test_what_draws_or_checkpoints_shares_nothing() -> None:
    drawing = tiny.adapted(dropout=0.1)
    assert can_shorten(drawing, 20)
    drawing.model.train()
    assert not can_shorten(drawing, 20)
    checkpointed = tiny.adapted()
    checkpointed.base.model.activation_checkpointing_enable()
    assert not can_shorten(checkpointed, 20)
    assert not can_shorten(tiny.adapted("bloom"), 20)


def test_branches_are_used_where_they_may_be_and_only_there() -> None:
    for name in tiny.ARCHITECTURES:
        assert sees_branches(tiny.model(name), 20), name
    for name in tiny.WINDOWED:
        assert sees_branches(tiny.model(name), 8), name
        assert not sees_branches(tiny.model(name), 9), name


def test_autocast_is_near_float32() -> None:
    examples = batch_of(WORDINGS["several ids"])
    exact = option_scores(tiny.adapted(), examples)
    plain = tiny.adapted()
    rough = option_scores(type(plain)(tiny.base(autocast=True), plain.model, plain.parameters, {}), examples)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_objectives_sum_their_terms() -> None:
    model = tiny.adapted()
    examples = batch_of(WORDINGS["several ids"])
    sft = tiny.loss("sft", model, examples)
    assert sft.count == sum(len(example.answer) for example in examples)
    torch.testing.assert_close(sft.total, answer_losses(model, examples)[0].sum())
    choice = tiny.loss("choice", model, examples)
    by_hand = -torch.log_softmax(option_scores(model, examples), dim=1)[torch.arange(4), torch.tensor([0, 1, 2, 0])]
    assert choice.count == 4
    torch.testing.assert_close(choice.total, by_hand.sum())


def test_choice_refuses_examples_it_cannot_compare() -> None:
    closed, opened = batch_of(WORDINGS["one id each"]), open_batch()
    unequal = [closed[0], Encoded((9,), (50, 2), ((50,), (51,)), 0)]
    for examples in (opened, unequal):
        with pytest.raises(DataError, match="number"):
            tiny.objective("choice").check(examples)
        with pytest.raises(DataError, match="number"):
            option_scores(tiny.adapted(), examples)
    with pytest.raises(DataError, match="no supervised token"):
        tiny.objective("sft").check([Encoded((9,), ())])


@pytest.mark.parametrize("strength", [0.0, 1.0, 0.5])
def test_a_clients_own_shares_of_the_answers_are_added_to_their_scores_in_training(strength: float) -> None:
    """Menon et al. 2021, equation 10, by hand: labels 0, 1, 2, 0 with one example more of each."""
    model, examples = tiny.adapted("llama", targets="all-linear"), batch_of(WORDINGS["several ids"])
    settings = SoftmaxOverOptions(logit_adjustment=strength)
    given = adjusted(examples, settings, classes=0)
    with torch.no_grad():
        loss = OBJECTIVES[SoftmaxOverOptions].loss(model, given, settings)
        scores = option_scores(model, examples)
    shares = torch.tensor([3.0, 2.0, 2.0]) / 7
    labels = torch.tensor([example.label for example in examples])
    expected = torch.nn.functional.cross_entropy(scores + strength * shares.log(), labels, reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    assert (given is examples) == (strength == 0)
    with torch.no_grad():
        assert torch.equal(option_scores(model, given), scores)  # what is scored is not adjusted


def test_classes_of_a_head_that_a_client_has_none_of_are_counted_too() -> None:
    examples = [Encoded((5, 6), (), (), 2)] * 3
    (given, *_) = adjusted(examples, Classify(logit_adjustment=1.0), classes=4)
    assert given.adjustment == pytest.approx([math.log(1 / 7), math.log(1 / 7), math.log(4 / 7), math.log(1 / 7)])
    assert adjusted(examples, Sft(), classes=0) is examples
