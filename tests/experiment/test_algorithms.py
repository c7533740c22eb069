"""Whole experiments with other methods than FedAvg: baselines stay plain, restarts change no bit, limits end a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

import tiny
from silotune.config import Config
from silotune.errors import ConfigError
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

Make = Callable[..., Config]
SGD = {"optimizer": "sgd", "learning_rate": 0.1}


def adapter(run: RunFolder, mode: str) -> dict[str, Any]:
    return run.part(mode).load_adapter()[0]


@pytest.mark.end_to_end
def test_a_stopped_scaffold_run_goes_on_to_the_same_bits_and_leaves_the_baseline_alone(configuration: Make) -> None:
    both = {"modes": ["federated", "centralized"], "rounds": 3}
    plain = run_experiment(configuration(training=SGD, federation=both, record={"name": "plain"}))
    whole = run_experiment(
        configuration(training=SGD, federation={**both, "algorithm": "scaffold"}, record={"name": "whole"})
    )
    tiny.assert_same_bits(adapter(whole, "centralized"), adapter(plain, "centralized"))
    assert any((adapter(whole, "federated")[n] != t).any() for n, t in adapter(plain, "federated").items())

    class StoppedError(Exception):
        pass

    def stop(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_finished" and fields["round"] == 2:
            raise StoppedError

    cut = configuration(training=SGD, federation={**both, "algorithm": "scaffold"}, record={"name": "cut"})
    with pytest.raises(StoppedError):
        run_experiment(cut, observer=stop)
    resumed = resume_experiment(cut.record.folder / "cut")
    for mode in both["modes"]:
        tiny.assert_same_bits(adapter(resumed, mode), adapter(whole, mode))


@pytest.mark.end_to_end
def test_an_attack_is_simulated_noted_and_withstood(configuration: Make) -> None:
    five = {"partition": {"clients": 5, "scheme": "iid"}}
    attack = {"type": "sign-flip", "clients": 1, "factor": 1000.0}
    norms = {}
    for name, federation in {
        "clean": {},
        "mean": {"attack": attack},
        "median": {"attack": attack, "aggregation": "median"},
    }.items():
        run = run_experiment(
            configuration(
                data=five,
                federation={**federation, "rounds": 1},
                training={"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 1},
                evaluation={"bootstrap_samples": 0},
                record={"name": name},
            )
        )
        notes = run.read_json("summary")["notes"]
        assert ("simulated attack: 1 of the clients are malicious (sign-flip, x 1000)" in notes) == (name != "clean")
        norms[name] = max(float(tensor.abs().max()) for tensor in adapter(run, "federated").values())
    assert norms["mean"] > 10 * norms["clean"] and norms["median"] < 2 * norms["clean"]


@pytest.mark.end_to_end
def test_a_budget_of_bytes_and_a_target_end_the_federated_run(configuration: Make) -> None:
    limited = run_experiment(configuration(federation={"rounds": 4, "budget": {"bytes": 1}}))
    result = limited.part("federated").read_json("result")
    assert result["rounds"] == 1 and "federation.budget.bytes = 1:" in result["stopped"]
    met = run_experiment(configuration(federation={"rounds": 4}, evaluation={"target": 0.0, "bootstrap_samples": 0}))
    result = met.part("federated").read_json("result")
    assert result["rounds"] == 1 and result["stopped"] == "the selection metric reached evaluation.target = 0"


def test_joules_are_not_budgeted_without_a_meter(configuration: Make) -> None:
    config = configuration(federation={"budget": {"joules": 5.0}}, record={"energy": False})
    with pytest.raises(ConfigError, match=r"federation\.budget\.joules needs a meter"):
        run_experiment(config)
    assert not config.record.folder.exists()
