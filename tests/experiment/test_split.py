"""Whole runs of split training: equal to the whole federated run, resume, what the record says, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny
from silotune.config import Config
from silotune.errors import ConfigError, ModelError
from silotune.evaluation import inversion
from silotune.experiment.audit import verify_run
from silotune.experiment.estimate import estimate
from silotune.experiment.leakage_report import FOLDER, read_report
from silotune.experiment.prepare import prepare
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four blocks."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("deep")
    sizes = {**tiny.configuration("llama").to_dict(), "num_hidden_layers": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(sizes)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(configuration: Make, deep_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A run on it; ``split`` gives the section's keys, None for none."""
    monkeypatch.setattr(inversion, "PUBLIC_TOKENS", 256)

    def made(split: Mapping[str, Any] | None, **sections: Any) -> Config:
        federation = {**({} if split is None else {"split": dict(split)}), **sections.pop("federation", {})}
        model = {"name": str(deep_folder), "fast": "off", **sections.pop("model", {})}
        adapter = {"targets": "all-linear", **sections.pop("adapter", {})}
        data = {"num_train": 24, "num_validation": 6, "num_test": 6, **sections.pop("data", {})}
        return configuration(federation=federation, model=model, adapter=adapter, data=data, **sections)

    return made


def adapter_of(run: RunFolder) -> Any:
    return run.part("federated").load_adapter()[0]


@pytest.mark.end_to_end
@pytest.mark.parametrize(("objective", "algorithm"), [("choice", "fedavg"), ("classify", "fedadam")])
def test_copies_that_are_averaged_are_the_whole_federated_run_to_the_bit(
    make: Make, objective: str, algorithm: str
) -> None:
    sections = {"training": {"objective": objective}, "federation": {"algorithm": algorithm}}
    whole = run_experiment(make(None, **sections))
    split = run_experiment(make({"schedule": "hierarchical", "compress": "none"}, **sections))
    tiny.assert_same_bits(adapter_of(whole), adapter_of(split))
    losses = [[row["train_loss"] for row in run.part("federated").read_rows("metrics")] for run in (whole, split)]
    assert losses[0] == losses[1]


@pytest.mark.end_to_end
@pytest.mark.parametrize(("split", "told"), [(None, "sends no activations"), ({}, "the compute server sees them")])
def test_the_leakage_report_says_whether_activations_were_sent(
    make: Make, split: Mapping[str, Any] | None, told: str
) -> None:
    federation = {"modes": ["federated"], "rounds": 1}
    run = run_experiment(make(split, federation=federation, audit={"leakage": True, "shadows": 0}))
    report = read_report(run.path / FOLDER)
    assert report is not None
    assert [told in item["why"] for item in report["not_tried"] if item["attack"].startswith("activations")] == [True]


@pytest.mark.end_to_end
@pytest.mark.parametrize("schedule", ["serial", "client-batch"])
def test_a_run_resumes_with_the_same_bits_and_says_what_crossed(make: Make, schedule: str) -> None:
    class StoppedError(Exception):
        pass

    def stopping(event: str, fields: Mapping[str, Any]) -> None:
        if event == "client_finished" and fields["round"] == 2:
            raise StoppedError  # in the middle of a round

    config = make({"schedule": schedule})
    whole = run_experiment(config)
    with pytest.raises(StoppedError):
        run_experiment(config, observer=stopping)
    cut = resume_experiment(whole.path.with_name("demo-2"))
    tiny.assert_same_bits(adapter_of(whole), adapter_of(cut))
    rows = [[row.get("crossings") for row in run.part("federated").read_rows("metrics")] for run in (whole, cut)]
    assert rows[0] == rows[1] and rows[0][0] is None
    told = rows[0][1]
    assert set(told) == {f"{what}_{way}" for what in ("activations", "gradients", "steps") for way in ("up", "down")}
    assert 0 < told["activations_up"]["error_mean"] < 0.02
    verify_run(whole.path)
    said = whole.read_json("privacy")["statement"]
    assert any(line.startswith("split training moves compute, not trust") for line in said)


@pytest.mark.end_to_end
def test_only_the_servers_part_moves_where_the_clients_rest(make: Make) -> None:
    run = run_experiment(make({"train": "server", "schedule": "serial"}, federation={"rounds": 1}))
    moved, start = adapter_of(run), prepare(make(None)).initial
    changed = {name.split(".layers.")[1][0] for name in moved if not moved[name].equal(start[name])}
    assert changed == {"1", "2"}
    (row,) = (row for row in run.part("federated").read_rows("metrics") if row["round"])
    assert "error_mean" not in row["crossings"]["gradients_down"]  # nobody wants them


@pytest.mark.end_to_end
def test_an_estimate_rehearses_the_split_run(make: Make) -> None:
    config = make({"schedule": "client-batch", "compress": "bf16"}, federation={"rounds": 1})
    told = estimate(config)
    parted = told["split"]
    assert parted["client_parameters"] + parted["server_parameters"] == told["parameters"]
    assert parted["server_parameters"] * 2 < told["parameters"]
    assert any("a round of split training sends" in note for note in told["notes"])
    row = run_experiment(config).part("federated").read_rows("metrics")[1]
    crossed = sum(each["bytes"] for each in row["crossings"].values())
    whole_round = told["bytes_per_round"]
    assert whole_round == pytest.approx(row["bytes_up"] + row["bytes_down"], rel=0.25)
    assert crossed < row["bytes_up"] + row["bytes_down"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"dropout": 0.1}}, "who cannot draw dropout each by a seed of its own"),
        ({"privacy": {"dp": {"type": "example", "epsilon": 3}}}, "needs the gradient or update of the whole model"),
        ({"privacy": {"protection": "secure_sum"}}, "a part of each is at the compute server"),
        ({"federation": {"algorithm": "scaffold"}, "training": {"optimizer": "sgd"}}, "corrects no gradients"),
        ({"federation": {"algorithm": "fedadam"}}, "would move the clients' part alone"),
        ({"federation": {"lora": "freeze-a"}}, "leave it at 'factors'"),
        ({"federation": {"modes": ["isolated"]}}, "name 'federated' in federation.modes"),
        ({"federation": {"upload": {"values": "int8"}}}, "federation.split.compress is for what crosses the cut"),
        ({"training": {"objective": "dpo"}}, "whose middle a client of federation.split has not"),
        (
            {"training": {"objective": "classify"}, "federation": {"split": {"train": "server"}}},
            "the head of training.objective = 'classify'",
        ),
        ({"training": {"optimizer_state": "keep"}}, "take 'reset'"),
        ({"evaluation": {"per_client": True}}, "evaluation.per_client changes what is averaged"),
    ],
)
def test_what_does_not_go_with_split_training_is_one_line(make: Make, sections: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_experiment(make({"schedule": "client-batch"}, **sections))


def test_a_cut_that_leaves_no_block_is_refused_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leave no block for the compute server"):
        run_experiment(make({"first": 3, "last": 1}))
    assert not (tmp_path / "runs").exists()
