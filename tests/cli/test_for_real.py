"""The commands as a newcomer types them, one after another, over the real layers: no stand-ins."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from silotune.config import load_config
from silotune.record.runs import RunFolder
from silotune.shipped import shipped

pytestmark = pytest.mark.end_to_end

SMALL = (
    "data.num_train=40", "data.num_validation=6", "data.num_test=12", "data.partition.clients=2",
    "training.max_steps=2", "federation.rounds=2", "evaluation.bootstrap_samples=20",
)  # fmt: skip
PROMPT = "Northgate Bank said deposits swelled in the first quarter."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """What ``silotune run`` leaves behind, of all modes."""
    from silotune.experiment.run import run_experiment

    folder = tmp_path_factory.mktemp("runs")
    return run_experiment(load_config(shipped("quickstart"), [*SMALL, f"record.folder='{folder}'"]))


def test_quickstart_ends_with_its_tables_pictures_and_answers(
    silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silotune.config.load_config", lambda path, changes: load_config(path, [*changes, *SMALL]))
    done = silotune("quickstart", "--folder", tmp_path)
    assert done.code == 0, done.err
    for words in (
        "federated round 2/2: loss",
        "each alone: mean",
        "three test prompts",
        "what to type next",
        "2 rounds;",
    ):
        assert words in done.out
    made = RunFolder.open(tmp_path / "quickstart")
    for picture in ("accuracy.png", "skew.png"):
        assert (made.path / picture).read_bytes().startswith(b"\x89PNG")
    assert f"run folder: {made.path}" in done.out


def test_run_and_resume_end_with_the_table(silotune: Callable[..., Any], tmp_path: Path) -> None:
    changes = [word for change in (*SMALL, f"record.folder='{tmp_path}'") for word in ("--set", change)]
    done = silotune("run", "quickstart", *changes)
    assert done.code == 0, done.err
    again = silotune("resume", tmp_path / "quickstart", "--json")
    assert again.code == 0, again.err
    summary = json.loads(again.out)
    accuracy = RunFolder.open(tmp_path / "quickstart").part("federated").read_json("result")["metrics"]["accuracy"]
    assert summary["federated"]["accuracy"] == accuracy and f"{100 * accuracy:.1f} %" in done.out


@pytest.mark.parametrize("mode", ["federated", "centralized", "isolated/client-1"])
def test_evaluate_finds_the_figures_of_the_run(silotune: Callable[..., Any], run: RunFolder, mode: str) -> None:
    done = silotune("evaluate", run.path, "--mode", mode, "--json")
    assert done.code == 0, done.err
    found, expected = json.loads(done.out), run.part(*mode.split("/")).read_json("result")
    assert found["split"] == "test" and found["num_examples"] == expected["num_examples"] == 12
    assert found["accuracy"] == expected["metrics"]["accuracy"]
    assert found["confusion"] == expected["metrics"]["confusion"]


def test_generate_and_chat_answer_as_the_exported_model(
    silotune: Callable[..., Any], run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = silotune("export", run.path, tmp_path / "whole", "--merge")
    assert done.code == 0 and "transformers.AutoModelForCausalLM.from_pretrained" in done.out, done.err
    model, words = (kind.from_pretrained(tmp_path / "whole") for kind in (AutoModelForCausalLM, AutoTokenizer))
    messages = [{"role": "user", "content": PROMPT}]
    line = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**line, max_new_tokens=8, do_sample=False)[0, line["input_ids"].shape[1] :]
    expected = words.decode(ids, skip_special_tokens=True).strip()
    assert expected

    asked = silotune("generate", run.path, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
    assert asked.code == 0 and json.loads(asked.out)["answers"][0]["answer"].strip() == expected, asked.err
    _type(monkeypatch, [PROMPT])
    assert silotune("generate", run.path, "--max-new-tokens", 8).out.strip() == expected
    _type(monkeypatch, [PROMPT, "/reset", PROMPT, "/quit"])
    talked = silotune("chat", run.path, "--max-new-tokens", 8, "--temperature", 0)
    assert talked.code == 0 and talked.out.count(expected) == 2, talked.err


def _type(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_an_exported_adapter_report_and_estimate(silotune: Callable[..., Any], run: RunFolder, tmp_path: Path) -> None:
    done = silotune("export", run.path, tmp_path / "adapter", "--json")
    assert done.code == 0 and json.loads(done.out)["merged"] is False, done.err
    kept = run.part("federated").path / "adapter"
    before, after = (
        {file.name: file.read_bytes() for file in place.iterdir()} for place in (kept, tmp_path / "adapter")
    )
    assert before.items() <= after.items()
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert after.keys() - before.keys() == beside
    told = silotune("report", run.path)
    assert told.code == 0 and "federated" in told.out and "centralised" in told.out, told.err
    changes = [word for change in SMALL for word in ("--set", change)]
    looked = silotune("doctor", "quickstart", *changes, "--json")
    assert looked.code == 0, looked.err
    estimate = json.loads(looked.out)["estimate"]
    summary = run.read_json("summary")
    assert (
        estimate["clients"] == 2 and estimate["seconds"] > 0 and estimate["memory_bytes"] > estimate["parameters"] * 4
    )
    assert estimate["bytes_per_round"] * 2 == pytest.approx(summary["bytes_up"] + summary["bytes_down"], rel=0.05)


def test_a_loss_that_is_not_finite_ends_the_command_with_one_line_and_its_code(
    silotune: Callable[..., Any], tmp_path: Path
) -> None:
    steep = (
        "training.optimizer='sgd'",
        "training.learning_rate=1e30",
        "training.clip_norm=0",
        "model.attention='sdpa'",
    )
    modes = "federation.modes=['federated']"
    changes = [word for change in (*SMALL, *steep, modes, f"record.folder='{tmp_path}'") for word in ("--set", change)]
    done = silotune("run", "quickstart", *changes)
    assert done.code == 6
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "lower training.learning_rate" in errors[0], done.err
    left = RunFolder.open(tmp_path / "quickstart")
    assert not left.has("summary") and not list(left.path.rglob(".*tmp"))
    assert silotune("resume", left.path).code == 6  # the cause is still there, and so is the run


def test_the_commands_take_a_run_that_was_fetched_from_sites(
    silotune: Callable[..., Any], run: RunFolder, tmp_path: Path
) -> None:
    """Nobody here knows who holds what; all else is there, and it is scored on what the coordinator scored on."""
    fetched = RunFolder(Path(shutil.copytree(run.path, tmp_path / "fetched")))
    fetched.write_json("partition", {"data_sha256": fetched.read_json("partition")["data_sha256"]})
    resumed = silotune("resume", fetched.path)
    assert resumed.code == 0 and "run folder: " in resumed.out and "by client" not in resumed.out
    figures = json.loads(silotune("evaluate", fetched.path, "--json").out)
    assert figures["accuracy"] == fetched.part("federated").read_json("result")["metrics"]["accuracy"]
    for command in (("report",), ("export", tmp_path / "out"), ("generate", "--prompt", PROMPT)):
        done = silotune(command[0], fetched.path, *command[1:])
        assert done.code == 0, done.err
    refused = silotune("evaluate", fetched.path, "--split", "train")
    assert refused.code == 3 and "'train' holds no examples" in refused.err
    (fetched.path / "summary.json").unlink()
    refused = silotune("resume", fetched.path)
    assert refused.code == 7 and "silotune resume NAME --kit KIT" in refused.err
