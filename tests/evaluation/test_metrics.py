from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from silotune.evaluation.metrics import (
    UNPARSED,
    answers_one_class,
    best_and_worst,
    calibration,
    classification,
    language_modelling,
    majority,
    signed,
)

NAMES = ("a", "b", "c")
pairs = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 2)), min_size=1, max_size=60)


def test_by_hand() -> None:
    """Class a: 2 of 3 found, 1 wrongly named; b: found, c: never named; one answer unparsed."""
    figures = classification([0, 0, UNPARSED, 1, 0], [0, 0, 0, 1, 2], NAMES, bootstrap_samples=0)
    assert figures["accuracy"] == 0.6
    assert figures["unparsed"] == 0.2
    assert figures["confusion"] == [[2, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert figures["per_class"]["a"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": pytest.approx(2 / 3), "support": 3}
    assert figures["per_class"]["b"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert figures["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert not any(key.endswith("_interval") for key in figures)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_equals_scikit_learn(values: list[tuple[int, int]]) -> None:
    predicted, true = [pair[0] for pair in values], [pair[1] for pair in values]
    figures = classification(predicted, true, NAMES, bootstrap_samples=0)
    assert figures["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    present = sorted({*true, *predicted} - {UNPARSED})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = f1_score(true, predicted, labels=present, average="macro", zero_division=0.0)
    assert figures["macro_f1"] == pytest.approx(expected)
    table = confusion_matrix(true, [3 if value == UNPARSED else value for value in predicted], labels=[0, 1, 2, 3])
    assert figures["confusion"] == table[:3].tolist()
    assert figures["unparsed"] == pytest.approx(predicted.count(UNPARSED) / len(predicted))


def test_intervals_are_those_of_resampled_examples() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 400)
    predicted = np.where(generator.random(400) < 0.7, true, generator.integers(-1, 3, 400))
    figures = classification(predicted.tolist(), true.tolist(), NAMES, bootstrap_samples=20_000)
    picks = generator.integers(0, 400, (20_000, 400))
    asked, said = true[picks], predicted[picks]  # [samples, examples]
    scores = [
        2
        * ((asked == label) & (said == label)).sum(axis=1)
        / ((asked == label).sum(axis=1) + (said == label).sum(axis=1))
        for label in range(3)
    ]
    slow = {"accuracy": (asked == said).mean(axis=1), "macro_f1": np.mean(scores, axis=0)}
    for name, values in slow.items():
        low, high = figures[f"{name}_interval"]
        assert low < figures[name] < high
        assert [low, high] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=0.0015)


def test_intervals_are_deterministic_and_narrow_with_more_examples() -> None:
    few = classification([0, 1] * 20, [0, 0] * 20, NAMES[:2], bootstrap_samples=500)
    assert few == classification([0, 1] * 20, [0, 0] * 20, NAMES[:2], bootstrap_samples=500)
    many = classification([0, 1] * 500, [0, 0] * 500, NAMES[:2], bootstrap_samples=500)
    assert np.diff(many["accuracy_interval"])[0] < 0.4 * np.diff(few["accuracy_interval"])[0]
    sure = classification([0] * 9, [0] * 9, NAMES[:1], bootstrap_samples=50)
    assert sure["accuracy_interval"] == [1.0, 1.0]


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert language_modelling([2.0, 4.0], [1, 2]) == {"loss": 2.0, "perplexity": math.exp(2.0)}
    assert math.isfinite(language_modelling([1e9], [1])["perplexity"])


def test_the_interval_of_perplexity_is_that_of_resampled_examples() -> None:
    drawn = np.random.default_rng(5)
    tokens = drawn.integers(5, 60, 400)
    losses = tokens * drawn.normal(2.0, 0.4, 400)
    made = language_modelling(losses.tolist(), tokens.tolist(), bootstrap_samples=2000)
    picks = np.random.default_rng(99).integers(0, 400, (4000, 400))
    slow = sorted(sum(losses[pick]) / sum(tokens[pick]) for pick in picks)
    assert made["loss_interval"] == pytest.approx([slow[100], slow[3900]], abs=0.01)
    assert made["perplexity_interval"] == pytest.approx([math.exp(bound) for bound in made["loss_interval"]])
    assert made["loss_interval"][0] < made["loss"] < made["loss_interval"][1]
    same = language_modelling(losses.tolist(), tokens.tolist(), bootstrap_samples=2000)
    assert same == made


def test_calibration_by_hand() -> None:
    """Bins of 1/15: .34 and .36 in bin 6 (.333 to .4), .95 in the last; a border belongs to the lower bin."""
    figures = calibration([0.34, 0.36, 0.95, 1.0, 5 / 15], [True, False, True, False, True])
    assert figures["reliability"] == [
        {"from": 4 / 15, "to": 5 / 15, "num_examples": 1, "confidence": pytest.approx(1 / 3), "accuracy": 1.0},
        {"from": 5 / 15, "to": 6 / 15, "num_examples": 2, "confidence": pytest.approx(0.35), "accuracy": 0.5},
        {"from": 14 / 15, "to": 1.0, "num_examples": 2, "confidence": pytest.approx(0.975), "accuracy": 0.5},
    ]
    assert figures["ece"] == pytest.approx((1 * (1 - 1 / 3) + 2 * 0.15 + 2 * 0.475) / 5)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_is_a_share_and_loses_no_example(answered: list[tuple[float, bool]]) -> None:
    confidences, right = zip(*answered, strict=True)
    figures = calibration(confidences, right)
    assert 0 <= figures["ece"] <= 1
    assert sum(each["num_examples"] for each in figures["reliability"]) == len(answered)
    sure = calibration([1.0] * len(right), right)
    assert sure["ece"] == pytest.approx(1 - sum(right) / len(right))


def test_less_perplexity_and_more_of_all_else_is_better() -> None:
    for metric, values in (("perplexity", [3.0, 2.0]), ("accuracy", [0.2, 0.3]), ("macro_f1", [0.0, 1.0])):
        best, worst = best_and_worst(metric)
        assert (worst(values), best(values)) == tuple(values)
        assert signed(metric, values[0]) < signed(metric, values[1])
        assert signed(metric, math.nan) < signed(metric, values[0])


def test_one_answer_to_all_is_known_for_what_it_is() -> None:
    """Of four neutral, one positive: always neutral has .8 accuracy, F1 of 8/9 and 0."""
    names, labels = ("neutral", "positive", "negative"), [0, 0, 0, 0, 1]
    same = classification([0] * 5, labels, names, bootstrap_samples=0)
    known = majority(same)
    assert known == {"answer": "neutral", "accuracy": same["accuracy"], "macro_f1": pytest.approx(same["macro_f1"])}
    assert known["macro_f1"] == pytest.approx(4 / 9) and answers_one_class(same)
    assert not answers_one_class(classification([0, 0, 0, 1, 0], labels, names, bootstrap_samples=0))
    assert not answers_one_class(classification([0, 0], [0, 0], names, bootstrap_samples=0)), "there is but one class"
    assert majority({"perplexity": 3.0}) is None and not answers_one_class({"perplexity": 3.0})
