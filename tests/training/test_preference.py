"""Preference objectives: numbers by hand, the slow path, trl on the same batch, and what they are at their start."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from silotune.errors import DataError, ModelError
from silotune.experiment.examples import encoded_apart, left_out_note
from silotune.models import adapters
from silotune.models.adapters import at_start, attach, begin_from
from silotune.settings.adapters import AllWeights
from silotune.settings.objectives import Dpo, Kto
from silotune.structs import Example
from silotune.training.encode import Encoded
from silotune.training.encoder import Encoder
from silotune.training.local import RoundPlace, train_round
from silotune.training.preference import PAIR_LOSSES, log_ratios

PAIRS = tiny.encoded(tiny.pairs(4))
UNPAIRED = tiny.encoded(
    [
        replace(pair, answer=(pair.answer, pair.rejected)[number % 2], rejected="", wanted=number % 2 == 0)
        for number, pair in enumerate(tiny.pairs(4))
    ]
)
"""The same, every other one its preferred answer and the next one its rejected one."""


@pytest.fixture(scope="module")
def begun():  # noqa: ANN201
    """A model that begins with a trained adapter, as after `sft`."""
    made = tiny.adapted(targets="all-linear")
    return begin_from(made, adapters.read(made))


@pytest.fixture
def model(begun):  # noqa: ANN001, ANN201
    """The same in the middle of training."""
    adapters.write(begun, begun.start)
    return moved(begun)


def moved(made: Any) -> Any:
    adapters.write(made, tiny.stir(adapters.read(made), seed=7))
    return made


def slow_ratios(model: Any, examples: list[Encoded]) -> torch.Tensor:
    """[examples, options], one answer alone at a time."""

    def scores() -> torch.Tensor:
        each = [[tiny.log_probabilities(model, e.prompt, option).sum() for option in e.options] for e in examples]
        return torch.stack([torch.stack(line) for line in each])

    with torch.no_grad(), at_start(model):
        start = scores()
    return scores() - start


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "smoothing", "expected"),
    [
        # ratios 2 and -1 with beta 0.5: margin 1.5; log s(1.5) = -0.2014133, log s(-1.5) = -1.7014133
        ("sigmoid", 0.0, 0.2014133),
        ("sigmoid", 0.1, 0.9 * 0.2014133 + 0.1 * 1.7014133),
        ("robust", 0.1, (0.9 * 0.2014133 - 0.1 * 1.7014133) / 0.8),
        ("ipo", 0.0, (2 / 4 - (-1) / 2 - 1) ** 2),
    ],
)
def test_pair_losses_by_hand(loss: str, smoothing: float, expected: float) -> None:
    settings = Dpo(beta=0.5, preference_loss=loss, label_smoothing=smoothing)
    made = PAIR_LOSSES[loss](torch.tensor([[2.0, -1.0]]), torch.tensor([[4, 2]]), settings)
    assert made.tolist() == pytest.approx([expected], abs=1e-6)


def test_kto_by_hand(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios .4 (wanted) and .2 (not), those of the others' answers .3 and -.1: z = .1, with beta .5."""
    ratios = torch.tensor([[0.4, 0.3], [0.2, -0.1]])
    monkeypatch.setattr("silotune.training.preference.log_ratios", lambda adapted, examples: ratios)
    settings = Kto(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    made = tiny.loss("kto", model, UNPAIRED[:2], settings)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = 2 * (1 - sigmoid(0.5 * 0.3)) + 3 * (1 - sigmoid(0.5 * -0.1))
    assert made.count == 2
    assert made.total.item() == pytest.approx(expected, abs=1e-6)


# --- where training begins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_fresh_adapter_is_its_own_reference_and_that_is_the_base(kind: str) -> None:
    made = attach(tiny.base(), tiny.adapter(type=kind), seed=0)
    assert torch.count_nonzero(log_ratios(made, PAIRS)) == 0
    loss = tiny.loss("dpo", made, PAIRS)
    assert loss.total.item() == pytest.approx(len(PAIRS) * math.log(2), rel=1e-6)
    kto = tiny.loss("kto", made, PAIRS)
    assert (kto.total.item(), kto.count) == (pytest.approx(len(PAIRS), rel=1e-6), 2 * len(PAIRS))
    moved(made)
    with torch.no_grad(), at_start(made):
        inside = tiny.log_probabilities(made, PAIRS[0].prompt, PAIRS[0].answer)
    with torch.no_grad(), made.model.disable_adapter():
        torch.testing.assert_close(
            inside, tiny.log_probabilities(made, PAIRS[0].prompt, PAIRS[0].answer), rtol=0, atol=0
        )


def test_the_reference_pass_leaves_everything_as_it_was(model) -> None:
    before, wants = adapters.read(model), [parameter.requires_grad for parameter in model.parameters.values()]
    model.model.train()
    with pytest.raises(KeyError), at_start(model):
        assert not model.model.training
        tiny.assert_same_bits(adapters.read(model), model.start)
        raise KeyError
    assert model.model.training
    model.model.eval()
    tiny.assert_same_bits(adapters.read(model), before)
    assert wants == [parameter.requires_grad for parameter in model.parameters.values()]
    copy = adapters.replicate(model)
    assert torch.equal(log_ratios(copy, PAIRS), log_ratios(model, PAIRS))


def test_a_start_that_does_not_fit_is_refused(model) -> None:
    with pytest.raises(ModelError, match="adapter.start does not fit"):
        begin_from(model, {"odd": torch.zeros(1)})
    whole = attach(tiny.base(), AllWeights(), seed=0)
    for refused in (lambda: begin_from(whole, {}), lambda: log_ratios(whole, PAIRS)):
        with pytest.raises(ModelError, match="adapter.type = 'none'"):
            refused()


# --- the slow path ---------------------------------------------------------------------------------------------------


def test_ratios_and_gradients_equal_the_slow_path(model) -> None:
    slow = slow_ratios(model, PAIRS)
    expected = tiny.gradients(model, PAIR_LOSSES["sigmoid"](slow, torch.ones(4, 2), Dpo()).sum())
    torch.testing.assert_close(log_ratios(model, PAIRS), slow, rtol=1e-5, atol=2e-5)
    tiny.assert_close(tiny.gradients(model, tiny.loss("dpo", model, PAIRS).total), expected, 1e-5)
    assert any(bool(value.abs().max() > 1e-4) for value in expected.values())
    turned = [replace(pair, options=pair.options[::-1], label=1) for pair in PAIRS]
    torch.testing.assert_close(tiny.loss("dpo", model, turned).total, tiny.loss("dpo", model, PAIRS).total)


@pytest.mark.parametrize("instruction", [False, True])
def test_kto_equals_the_slow_path(model, instruction: bool) -> None:
    lead = tuple(range(20, 40)) if instruction else ()
    examples = [replace(example, prompt=(*lead, *example.prompt)) for example in UNPAIRED]
    others = [*examples[-1:], *examples[:-1]]
    wrong = [replace(own, options=other.options) for own, other in zip(examples, others, strict=True)]
    moved_by = slow_ratios(model, wrong).detach().mean().clamp(min=0)
    signs = torch.tensor([1.0 if example.label == 0 else -1.0 for example in examples])
    losses = 1 - torch.sigmoid(0.1 * signs * (slow_ratios(model, examples)[:, 0] - moved_by))
    expected = tiny.gradients(model, losses.sum())
    made = tiny.loss("kto", model, examples)
    torch.testing.assert_close(made.total, losses.sum(), rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, made.total), expected, 1e-5)


def test_one_example_has_no_others(model) -> None:
    ratio = slow_ratios(model, UNPAIRED[:1])[0, 0]
    made = tiny.loss("kto", model, UNPAIRED[:1])
    torch.testing.assert_close(made.total, 1 - torch.sigmoid(0.1 * ratio), rtol=1e-5, atol=1e-5)


def test_others_answers_are_cut_to_the_context(model) -> None:
    long = replace(UNPAIRED[0], prompt=tuple(10 + place % 200 for place in range(tiny.CONTEXT - 3)))
    assert math.isfinite(tiny.loss("kto", model, [long, UNPAIRED[3]]).total.item())


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_training_prefers_what_is_preferred(model, objective: str) -> None:
    settings = tiny.training(objective={"type": objective, "beta": 1.0}, learning_rate=0.02, max_steps=8)
    result = train_round(model, model.start, PAIRS, settings=settings, place=RoundPlace(3))
    again = train_round(model, model.start, PAIRS, settings=settings, place=RoundPlace(3))
    tiny.assert_same_bits(result.delta, again.delta)
    with torch.no_grad():
        ratios = log_ratios(model, PAIRS)
    assert (ratios[:, 0] > ratios[:, 1]).all()


def test_answers_judged_one_by_one_are_those_of_the_pairs() -> None:
    for number, (pair, lone) in enumerate(zip(PAIRS, UNPAIRED, strict=True)):
        place = number % 2
        assert (lone.prompt, lone.options, lone.label) == (pair.prompt, pair.options[place : place + 1], -place)
    with pytest.raises(DataError, match="not wanted"):
        tiny.objective("sft").check(UNPAIRED)
    tiny.objective("sft").check([UNPAIRED[0]])


def test_examples_of_another_kind_are_refused() -> None:
    closed, opened = tiny.encoded(tiny.closed(3)), tiny.encoded(tiny.opened(2))
    for name, examples in (("dpo", closed), ("dpo", opened), ("dpo", UNPAIRED), ("kto", opened)):
        with pytest.raises(DataError, match="pairs|wanted|number"):
            tiny.objective(name).check(examples)
    tiny.objective("kto").check(UNPAIRED)


# --- trl -------------------------------------------------------------------------------------------------------------


def inputs_of(lines: list[tuple[tuple[int, ...], tuple[int, ...]]], prefix: str = "") -> dict[str, torch.Tensor]:
    """Prompt and answer, right-padded, as trl's collators make them."""
    length = max(len(prompt) + len(answer) for prompt, answer in lines)
    rows = [[*prompt, *answer, *[0] * (length - len(prompt) - len(answer))] for prompt, answer in lines]
    real = [[1] * (len(p) + len(a)) + [0] * (length - len(p) - len(a)) for p, a in lines]
    answers = [[0] * len(p) + [1] * len(a) + [0] * (length - len(p) - len(a)) for p, a in lines]
    names = (f"{prefix}input_ids", f"{prefix}attention_mask", f"{prefix}completion_mask")
    return {name: torch.tensor(values) for name, values in zip(names, (rows, real, answers), strict=True)}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """trl's trainer by name and settings, on a model of its own whose adapter is moved after it took its reference."""
    pytest.importorskip("trl", reason="trl is in the extra 'dev'")
    import datasets
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    kinds = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}
    rows = {"prompt": ["a", "b"]}
    columns = {
        "dpo": {**rows, "chosen": ["c", "c"], "rejected": ["d", "d"]},
        "kto": {**rows, "completion": ["c", "d"], "label": [True, False]},
    }

    def make(name: str, **settings: Any) -> tuple[Any, Any]:
        config, trainer = kinds[name]
        arguments = config(
            output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False,
            per_device_train_batch_size=4, gradient_checkpointing=False, beta=0.3, **settings,
        )  # fmt: skip
        own = tiny.adapted(targets="all-linear")
        data = datasets.Dataset.from_dict(columns[name])
        made = trainer(model=own.model, args=arguments, train_dataset=data, processing_class=tiny.tokenizer())
        moved(own)
        made.model.eval()
        return made, own

    return make


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore")  # trl's own
@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("ipo", 0.0)])
def test_dpo_equals_trl(model, trainers: Any, loss: str, smoothing: float) -> None:
    trainer, theirs = trainers("dpo", loss_type=[loss], label_smoothing=smoothing)
    lines = [(pair.prompt, pair.options[place]) for place in (0, 1) for pair in PAIRS]
    expected = trainer._compute_loss(trainer.model, inputs_of(lines), False)
    settings = Dpo(beta=0.3, preference_loss=loss, label_smoothing=smoothing)
    made = tiny.loss("dpo", model, PAIRS, settings)
    torch.testing.assert_close(made.total / made.count, expected, rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, made.total / made.count), tiny.gradients(theirs, expected), 1e-5)


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore")
def test_kto_equals_trl(model, trainers: Any) -> None:
    trainer, theirs = trainers("kto", desirable_weight=1.5, undesirable_weight=0.5)
    answers = [example.options[0] for example in UNPAIRED]
    prompts = [example.prompt for example in UNPAIRED]
    wrong = [*answers[-1:], *answers[:-1]]
    batch = {
        **inputs_of(list(zip(prompts, answers, strict=True))),
        **inputs_of(list(zip(prompts, wrong, strict=True)), "KL_"),
        "label": torch.tensor([example.label == 0 for example in UNPAIRED]),
    }
    expected = trainer._compute_loss(trainer.model, batch, False)
    settings = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    made = tiny.loss("kto", model, UNPAIRED, settings)
    torch.testing.assert_close(made.total / made.count, expected, rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, made.total / made.count), tiny.gradients(theirs, expected), 1e-5)


# --- pairs without a signal ------------------------------------------------------------------------------------------


def test_pairs_that_are_equal_after_the_cut_are_left_out_and_counted() -> None:
    same = "profit rose to five million euros from four million " * 3
    even = Example((("user", "profit"),), same + "yes", rejected=same + "no")
    whole = Example((("user", "profit"),), "yes", rejected="no")
    encoder = Encoder(tiny.tokenizer(), max_length=32)
    made, places = encoded_apart(encoder, [whole, even, whole])
    assert made == encoder([whole, whole]) and places == [range(1), range(1, 1), range(1, 2)]
    assert left_out_note(places, "train") == (
        "train: 1 of 3 pairs were left out: both answers are the same up to model.max_length"
    )
    assert left_out_note([range(1)], "train") is None
    with pytest.raises(DataError, match="all 2 pairs are the same up to model.max_length"):
        encoded_apart(encoder, [even, even])
