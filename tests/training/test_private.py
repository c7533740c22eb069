"""DP-SGD in the one loop: gradients by example against one at a time, noise 0 against plain training, and an audit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import tiny
from silotune import tensors as arithmetic
from silotune.errors import PrivacyError
from silotune.methods.corrections import proximal
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.head import Classes
from silotune.models.load import load_base
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.audit import guesses_right, lower_bound
from silotune.settings.adapters import Lora
from silotune.settings.objectives import OBJECTIVES, Classify
from silotune.settings.sections import ModelSection
from silotune.training.encode import Encoded
from silotune.training.examplewise import LOSSES, _one_by_one, clipped_sum, gradients, linear_places, losses_of, norms
from silotune.training.local import RoundPlace, train_round
from silotune.training.objectives import encoder_of
from silotune.training.private import DpSgd, poisson_groups, private_gradient, sampling_rate

EXAMPLES = tiny.encoded(tiny.closed())
ALIKE = [example for example in tiny.encoded(tiny.closed(24)) if len(example.answer) == len(EXAMPLES[0].answer)][:8]
PAIRS = [replace(example, options=example.options[:2], label=place % 2) for place, example in enumerate(EXAMPLES)]
PLAIN = DpSgd(noise_multiplier=0.0, clip_norm=math.inf)


def seeded(seed: int = 0) -> Callable[[int], bytes]:
    """Bytes that a test can repeat."""
    return random.Random(seed).randbytes


@pytest.fixture(scope="module")
def stirred() -> Adapted:
    """An adapter as after training: with B at zero, A would have no gradient."""
    return tiny.adapted(stirred=True, targets="all-linear")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapted, list[Encoded]]:
    """A tiny encoder with a head and a pooler of its own, without dropout, and its examples."""
    body = tiny.save_body(tmp_path_factory.mktemp("body") / "bert", "bert")
    file = body / "config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({key: 0.0 if "dropout" in key and value else value for key, value in known.items()}))
    base = load_base(ModelSection(name=str(body), max_length=128), Classes(tiny.LABELS, 0))
    made = adapters.attach(base, Lora(rank=2, alpha=4, targets="all-linear"), seed=0)
    adapters.write(made, tiny.stir(adapters.read(made)))
    return made, encoder_of(base, Classify(), max_length=128)(tiny.closed())


def case(objective: str, stirred: Adapted, classifier: tuple[Adapted, list[Encoded]]) -> tuple[Adapted, list[Encoded]]:
    if objective == "classify":
        return classifier
    return stirred, PAIRS if objective == "dpo" else EXAMPLES


def test_the_table_is_that_of_the_sections() -> None:
    assert [each.type for each in LOSSES] == OBJECTIVES.those("is_by_example")


@pytest.mark.parametrize("objective", OBJECTIVES.those("is_by_example"))
def test_norms_are_those_of_batches_of_one(objective: str, stirred, classifier) -> None:
    model, examples = case(objective, stirred, classifier)
    assert linear_places(model) is not None
    by_example, each = gradients(model, examples, losses_of(tiny.training(objective=objective)))
    for place, example in enumerate(examples):
        loss = tiny.loss(objective, model, [example])
        alone = tiny.gradients(model, loss.total / loss.count)
        tiny.assert_close({name: tensor[place] for name, tensor in by_example.items()}, alone, 2e-5)
        size = math.sqrt(sum(float(tensor.square().sum()) for tensor in alone.values()))
        assert float(norms(by_example)[place]) == pytest.approx(size, rel=1e-4)
        assert float(each[place]) == pytest.approx(float(loss.total.detach()) / loss.count, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters.values())


@pytest.mark.parametrize(
    ("name", "section"),
    [("llama", {"type": "ia3"}), ("llama", {"dora": True}), ("mixtral", {"targets": "all-linear"})],
)
def test_other_adapters_go_one_at_a_time(name: str, section) -> None:
    model = tiny.adapted(name, stirred=True, **section)
    assert linear_places(model) is None
    by_example, _ = gradients(model, EXAMPLES[:3], losses_of(tiny.training(objective="choice")))
    loss = tiny.loss("choice", model, EXAMPLES[:3])
    whole = tiny.gradients(model, loss.total)
    tiny.assert_close({name: tensor.sum(0) for name, tensor in by_example.items()}, whole, 2e-5)


def test_checkpointing_repeats_a_pass_and_counts_it_once() -> None:
    model = tiny.adapted(stirred=True)
    expected, _ = gradients(model, EXAMPLES[:4], losses_of(tiny.training(objective="choice")))
    model.base.model.activation_checkpointing_enable()
    model.model.enable_input_require_grads()
    model.model.train()
    made, _ = gradients(model, EXAMPLES[:4], losses_of(tiny.training(objective="choice")))
    tiny.assert_close(made, expected, 1e-5)


def test_clipping_by_hand_and_a_gradient_that_is_not_finite() -> None:
    by_example = {
        "a": torch.tensor([[3.0, 0.0], [0.3, 0.0], [math.nan, 1.0]]),
        "b": torch.tensor([[4.0], [0.4], [1.0]]),
    }
    assert norms(by_example)[:2].tolist() == pytest.approx([5.0, 0.5])
    made = clipped_sum(by_example, 1.0)  # (3, 0 | 4) / 5 + (0.3, 0 | 0.4) + nothing
    assert made["a"].tolist() == pytest.approx([0.9, 0.0])
    assert made["b"].tolist() == pytest.approx([1.2])
    assert clipped_sum(by_example, math.inf)["a"].tolist() == pytest.approx([3.3, 0.0])


@pytest.mark.parametrize("objective", OBJECTIVES.those("is_by_example"))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_noise_0_and_no_bound_are_plain_training(objective: str, optimizer: str, stirred, classifier) -> None:
    model, examples = case(objective, stirred, classifier)
    examples = (
        ALIKE if objective in ("sft", "pretrain") else examples
    )  # a mean over tokens is one over examples where all are alike
    received = adapters.read(model)
    settings = tiny.training(
        objective=objective, optimizer=optimizer, learning_rate=1e-2, batch_size=len(examples), max_steps=3
    )
    correction = proximal(0.5)
    plain = train_round(model, received, examples, settings=settings, place=RoundPlace(1), correction=correction)
    place = RoundPlace(1, private=PLAIN)
    private = train_round(model, received, examples, settings=settings, place=place, correction=correction)
    tiny.assert_close(private.delta, plain.delta, 1e-6 if optimizer == "sgd" else 1e-4)
    assert private.loss is None
    assert private.tokens == plain.tokens
    adapters.write(model, received)


def test_noise_has_the_deviation_that_is_claimed_and_corrections_are_not_noised(stirred) -> None:
    """Two steps from the same state with different noise: their difference is sqrt(2) z C / (expected examples)."""
    received = adapters.read(stirred)
    settings = tiny.training(objective="choice", optimizer="sgd", learning_rate=1.0, batch_size=8, max_steps=1)

    def go(seed: int, correction=None):
        dp = DpSgd(2.0, 0.5, seeded(seed))
        place = RoundPlace(1, private=dp)
        return train_round(stirred, received, EXAMPLES, settings=settings, place=place, correction=correction).delta

    difference = arithmetic.flatten(arithmetic.subtract(go(1), go(2)))
    assert float(difference.std()) == pytest.approx(math.sqrt(2) * 2.0 * 0.5 / 8, rel=0.1)
    term = {name: torch.full_like(tensor, 3.0) for name, tensor in received.items()}
    shifted = arithmetic.subtract(go(1, lambda weights, base: term), go(1))
    tiny.assert_close(shifted, arithmetic.scale(term, -1.0), 1e-5)
    adapters.write(stirred, received)


def test_samples_are_poisson_and_of_no_run_seed(stirred) -> None:
    groups = poisson_groups(EXAMPLES, 0.25, batch_size=2, entropy=seeded())
    sizes = [sum(map(len, next(groups))) for _ in range(2000)]
    assert sum(sizes) / 2000 == pytest.approx(2.0, abs=0.1)  # 8 examples at 0.25: binomial, variance 1.5
    assert sum((size - 2) ** 2 for size in sizes) / 2000 == pytest.approx(1.5, abs=0.15)
    assert 0 in sizes and max(sizes) > 4
    assert sampling_rate(600, 16, 2) == pytest.approx(32 / 600)
    assert sampling_rate(10, 16, 1) == 1.0
    settings = tiny.training(objective="choice", max_steps=1)
    place = RoundPlace(1, private=DpSgd(1.0, 1.0))
    made = [train_round(stirred, adapters.read(stirred), EXAMPLES, settings=settings, place=place) for _ in range(2)]
    assert arithmetic.digest(made[0].delta) != arithmetic.digest(made[1].delta)


def audited(noise: float, *, canaries: int = 600, steps: int = 1) -> float:
    """The largest epsilon that the released gradients rule out: canary i has gradient -1 at value i alone."""
    layer = torch.nn.Linear(canaries, 1, bias=False)
    model = Adapted(base=None, model=layer, parameters={"w": layer.weight}, config={})  # type: ignore[arg-type]
    coins = random.Random(5)
    was_in = [coins.random() < 0.5 for _ in range(canaries)]
    examples = [Encoded((place,), ()) for place in range(canaries) if was_in[place]]

    def losses(adapted: Adapted, batch: list[Encoded]) -> torch.Tensor:
        inputs = torch.nn.functional.one_hot(torch.tensor([item.prompt[0] for item in batch]), canaries).float()
        return -adapted.model(inputs).view(-1)

    dp = DpSgd(noise, 1.0, seeded(7))
    made = [private_gradient(model, [examples], losses, dp=dp, expected=1.0)["w"].view(-1) for _ in range(steps)]
    scores = (-sum(made)).tolist()
    found = [
        lower_bound(guesses_right(scores, was_in, guesses), guesses, canaries, delta=1e-5, confidence=1 - 0.05 / 3)
        for guesses in (canaries // 6, canaries // 3, canaries)
    ]
    return max(found)


def test_an_audit_stays_under_the_claim_and_catches_sabotage() -> None:
    noise = 1.5
    claimed = epsilon([Spend(noise)], 1e-5)
    assert claimed == pytest.approx(2.7, abs=0.2)
    honest = audited(noise)
    assert 0.5 < honest < claimed  # not vacuous: the attacker does learn something
    assert audited(noise / 5) > claimed  # noise that is not what was claimed
    doubled = audited(noise, steps=16)
    assert claimed < doubled < epsilon([Spend(noise, steps=16)], 1e-5)  # uncounted rounds are caught as well


def test_the_two_paths_agree(stirred) -> None:
    fast, each = gradients(stirred, EXAMPLES, losses_of(tiny.training(objective="sft")))
    slow, alone = _one_by_one(
        replace(stirred, keeps_rows_apart=True), EXAMPLES, losses_of(tiny.training(objective="sft"))
    )
    tiny.assert_close(fast, slow, 2e-5)
    torch.testing.assert_close(each, alone)


def test_a_frozen_factor_is_neither_clipped_nor_noised(stirred) -> None:
    """One-sided LoRA: A rests, so nothing of it is released, and the bound is all B's."""
    received = adapters.read(stirred)
    resting = [parameter for name, parameter in stirred.parameters.items() if "lora_A" in name]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        by_example, _ = gradients(stirred, EXAMPLES, losses_of(tiny.training(objective="choice")))
        assert by_example and not any("lora_A" in name for name in by_example)
        settings = tiny.training(objective="choice", max_steps=2)
        place = RoundPlace(1, private=DpSgd(1.0, 1.0))
        delta = train_round(stirred, received, EXAMPLES, settings=settings, place=place).delta
        assert {name for name, tensor in delta.items() if tensor.any()} == set(by_example)
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)
        adapters.write(stirred, received)


def test_a_layer_that_sees_gathered_positions_is_refused() -> None:
    """The output head gets the supervised positions alone: its rows are nobody's in particular."""
    model = tiny.adapted(stirred=True, targets=("lm_head",))
    with pytest.raises(PrivacyError, match="lm_head.*leave its layer out of adapter.targets"):
        gradients(model, EXAMPLES[:3], losses_of(tiny.training(objective="sft")))
