from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

import tiny
from silotune.errors import ConfigError, DataError
from silotune.evaluation.evaluate import SCORINGS, answers, evaluate, figures, parse_option
from silotune.evaluation.metrics import UNPARSED, calibration
from silotune.models import adapters
from silotune.settings.sections import Scoring
from silotune.training.local import RoundPlace, train_round


@pytest.fixture(scope="module")
def learnt():
    """A tiny model that answers its own training examples."""
    model = tiny.adapted(rank=4, targets="all-linear", stirred=False)
    settings = tiny.training(batch_size=9, max_steps=40, learning_rate=0.03)
    start = adapters.read(model)
    delta = train_round(model, start, tiny.encoded(tiny.closed(9)), settings=settings, place=RoundPlace(1)).delta
    adapters.write(model, {name: start[name] + delta[name] for name in start})
    return model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("positive", 2), (" Positive.\n", 2), ("NEGATIVE!", 0), ("neutral, because nothing changed", 1),
        ("**positive**", 2), ("not positive", UNPARSED), ("positively", UNPARSED), ("", UNPARSED), ("...", UNPARSED),
        ("the answer is positive", UNPARSED),
    ],
)  # fmt: skip
def test_parse_option(text: str, expected: int) -> None:
    assert parse_option(text, tiny.LABELS) == expected


def test_parse_letters_and_options_of_several_words() -> None:
    assert [parse_option(text, ("A", "B")) for text in ("A", "b)", "(B) beta", "AB", "C")] == [0, 1, 1, -1, -1]
    assert parse_option("Not at all.", ("yes", "not at all")) == 1


def test_options_of_punctuation_are_told_apart_by_the_whole_answer() -> None:
    assert [parse_option(text, ("+", "-")) for text in ("+", " - ", "", "!!!")] == [0, 1, -1, -1]
    assert [parse_option(text, ("C", "C++")) for text in ("c++", "C", "C#")] == [1, 0, -1]


def test_likelihood_takes_the_likeliest_option_of_each_example() -> None:
    model = tiny.adapted()
    examples = tiny.encoded(tiny.closed(7))
    with torch.no_grad():
        slow = [
            max(
                range(3),
                key=lambda option, own=example: float(
                    tiny.log_probabilities(model, own.prompt, own.options[option]).sum()
                ),
            )
            for example in examples
        ]
    for batch_size in (1, 3, 64):
        figures = evaluate(model, examples, labels=tiny.LABELS, batch_size=batch_size)
        right = [prediction == example.label for prediction, example in zip(slow, examples, strict=True)]
        assert figures["accuracy"] == pytest.approx(sum(right) / 7)
        assert figures["confusion"] == [
            [sum(e.label == true and p == named for p, e in zip(slow, examples, strict=True)) for named in range(3)]
            + [0]
            for true in range(3)
        ]
        assert figures["num_examples"] == 7
        assert figures["scoring"] == "likelihood"


def test_generation_reads_the_written_answer(learnt) -> None:
    examples = tiny.encoded(tiny.closed(9))
    figures = evaluate(learnt, examples, labels=tiny.LABELS, batch_size=4, scoring="generation", bootstrap_samples=50)
    assert figures["scoring"] == "generation"
    assert figures["accuracy"] >= 8 / 9
    assert figures["accuracy_interval"][0] <= figures["accuracy"] <= figures["accuracy_interval"][1]
    untaught = evaluate(tiny.adapted(), examples, labels=tiny.LABELS, batch_size=4, scoring="generation")
    assert untaught["unparsed"] > 0.5


def test_perplexity_equals_the_slow_one() -> None:
    model = tiny.adapted()
    examples = tiny.encoded(tiny.opened())
    with torch.no_grad():
        losses = torch.cat([-tiny.log_probabilities(model, item.prompt, item.answer) for item in examples])
    figures = evaluate(model, examples, labels=(), batch_size=2)
    assert figures["loss"] == pytest.approx(float(losses.double().mean()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(float(losses.double().mean())), rel=1e-4)
    assert figures["num_examples"] == len(examples)


def test_scorings_are_those_of_the_configuration() -> None:
    assert set(SCORINGS) == set(get_args(Scoring))
    with pytest.raises(ConfigError, match="unknown scoring 'likelyhood': did you mean 'likelihood'"):
        evaluate(tiny.adapted(), tiny.encoded(tiny.closed(2)), labels=tiny.LABELS, batch_size=2, scoring="likelyhood")


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="no examples"):
        evaluate(tiny.adapted(), [], labels=tiny.LABELS, batch_size=2)


def test_answers_judged_one_by_one_are_no_pairs_to_score() -> None:
    judged = [replace(pair, rejected="", wanted=True) for pair in tiny.pairs(2)]
    with pytest.raises(DataError, match="give pairs as data.test"):
        answers(tiny.adapted(), tiny.encoded(judged), labels=(), batch_size=2)


def test_confidence_is_the_softmax_over_the_options() -> None:
    model, examples = tiny.adapted(), tiny.encoded(tiny.closed(5))
    answered = answers(model, examples, labels=tiny.LABELS, batch_size=2)
    with torch.no_grad():
        for place, example in enumerate(examples):
            scores = torch.stack([tiny.log_probabilities(model, example.prompt, ids).sum() for ids in example.options])
            assert answered.options[place] == int(scores.argmax())
            assert answered.confidences[place] == pytest.approx(float(scores.softmax(0).max()), rel=1e-4)
    made = figures(answered)
    assert (
        made["ece"]
        == calibration(
            answered.confidences,
            [option == label for option, label in zip(answered.options, answered.labels, strict=True)],
        )["ece"]
    )


@pytest.mark.parametrize("made", [tiny.closed, tiny.opened])
def test_figures_of_some_answers_are_those_of_scoring_them_alone(made) -> None:
    model, examples = tiny.adapted(), tiny.encoded(made(6))
    labels = tiny.LABELS if made is tiny.closed else ()
    places = (4, 0, 3)
    some = figures(answers(model, examples, labels=labels, batch_size=2).of(places))
    alone = evaluate(model, [examples[place] for place in places], labels=labels, batch_size=2)
    assert some.keys() == alone.keys() and some["num_examples"] == 3
    for name in ("accuracy", "macro_f1", "ece", "perplexity"):
        if name in some:
            assert some[name] == pytest.approx(alone[name], rel=1e-4)


def test_generated_answers_have_no_confidence(learnt) -> None:
    made = evaluate(learnt, tiny.encoded(tiny.closed(4)), labels=tiny.LABELS, batch_size=4, scoring="generation")
    assert "ece" not in made and "reliability" not in made
