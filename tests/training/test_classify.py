"""The objective ``classify``: loss and gradients are transformers' own, and texts are put to each model as it wants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from silotune.data.tasks import TASKS, to_example
from silotune.errors import DataError, ModelError
from silotune.evaluation.evaluate import evaluate
from silotune.methods.corrections import proximal
from silotune.models.adapters import Adapted, attach, read, write
from silotune.models.head import Classes
from silotune.models.load import load_base
from silotune.settings.objectives import Classify
from silotune.settings.sections import ModelSection
from silotune.structs import Example
from silotune.training.encode import Encoded, truncation_note
from silotune.training.local import RoundPlace, train_round
from silotune.training.objectives import encoder_of
from silotune.training.scores import class_logits, option_scores

EVERY = (*tiny.ENCODERS, "llama", "gpt2", "mistral", "qwen2", "gemma", "phi", "gpt_neox")
LONG = Example((("user", "shares " * 60 + "fell"),), "negative", tiny.LABELS, 0, text=("shares " * 60 + "fell",))


def adapted(folder: Path, name: str, **section) -> Adapted:
    body = tiny.save_body(folder / name, name) if not (folder / name).exists() else folder / name
    base = load_base(ModelSection(name=str(body), max_length=128), Classes(tiny.LABELS, 0))
    made = attach(base, tiny.adapter(**section), seed=0)
    write(made, tiny.stir(read(made)))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bodies")


@pytest.fixture(scope="module", params=EVERY)
def model(request: pytest.FixtureRequest, folder: Path) -> Adapted:
    return adapted(folder, request.param, targets="all-linear")


def encoded(model: Adapted, examples: list[Example], *, wording: str = "auto", max_length: int = 128) -> list[Encoded]:
    return encoder_of(model.base, Classify(wording=wording), max_length=max_length)(examples)


def test_loss_and_gradients_are_those_of_transformers(model: Adapted) -> None:
    examples = encoded(model, tiny.closed())
    length = max(example.length for example in examples)
    pad = model.base.model.config.pad_token_id
    ids = torch.tensor([[*e.prompt, *[pad] * (length - e.length)] for e in examples])
    mask = torch.tensor([[1] * e.length + [0] * (length - e.length) for e in examples])
    theirs = model.model(input_ids=ids, attention_mask=mask, labels=torch.tensor([e.label for e in examples])).loss
    ours = tiny.loss("classify", model, examples)
    assert ours.count == len(examples)
    mean = ours.total / ours.count
    torch.testing.assert_close(mean, theirs, rtol=1e-5, atol=1e-5)
    expected = tiny.gradients(model, theirs)
    tiny.assert_close(tiny.gradients(model, mean), expected, 1e-5)
    assert any(bool(value.abs().max() > 1e-3) for value in expected.values())


def test_padding_and_company_change_nothing(model: Adapted) -> None:
    examples = encoded(model, tiny.closed())
    with torch.no_grad():
        together = class_logits(model, examples)
        alone = torch.cat([model.model(input_ids=torch.tensor([e.prompt])).logits.float() for e in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_scores_are_log_probabilities_of_the_classes(folder: Path) -> None:
    model = adapted(folder, "bert")
    examples = encoded(model, tiny.closed(7))
    with torch.no_grad():
        scores = option_scores(model, examples)
        best = class_logits(model, examples).argmax(dim=1).tolist()
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(7))
    figures = evaluate(model, examples, labels=tiny.LABELS, batch_size=3)
    right = [prediction == example.label for prediction, example in zip(best, examples, strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(right) / 7) and figures["unparsed"] == 0
    with pytest.raises(ModelError, match="classification head, which writes no text"):
        evaluate(model, examples, labels=tiny.LABELS, batch_size=3, scoring="generation")


def test_a_classifier_learns_its_examples_and_the_same_bits_twice(folder: Path) -> None:
    for name in ("bert", "llama"):
        model = adapted(folder, name, dropout=0.1)  # BERT's own dropout is on too
        start, examples = read(model), encoded(model, tiny.closed(9))
        settings = tiny.training(objective="classify", batch_size=9, max_steps=60, learning_rate=0.03)
        made = [train_round(model, start, examples, settings=settings, place=RoundPlace(5)).delta for _ in range(2)]
        tiny.assert_same_bits(*made)
        write(model, {key: start[key] + made[0][key] for key in start})
        assert evaluate(model, examples, labels=tiny.LABELS, batch_size=4)["accuracy"] >= 8 / 9


def test_the_proximal_term_holds_the_head_too(folder: Path) -> None:
    model = adapted(folder, "bert")
    start, examples = read(model), encoded(model, tiny.closed())
    settings = tiny.training(objective="classify", optimizer="sgd", learning_rate=0.05, max_steps=8)

    def moved(mu: float) -> float:
        delta = train_round(
            model, start, examples, settings=settings, place=RoundPlace(1), correction=proximal(mu) if mu else None
        ).delta
        return sum(float(item.square().sum()) for key, item in delta.items() if "classifier" in key)

    assert moved(5.0) < 0.8 * moved(0.0)


def test_an_encoder_reads_the_text_alone_between_its_marks(folder: Path) -> None:
    row = {"text": "profit rose", "target": "the bank", "label": "positive"}
    example = to_example(TASKS["fiqa-sa"], row, where="here", number=1)
    assert example.text == ("the bank", "profit rose")
    bert, llama = adapted(folder, "bert"), adapted(folder, "llama")
    words = bert.base.tokenizer
    (own,) = encoded(bert, [example])
    assert words.decode(own.prompt) == "<s>the bank </s> profit rose</s>"
    assert own.answer == () and own.options == () and own.label == 2
    (asked,) = encoded(bert, [example], wording="prompt")
    assert asked.prompt == tuple(words(example.messages[0][1])["input_ids"])
    (prompt,) = encoded(llama, [example])
    assert "negative, neutral or positive" in llama.base.tokenizer.decode(prompt.prompt)
    assert llama.base.tokenizer.decode(prompt.prompt).endswith("<|assistant|>")
    (short,) = encoded(llama, [example], wording="text")
    assert llama.base.tokenizer.decode(short.prompt) == "<|user|>the bank\nprofit rose</s><|assistant|>"


def test_an_example_without_a_text_of_its_own_is_read_as_prompt(folder: Path) -> None:
    bert = adapted(folder, "bert")
    assert encoded(bert, tiny.closed(1)) == encoded(bert, tiny.closed(1), wording="prompt")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_long_text_is_cut_on_the_left_within_its_marks_and_counted(folder: Path, name: str) -> None:
    model = adapted(folder, name)
    (whole,), cut = encoded(model, [LONG], max_length=512), encoded(model, [LONG, *tiny.closed(1)], max_length=24)
    assert cut[0].length == 24 and cut[0].prompt_cut == whole.length - 24 and cut[1].prompt_cut == 0
    assert cut[0].prompt[-20:] == whole.prompt[-20:]
    if name == "bert":
        assert (cut[0].prompt[0], cut[0].prompt[-1]) == (whole.prompt[0], whole.prompt[-1]) == (1, 2)
    assert "1 of 2 prompts were cut on the left" in str(truncation_note(cut, "train"))


def test_what_no_head_can_learn_from_is_refused(folder: Path) -> None:
    bert = adapted(folder, "bert")
    with pytest.raises(DataError, match="example 2: its options are not the classes"):
        encoded(bert, [*tiny.closed(1), *tiny.closed(1, options=("yes", "no"))])
    with pytest.raises(DataError, match="example 1: its prompt has no tokens"):
        encoded(bert, [replace(LONG, messages=(("user", ""),), text=())])
    with pytest.raises(DataError, match="without an answer's tokens"):
        tiny.objective("classify").check(tiny.encoded(tiny.closed(1)))
