"""What a coordinator believes of the body of a reply: a form for each kind, and figures that can be true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from governed import BODY, LABELS, SETTINGS, report, scores
from silotune.errors import MessageError
from silotune.evaluation.evaluate import Answers, figures
from silotune.federation.coordinator import forms
from silotune.federation.coordinator.settlement import Reported, Settlement
from silotune.federation.kinds import KINDS
from silotune.federation.site.guard import NOT_FIGURES
from silotune.federation.site.ledger import Budget, open_round
from silotune.federation.site.policy import Policy, released
from silotune.federation.wire.run_setup import RunSettings
from silotune.settings.sections import EvaluationSection, PrivacySection, TrainingSection
from silotune.structs import Failure, Reply, Request, SiteState
from silotune.training.release import release_of

START = {"w": torch.zeros(2)}
TRAINING = TrainingSection(batch_size=4, epochs=2.0)


def said(body: Mapping[str, Any], settings: RunSettings = SETTINGS) -> Reply | Failure:
    """What becomes of scores with this body, in a run with these settings."""
    request = Request("evaluate", 1, "bank-a", START, BODY)
    return Settlement({"bank-a": request}, settings).settle(Reply("evaluate", 1, "bank-a", {}, body))


LIES: Mapping[str, tuple[dict[str, Any], str]] = {
    "an accuracy of 31,337": ({"accuracy": 31337.0}, "accuracy"),
    "less than nothing": ({"macro_f1": -0.1}, "macro_f1"),
    "a figure in words": ({"macro_f1": "the best"}, "macro_f1"),
    "a failure of the site's own wording": ({"failed": "client-0 cheats"}, "failed"),
    "filler": ({"x": ["y" * 4000] * 200}, "x"),
    "no examples": ({"num_examples": 0}, "num_examples"),
    "endless examples": ({"num_examples": 1 << 41}, "num_examples"),
    "true examples": ({"num_examples": True}, "num_examples"),
    "another scoring": ({"scoring": "generation"}, "scoring"),
    "a class more": ({"per_class": {**scores()["per_class"], "best": scores()["per_class"]["neutral"]}}, "per_class"),
    "a class with words": ({"per_class": {**scores()["per_class"], "neutral": "fine"}}, "per_class.neutral"),
    "more support than examples": (
        {"per_class": {name: {**row, "support": 9} for name, row in scores()["per_class"].items()}}, "per_class",
    ),
    "a row more": ({"confusion": [*scores()["confusion"], [0, 0, 0, 0]]}, "confusion"),
    "a column more": ({"confusion": [[*row, 0] for row in scores()["confusion"]]}, "confusion"),
    "a cell of a billion": ({"confusion": [[10**9, 0, 0, 0], *scores()["confusion"][1:]]}, "confusion"),
    "half an example": ({"confusion": [[0.5, 0, 0, 0], *scores()["confusion"][1:]]}, "confusion.0.0"),
    "a bin of words": ({"reliability": [{**scores()["reliability"][0], "note": "x"}]}, "reliability.0.note"),
    "bins of other examples": ({"reliability": scores()["reliability"] * 2}, "reliability"),
    "a loss of answers that are open": ({"loss": 1.0}, "loss"),
}  # fmt: skip
"""Lie -> what it says of scores, and where the coordinator finds it."""


@pytest.mark.parametrize("name", LIES)
def test_scores_that_cannot_be_are_that_site_s_failure(name: str) -> None:
    changes, where = LIES[name]
    failure = said({**scores(), **changes})
    assert isinstance(failure, Failure) and failure.client == "bank-a", failure
    assert failure.reason == f"the body of this evaluate reply is not valid at {where!r}"


@pytest.mark.parametrize("name", sorted(scores()))
def test_no_figure_can_be_left_out(name: str) -> None:
    body = {key: value for key, value in scores().items() if key != name}
    assert isinstance(said(body), Failure)


def made(kind: str, draw: st.DrawFn) -> tuple[dict[str, Any], RunSettings]:
    """Figures of honest answers of one kind, and the settings of their run."""
    size = draw(st.integers(1, 12))
    option, rate = st.integers(0, 2), st.floats(0, 1)
    if kind in ("likelihood", "generation"):
        right, given_ = (tuple(draw(st.lists(option, min_size=size, max_size=size))) for _ in range(2))
        sure = tuple(draw(st.lists(rate, min_size=size, max_size=size))) if kind == "likelihood" else ()
        answered = Answers(LABELS, kind, right, given_, sure)
        return figures(answered), replace(SETTINGS, evaluation=EvaluationSection(scoring=kind))
    values = tuple(draw(st.lists(st.floats(0, 1e4), min_size=size, max_size=size)))
    if kind == "open":
        return figures(Answers(losses=values, tokens=(3,) * size)), replace(SETTINGS, labels=())
    return figures(Answers(margins=values, start_margins=values[::-1])), replace(SETTINGS, labels=())


@st.composite
def honest(draw: st.DrawFn) -> tuple[dict[str, Any], RunSettings]:
    """The same as a policy lets them leave."""
    body, settings = made(draw(st.sampled_from(["likelihood", "generation", "open", "pairs"])), draw)
    names = tuple(name for name in body if name not in NOT_FIGURES)
    smallest = draw(st.integers(0, body["num_examples"]))
    shown = draw(st.none() | st.sets(st.sampled_from(sorted(names))).map(tuple))
    return released(Policy(smallest_count=smallest, metrics=shown), body, figures=names), settings


@given(honest())
def test_whatever_an_honest_site_says_is_believed(pair: tuple[dict[str, Any], RunSettings]) -> None:
    body, settings = pair
    assert isinstance(said(body, settings), Reply)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_kind_takes_a_figure_more(kind: str) -> None:
    with pytest.raises(MessageError):
        forms.read(Reply(kind, 1, "bank-a", {}, {"x": "y" * 4000}), SETTINGS)


def test_an_answer_that_breaks_the_looking_at_it_is_that_site_s_failure_and_the_log_says_where(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settlement = Settlement({"bank-a": Request("evaluate", 1, "bank-a", {}, {})}, SETTINGS)
    failure = settlement.settle(Reply("evaluate", 1, "bank-a", "no tensors", scores()))  # type: ignore[arg-type]
    assert isinstance(failure, Failure) and failure.client == "bank-a"
    assert failure.reason == "the answer cannot be used: AttributeError"
    (record,) = caplog.records
    assert record.getMessage() == "an answer of bank-a: AttributeError"
    assert record.exc_info and record.exc_info[0] is AttributeError
    assert isinstance(settlement.settle(Reply("evaluate", 1, "bank-a", {}, scores())), Reply)


# --- the epsilon of a report ------------------------------------------------------------------------------------------


def reports(epsilon: float | None, facts: Reported | None, *, examples: int = 10) -> Reply | Failure:
    request = Request("train", 1, "bank-a", START, {})
    settlement = Settlement({"bank-a": request}, reported=facts)
    return settlement.settle(Reply("train", 1, "bank-a", START, {**report(examples), "epsilon": epsilon}))


@pytest.mark.parametrize("facts", [None, *(Reported(PrivacySection(dp=dp), TRAINING, 3) for dp in ("none", "client"))])
def test_where_no_site_adds_noise_no_report_names_an_epsilon(facts: Reported | None) -> None:
    assert isinstance(reports(None, facts), Reply)
    refused = reports(0.001, facts)
    assert isinstance(refused, Failure) and "the sites of this run add no noise" in refused.reason


def test_no_report_is_above_the_run_s_own_epsilon() -> None:
    facts = Reported(PrivacySection(dp={"type": "example", "epsilon": 2.0}), TRAINING, 3)
    assert isinstance(reports(2.0, facts), Reply)
    refused = reports(2.001, facts)
    assert isinstance(refused, Failure) and "epsilon = 2.001: at most 2 can have been spent" in refused.reason


@pytest.mark.parametrize("dp", ["example", "local"])
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize("examples", [1, 10, 400])
def test_what_a_site_spends_on_all_rounds_is_believed_and_a_thousand_times_that_is_not(
    dp: str, accountant: str, examples: int
) -> None:
    privacy = PrivacySection(dp={"type": dp, "noise_multiplier": 1.0, "accountant": accountant})
    state, cost = SiteState(), 0.0
    for number in (1, 2, 3, 3):  # the last one was done again
        opened = open_round(
            "bank-a", state, Budget(), privacy, run="r", round_number=number,
            release=lambda noise: release_of(privacy, TRAINING, num_examples=examples, rounds=3, noise=noise),
        )  # fmt: skip
        state, cost = opened.state, opened.epsilon
    facts = Reported(privacy, TRAINING, 3)
    assert isinstance(reports(cost, facts, examples=examples), Reply)
    refused = reports(1000 * cost, facts, examples=examples)
    assert isinstance(refused, Failure) and "can have been spent" in refused.reason


def test_a_round_that_may_be_tried_again_may_cost_again() -> None:
    once = Reported(PrivacySection(dp={"type": "local", "noise_multiplier": 1.0}), TRAINING, 3)
    assert once.most(10) < replace(once, is_tried_again=True).most(10)
