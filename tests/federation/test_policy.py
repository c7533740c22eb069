"""Every rule of the site policy: a request that it lets pass, one that it refuses, and one whose fact is not known."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from silotune.errors import MessageError, PolicyError
from silotune.evaluation.metrics import calibration, classification, language_modelling, preference
from silotune.federation.kinds import EPSILON_RULES
from silotune.federation.site.guard import NOT_FIGURES
from silotune.federation.site.policy import (
    COSTS,
    LEAKS,
    PRIVACY,
    RULES,
    Asked,
    Policy,
    check_upload,
    read_policy,
    released,
)
from silotune.federation.site.policy import check as checked
from silotune.federation.wire.messages import TrainReport
from silotune.record.signatures import new_key

NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)  # a Wednesday
KEY, OTHER = new_key().public, new_key().public
HOURS = {"begin": "08:00", "end": "18:00", "zone": "Europe/Madrid"}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "submitters": ([f"{KEY} alice"], {"submitter": KEY}, {"submitter": OTHER}),
    "working_hours": (HOURS, {}, {"now": datetime(2026, 3, 4, 17, 0, tzinfo=UTC)}),
    "charter": (
        "a" * 64, {"charter_sha256": "a" * 64, "charter_until": date(2026, 3, 4)}, {"charter_sha256": "b" * 64},
    ),
    "base_models": (["a" * 64], {"base_sha256": "a" * 64}, {"base_sha256": "b" * 64}),
    "tasks": (["fpb"], {"tasks": ("fpb",)}, {"tasks": ("fpb", "medqa")}),
    "objectives": (["choice"], {"objective": "choice"}, {"objective": "sft"}),
    "smallest_adapter": (100, {"adapter_values": 100}, {"adapter_values": 99}),
    "largest_adapter": (100, {"adapter_values": 100}, {"adapter_values": 101}),
    "least_participants": (3, {"participants": 3}, {"participants": 2}),
    "least_cohort": (4, {"cohort": 4}, {"cohort": 3}),
    "secure_aggregation": (True, {"kind": "evaluate"}, {}),
    "plain_gradients": (False, {}, {"shows_gradients": True}),
    "largest_epsilon_run": (2.0, {"epsilon_run": 2.0}, {"epsilon_run": 2.1}),
    "largest_epsilon_total": (8.0, {"epsilon_total": 8.0}, {"epsilon_total": 8.1}),
    "generation": (False, {}, {"kind": "evaluate", "generates": True}),
    "most_steps": (10, {"steps": 10}, {"steps": 11}),
    "least_threshold": (0.75, {"threshold": 0.75}, {"threshold": 0.7}),
    "least_colluding": (2, {"colluding": 2}, {"colluding": 1}),
    "leakage_audit": ("required", {"audits_leakage": True}, {"audits_leakage": True, "kind": "countersign"}),
    "largest_membership_advantage": (
        0.1, {"audits_leakage": True, "leaked": 0.1}, {"audits_leakage": True, "leaked": 0.11},
    ),
}  # fmt: skip
ALWAYS_KNOWN = (
    "working_hours", "secure_aggregation", "plain_gradients", "generation", "least_threshold", "least_colluding",
    "most_steps",
)  # fmt: skip
EVERY = {**RULES, **COSTS, **LEAKS, **PRIVACY}


def check(policy: Policy, asked: Asked) -> None:
    """All tables, as admission asks them one after the other."""
    for table in (RULES, COSTS, LEAKS, PRIVACY):
        checked(policy, asked, rules=table)


def asked(**changes: Any) -> Asked:
    return Asked(**{"kind": "train", "now": NOW, **changes})


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == EVERY.keys() and len(EVERY) == sum(map(len, (RULES, COSTS, LEAKS, PRIVACY)))
    elsewhere = {"format", "metrics", "smallest_count", "largest_upload_bytes", "delta"}
    elsewhere |= {"most_models", "most_scorings", "most_seconds", "plugins"}
    assert Policy.model_fields.keys() == EVERY.keys() | elsewhere


@pytest.mark.parametrize("name", CASES)
def test_a_rule_lets_pass_refuses_and_fails_closed(name: str) -> None:
    value, allowed, refused = CASES[name]
    policy = Policy.model_validate({name: value})
    check(policy, asked(**allowed))
    with pytest.raises(PolicyError, match=f"policy rule '{name}': ") as caught:
        check(policy, asked(**refused))
    assert caught.value.rule == name
    if name not in ALWAYS_KNOWN:
        with pytest.raises(PolicyError, match=f"'{name}'"):
            check(policy, asked())


@pytest.mark.parametrize("name", ["objectives", "secure_aggregation"])
def test_rules_of_training_do_not_hold_up_an_evaluation(name: str) -> None:
    check(Policy.model_validate({name: CASES[name][0]}), asked(kind="evaluate"))


@pytest.mark.parametrize("name", EPSILON_RULES)
def test_exact_figures_are_bounded_by_no_epsilon(name: str) -> None:
    policy = Policy.model_validate({name: 8.0})
    with pytest.raises(PolicyError, match=f"'{name}': exact figures on this site's examples have no finite epsilon"):
        check(policy, asked(kind="evaluate"))
    check(policy, asked(kind="countersign"))


def test_a_model_that_gives_away_too_much_ends_training_and_is_not_signed() -> None:
    policy = Policy(leakage_audit="required", largest_membership_advantage=0.1)
    for kind in ("train", "countersign"):
        with pytest.raises(PolicyError, match="the membership advantage of the run's model is 0.3, at most 0.1"):
            check(policy, asked(kind=kind, audits_leakage=True, leaked=0.3))
        check(policy, asked(kind=kind, audits_leakage=True, leaked=0.05))
    check(policy, asked(kind="leakage", audits_leakage=True, leaked=0.3))  # a better model may be measured again
    check(policy, asked(kind="train", audits_leakage=True))
    with pytest.raises(PolicyError, match="the final model was not measured"):
        check(policy, asked(kind="countersign", audits_leakage=True))


def test_rules_of_the_adapter_do_not_hold_up_what_carries_none() -> None:
    check(Policy(smallest_adapter=5, largest_adapter=9), asked(kind="countersign"))


@pytest.mark.parametrize("kind", ["secure_sum.input", "he.input"])
def test_an_update_may_leave_within_a_sum(kind: str) -> None:
    check(Policy(secure_aggregation=True), asked(kind=kind))


def test_a_charter_ends_with_its_last_day_whether_the_policy_names_it_or_not() -> None:
    named = {"charter_sha256": "a" * 64}
    for policy in (Policy(), Policy(charter="a" * 64)):
        check(policy, asked(**named, charter_until=NOW.date()))
        with pytest.raises(PolicyError, match="'charter': the charter's last day was 2026-03-03"):
            check(policy, asked(**named, charter_until=date(2026, 3, 3)))
    with pytest.raises(PolicyError, match="'charter': the charter is not in this site's kit"):
        check(Policy(charter="a" * 64), asked(**named))
    check(Policy(), asked(**named))


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(MessageError, match="unknown request 'something-new'"):
        check(Policy(objectives=("sft",)), asked(kind="something-new"))


@pytest.mark.parametrize(
    ("hour", "day", "is_open"),
    [(8, 4, True), (7, 4, False), (17, 4, True), (18, 4, False), (12, 7, False)],  # the 4th is a Wednesday
)
def test_working_hours(hour: int, day: int, is_open: bool) -> None:
    policy = Policy.model_validate({"working_hours": {**HOURS, "zone": "UTC"}})
    assert policy.working_hours and policy.working_hours.holds(datetime(2026, 3, day, hour, tzinfo=UTC)) is is_open


@pytest.mark.parametrize(("day", "hour", "is_open"), [(6, 23, True), (7, 3, True), (7, 23, False), (8, 3, False)])
def test_hours_past_midnight_belong_to_the_day_on_which_they_begin(day: int, hour: int, is_open: bool) -> None:
    policy = Policy.model_validate({"working_hours": {"begin": "22:00", "end": "06:00"}})
    assert policy.working_hours and policy.working_hours.holds(datetime(2026, 3, day, hour, tzinfo=UTC)) is is_open


@pytest.mark.parametrize(
    "text",
    [
        "taks = ['fpb']", "tasks = 'fpb'", "objectives = ['x']", "format = 2", "largest_epsilon_run = -1",
        "submitters = ['ssh-rsa AAAA']", "base_models = ['abc']", "not toml", "smallest_count = -1",
        "[working_hours]\nbegin = '08:00'", "[working_hours]\nbegin='08:00'\nend='18:00'\nzone='Nowhere/X'",
        "[other]\nx = 1",
    ],
)  # fmt: skip
def test_a_policy_with_a_fault_refuses_everything(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(PolicyError, match="everything is refused until this is mended") as caught:
        read_policy(tmp_path / "policy.toml")
    assert caught.value.rule == "policy.toml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("generation = 'yes'", "generation = 'yes': input should be a valid boolean"),
        ("generation = 1", "generation = 1: input should be a valid boolean"),
        ("secure_aggregation = 'yes'", "secure_aggregation = 'yes': input should be a valid boolean"),
        ("least_participants = 2.0", "least_participants = 2.0: input should be a valid integer"),
        ("smallest_count = 5.0", "smallest_count = 5.0: input should be a valid integer"),
        ("least_colluding = 1.0", "least_colluding = 1.0: input should be a valid integer"),
        ("most_steps = '9'", "most_steps = '9': a number is needed"),
        ("format = true", "format = True: a number is needed"),
        ("[working_hours]\nbegin = 8\nend = '18:00'", "8 is not a time of day, such as '08:00'"),
        ("[working_hours]\nbegin = '8'\nend = '18:00'", "'8' is not a time of day, such as '08:00'"),
        ("delta = 0.5", "delta = 0.5: input should be less than or equal to 0.01"),
        ("metrics = ['acuracy']", "metrics: unknown figure 'acuracy': did you mean 'accuracy'?"),
        ("smallest_adapter = 9\nlargest_adapter = 5", "smallest_adapter = 9 is above largest_adapter = 5"),
        (
            "largest_epsilon_run = 4.0\nlargest_epsilon_total = 2.0",
            "largest_epsilon_run = 4 is above largest_epsilon_total = 2",
        ),
        *(
            (f"{name} = []", f"{name} = []: nothing is ever allowed; name at least one, or leave it out")
            for name in ("base_models", "tasks", "objectives", "submitters")
        ),
        (
            "[working_hours]\nbegin = '08:00'\nend = '08:00'",
            "working_hours: begin and end are the same, so that nothing is ever served",
        ),
        (
            "[working_hours]\nbegin = '08:00'\nend = '18:00'\ndays = []",
            "working_hours.days = []: nothing is ever served; name days, or leave it out",
        ),
        (
            "[working_hours]\nbegin = '08:00+02:00'\nend = '18:00'",
            "working_hours: begin and end are times of the zone and name none of their own",
        ),
    ],
)
def test_what_is_meant_otherwise_or_can_never_be_met_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(PolicyError) as caught:
        read_policy(tmp_path / "policy.toml")
    said_before = "everything is refused until this is mended: policy.toml: "
    assert str(caught.value).startswith(f"policy rule 'policy.toml': {said_before}{said}")
    assert "\n" not in str(caught.value)


def test_every_figure_of_a_reply_can_be_named_by_metrics() -> None:
    made = {
        **classification([0, 1, 1], [0, 1, 0], ("a", "b"), bootstrap_samples=10),
        **calibration([0.5, 0.9, 0.8], [True, True, False]),
        **language_modelling([1.0, 2.0], [3, 4], bootstrap_samples=10),
        **preference([0.1, -0.2], [0.0, 0.1], bootstrap_samples=10),
        **dict.fromkeys(TrainReport.model_fields),
    }
    named = tuple(name for name in made if name not in NOT_FIGURES)
    assert Policy(metrics=named).metrics == named


def test_a_policy_that_is_missing_refuses_everything(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="everything is refused: there is no "):
        read_policy(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_text("")
    assert read_policy(tmp_path / "policy.toml") == Policy()


SCORES = {
    "num_examples": 12, "accuracy": 0.5, "macro_f1": 0.25, "confusion": [[9, 0], [1, 2]],
    "per_class": {"a": {"f1": 0.5, "support": 9}, "b": {"f1": 0.1, "support": 3}},
}  # fmt: skip
FIGURES = ("accuracy", "macro_f1", "confusion", "per_class")


def test_metrics_that_are_not_allowed_stay() -> None:
    assert released(Policy(), SCORES, figures=FIGURES) == SCORES
    made = released(Policy(metrics=("accuracy",)), SCORES, figures=FIGURES)
    assert made == {**dict.fromkeys(FIGURES), "num_examples": 12, "accuracy": 0.5}
    assert released(Policy(metrics=()), {"num_examples": 3, "loss": 1.0}, figures=("loss",))["loss"] is None


@pytest.mark.parametrize(("smallest", "gone"), [(1, ()), (3, ("confusion", "per_class"))])
def test_figures_that_count_few_examples_stay(smallest: int, gone: tuple[str, ...]) -> None:
    """With the confusion matrix go the figures by class, from which its cells follow."""
    made = released(Policy(smallest_count=smallest), SCORES, figures=FIGURES)
    assert made == {**SCORES, **dict.fromkeys(gone)}


@pytest.mark.parametrize("name", ["confusion", "per_class"])
def test_a_figure_that_metrics_withholds_is_looked_at_too(name: str) -> None:
    """The matrix stays by ``metrics``; its small cells must not leave in precision and recall, nor the other way."""
    made = released(Policy(smallest_count=3, metrics=(name,)), SCORES, figures=FIGURES)
    assert made[name] is None


def test_a_rate_does_not_tell_how_few_are_wrong() -> None:
    """99 of 100 right: with ``smallest_count`` 5, no rate is told finer than 5 of 100."""
    rates = {"num_examples": 100, "accuracy": 0.99, "accuracy_interval": [0.96, 1.0], "loss": 0.123}
    made = released(Policy(smallest_count=5), rates, figures=("accuracy", "accuracy_interval", "loss"))
    assert made == {**rates, "accuracy": 1.0, "accuracy_interval": [0.95, 1.0]}


def test_a_reply_that_speaks_of_few_examples_stays() -> None:
    released(Policy(smallest_count=12), SCORES, figures=())
    with pytest.raises(PolicyError, match="'smallest_count'"):
        released(Policy(smallest_count=13), SCORES, figures=())


def test_largest_upload() -> None:
    check_upload(Policy(largest_upload_bytes=100), 100)
    check_upload(Policy(), 10**12)
    with pytest.raises(PolicyError, match="'largest_upload_bytes': the reply's size in bytes is 101, at most 100"):
        check_upload(Policy(largest_upload_bytes=100), 101)
