"""Whole experiments with other methods than FedAvg: baselines stay plain, restarts change no bit, limits end a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import tiny
from silotune.config import Config
from silotune.errors import ConfigError
from silotune.experiment.budget import matched, pooled_training
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

Make = Callable[..., Config]
SGD = {"optimizer": "sgd", "learning_rate": 0.1}


def adapter(run: RunFolder, mode: str) -> dict[str, Any]:
    return run.part(*mode.split("/")).load_adapter()[0]


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


@pytest.mark.parametrize(("optimizer", "budget"), [("adamw", "compute"), ("sgd", "time")])
def test_steps_shared_by_all_institutions_are_those_of_pooled_training(
    configuration: Make, optimizer: str, budget: str
) -> None:
    """FedSGD over batches of whatever a client holds: the mean gradient is the pooled one, and so is every step."""
    training = {"optimizer": optimizer, "learning_rate": 0.05, "batch_size": 64, "max_steps": 1, "schedule": "cosine"}
    shared = {"modes": ["federated", "centralized"], "rounds": 4, "algorithm": "fedsgd", "budget_match": budget}
    run = run_experiment(
        configuration(training={**training, "weight_decay": 0.1}, federation=shared, data={"partition": {"clients": 3}})
    )
    federated, pooled = adapter(run, "federated"), adapter(run, "centralized")
    for name, tensor in pooled.items():
        torch.testing.assert_close(federated[name], tensor, rtol=2e-4, atol=2e-6)
    start = run.part("federated").load_checkpoint()[0].memory
    assert any(name.startswith("optimizer/") for name in start) or optimizer == "sgd"
    assert "4 steps of the optimiser in every mode" in run.read_json("summary")["budget"]


def test_a_shared_step_is_of_as_many_examples_as_a_pooled_one(configuration: Make) -> None:
    def pooled(budget: str, batch: int, **federation: Any) -> tuple[int, int]:
        section = {"modes": ["centralized"], "rounds": 2, "algorithm": "fedsgd", "budget_match": budget, **federation}
        config = configuration(training={"batch_size": batch, "max_steps": 1}, federation=section)
        found = pooled_training(matched(config, (10, 20, 18)), (10, 20, 18))
        assert found.optimizer_state == "keep" and found.max_steps == 1
        return found.batch_size, found.gradient_accumulation

    assert pooled("compute", 2) == (6, 1)
    assert pooled("compute", 20) == (20, 3)
    assert pooled("time", 20) == (20, 1)
    assert pooled("compute", 4, clients_per_round=2) == (8, 1)


def test_an_institution_alone_keeps_its_moments_as_the_server_does(configuration: Make) -> None:
    section = {"modes": ["isolated"], "rounds": 3, "algorithm": "fedsgd"}
    run = run_experiment(
        configuration(training={"max_steps": 1}, federation=section, data={"partition": {"clients": 1}})
    )
    kept = {"optimizer_state": "keep", "max_steps": 1}
    other = {"modes": ["isolated"], "rounds": 3}
    long = configuration(training=kept, federation=other, data={"partition": {"clients": 1}}, record={"name": "long"})
    tiny.assert_same_bits(adapter(run, "isolated/client-0"), adapter(run_experiment(long), "isolated/client-0"))
