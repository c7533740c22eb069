"""Presets: they fill what is left open, change nothing that is said, and say what they chose."""

from __future__ import annotations

from typing import Any

import pytest

from silotune.config import Config, from_mapping
from silotune.errors import ConfigError
from silotune.settings.presets import HEAD_RATES, RATES, STEPS, said
from silotune.settings.sections import FederationSection, TrainingSection

AUTO = {"preset": "auto"}


def made(**sections: Any) -> Config:
    return from_mapping({"federation": AUTO, **sections})


def test_what_is_left_open_becomes_a_step_that_all_clients_share() -> None:
    config = made(data={"partition": {"clients": 8}})
    assert config.federation.algorithm.type == "fedsgd" and config.federation.rounds == STEPS
    assert (config.training.max_steps, config.training.batch_size) == (1, 2)
    assert config.training.learning_rate == RATES["lora"] and config.evaluation.every == STEPS // 4


@pytest.mark.parametrize("adapter", ["ia3", {"type": "ia3"}])
def test_the_rate_is_that_of_the_adapter(adapter: Any) -> None:
    assert made(adapter=adapter).training.learning_rate == RATES["ia3"]
    assert made(adapter="lora", training={"objective": "classify"}).training.learning_rate == HEAD_RATES["lora"]
    assert made(adapter="none").training.learning_rate == TrainingSection().learning_rate  # not measured: as it was


def test_what_is_said_stays() -> None:
    training = {"learning_rate": 0.5, "batch_size": 7, "weight_decay": 0.1}
    config = made(training=training, federation={**AUTO, "rounds": 60}, evaluation={"every": 3})
    assert (config.training.learning_rate, config.training.batch_size, config.training.weight_decay) == (0.5, 7, 0.1)
    assert (config.federation.rounds, config.evaluation.every) == (60, 3)
    assert from_mapping(config.model_dump(mode="json")) == config == from_mapping(dict(config))


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"epochs": 1.0}},
        {"training": {"max_steps": 4}},
        {"training": {"optimizer_state": "keep"}},
        {"federation": {**AUTO, "algorithm": "fedprox"}},
        {"federation": {**AUTO, "lora": "svd"}},
        {"federation": {**AUTO, "lora": {"type": "exact-residual"}}},
        {"federation": {**AUTO, "clock": {"buffer": 2}}},
    ],
)
def test_what_needs_local_steps_keeps_them_and_the_run_says_so(sections: dict[str, Any]) -> None:
    config = made(**sections)
    assert not config.federation.algorithm.shares_step and config.training.max_steps != 1
    (line,) = said(config.federation, config.training)
    assert "local steps" in line and config.federation.algorithm.type in line


@pytest.mark.parametrize(
    ("sections", "batch"),
    [
        ({"data": {"partition": {"clients": 4}}}, 4),
        ({"data": {"partition": {"clients": 100}}}, 1),
        ({"data": {"partition": {"clients": 100}}, "training": {"objective": "kto"}}, 2),
        ({"federation": {**AUTO, "clients_per_round": 2}}, 8),
        ({"federation": {**AUTO, "budget_match": "time"}}, 16),
    ],
)
def test_clients_share_out_the_examples_of_a_pooled_step(sections: dict[str, Any], batch: int) -> None:
    assert made(**sections).training.batch_size == batch


def test_too_few_steps_to_learn_anything_are_refused_with_the_number() -> None:
    with pytest.raises(
        ConfigError, match=r"4 steps learn no more than the commonest answer: set federation.rounds to 48"
    ):
        made(federation={**AUTO, "rounds": 4})
    assert made(federation={**AUTO, "rounds": 4}, training={"max_steps": 8}).federation.rounds == 4


def test_the_introduction_names_what_was_chosen_and_nothing_without_a_preset() -> None:
    config = made(data={"partition": {"clients": 8}})
    (line,) = said(config.federation, config.training)
    assert (
        "fedsgd, rate 0.001, 100 steps, each of 2 examples at every client" in line and "more rounds and bytes" in line
    )
    assert said(FederationSection(), TrainingSection()) == []


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"max_steps": 2}, "set training.max_steps = 1"),
        ({"max_steps": 1, "optimizer_state": "keep"}, "leave training.optimizer_state out"),
    ],
)
def test_a_shared_step_refuses_what_only_local_steps_have(training: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_mapping({"federation": {"algorithm": "fedsgd"}, "training": training})


def test_no_step_is_shared_in_a_buffer() -> None:
    federation = {"algorithm": "fedsgd", "clock": {"buffer": 2}}
    with pytest.raises(ConfigError, match=r"leave federation.clock.buffer out"):
        from_mapping({"federation": federation, "training": {"max_steps": 1}})
