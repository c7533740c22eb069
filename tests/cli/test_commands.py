from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from finished_run import finished_run, summary
from silotune import shipped
from silotune.config import from_mapping, load_config
from silotune.errors import MissingPackageError
from silotune.experiment.prepare import prepare
from silotune.record import environment
from silotune.record.runs import RunFolder


def test_run_shows_a_line_a_round_and_the_table(silotune, below):
    outcome = silotune("run", "fpb", "--set", "seed=7", "--set", "federation.rounds=60")
    assert outcome.code == 0
    assert below["config"].seed == 7 and below["config"].federation.rounds == 60
    assert "federated round 2/2: loss 0.500, accuracy 70.0 %, 1.5 s" in outcome.out
    assert "each alone bank-1 finished: accuracy 60.0 %" in outcome.out
    assert "note: 3 prompts were cut [left]" in outcome.out
    assert "client bank-1 failed in round 2: timed out" in outcome.out
    assert "each alone: best" in outcome.out and "silotune chat" in outcome.out


@pytest.mark.parametrize("arguments", [("run", "fpb"), ("resume", "runs/x")])
def test_json_is_one_object_and_nothing_else(silotune, below, arguments):
    outcome = silotune(*arguments, "--json")
    assert outcome.code == 0
    value = json.loads(outcome.out)
    assert value["federated"]["accuracy"] == 0.8 and Path(value["folder"]).is_dir()
    assert "a library talks" in outcome.err


def test_a_run_may_be_resumed(silotune, below):
    assert silotune("resume", "runs/x").code == 0
    assert below["resumed"] == Path("runs/x")


def test_quickstart_ends_with_table_pictures_answers_and_what_next(silotune, below, tmp_path):
    outcome = silotune("quickstart", "--seed", 5, "--folder", tmp_path / "here")
    assert outcome.code == 0
    assert below["config"].seed == 5 and below["config"].record.folder == tmp_path / "here"
    run = tmp_path / "runs" / "demo"
    assert (run / "accuracy.png").is_file() and (run / "skew.png").is_file()
    for words in ("each alone: mean", "[2] good news?", "base of demo: [2] GOOD", "federated of demo: [2] GOOD"):
        assert words in outcome.out
    assert f"run folder: {run}" in outcome.out and "what to type next" in outcome.out


def test_quickstart_json_has_the_promised_shape(silotune, below, tmp_path):
    outcome = silotune("quickstart", "--json")
    assert json.loads(outcome.out) == {
        "isolated": {"accuracy": {"mean": 0.61, "best": 0.7}, "macro_f1": {"mean": 0.55, "best": 0.66}},
        "federated": {"accuracy": 0.8, "macro_f1": 0.79},
        "centralized": {"accuracy": 0.82, "macro_f1": 0.81},
        "seconds": 61.2,
        "bytes_up": 4_100_000,
        "bytes_down": 4_200_000,
        "run_dirs": [str(tmp_path / "runs" / "demo")],
    }
    assert below["config"].seed == load_config(shipped.shipped("quickstart")).seed


def test_evaluate_says_what_was_scored_on_what(silotune, below):
    outcome = silotune("evaluate", "runs/x", "--data", "gold.jsonl", "--scoring", "generation")
    assert below["evaluate"] == {
        "mode": "federated", "split": "test", "data": Path("gold.jsonl"), "scoring": "generation",
    }  # fmt: skip
    for words in ("nano + demo/federated", "50.0 %", "40.0 % to 60.0 %", "recall 100.0 %", "2 examples", "1.5"):
        assert words in outcome.out
    assert "confusion" not in outcome.out and "note: gold.jsonl: read as cp1252" in outcome.out
    value = json.loads(silotune("evaluate", "runs/x", "--json").out)
    assert value["confusion"] == [[1]]


def test_evaluate_refuses_an_unknown_scoring(silotune, below):
    outcome = silotune("evaluate", "runs/x", "--scoring", "likelyhood", "--json")
    assert outcome.code == 2 and "did you mean 'likelihood'" in outcome.err and "evaluate" not in below


def test_generate_answers_a_prompt(silotune, below):
    options = ("--temperature", 0.5, "--top-p", 0.9, "--top-k", 5, "--repetition-penalty", 1.2, "--seed", 3)
    outcome = silotune("generate", "runs/x", "--prompt", "hello", "--max-new-tokens", 8, *options)
    assert outcome.out == "federated of x: HELLO\n"
    sampling = below["sampling"]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (8, 0.5, 0.9)
    assert (sampling.top_k, sampling.repetition_penalty, sampling.seed) == (5, 1.2, 3)


def test_generate_reads_files_and_standard_input(silotune, below, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    chat = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]}
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n' + json.dumps(chat) + "\n")
    assert silotune("generate", "nano", "--file", tmp_path / "a.txt", "--base", "--no-stream").out == (
        "base of nano: ONE\nbase of nano: TWO\n"
    )
    value = json.loads(silotune("generate", "nano", "--file", tmp_path / "a.jsonl", "--json").out)
    assert value["answers"] == [
        {"prompt": "one", "answer": "federated of nano: ONE"},
        {"prompt": "hi", "answer": "federated of nano: HI"},
    ]
    assert below["messages"] == (("system", "be kind"), ("user", "hi"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert "FROM A PIPE" in silotune("generate", "nano").out


def test_a_line_ends_where_its_file_says(silotune, below, tmp_path):
    """Unicode's own separators may stand in a prompt."""
    (tmp_path / "a.txt").write_bytes("one\u2028two\r\nthree".encode())
    value = json.loads(silotune("generate", "nano", "--file", tmp_path / "a.txt", "--json").out)
    assert [answer["prompt"] for answer in value["answers"]] == ["one\u2028two", "three"]


def test_prompts_stand_in_tables_and_in_text_of_any_encoding(silotune, below, tmp_path):
    (tmp_path / "a.csv").write_bytes("id;prompt\n1;Übel, müde\n".encode("cp1252"))
    (tmp_path / "a.txt").write_bytes("Übel, müde\n".encode("utf-16"))
    for name in ("a.csv", "a.txt"):
        value = json.loads(silotune("generate", "nano", "--file", tmp_path / name, "--json").out)
        assert [answer["prompt"] for answer in value["answers"]] == ["Übel, müde"]
    (tmp_path / "b.csv").write_text("note\nx\n")
    assert "has no 'prompt'" in silotune("generate", "nano", "--file", tmp_path / "b.csv").err


@pytest.mark.parametrize(
    "row",
    ["nonsense private", '{"text": "private"}', '{"messages": [{"role": "user"}]}', '{"messages": []}', "3"],
)
def test_a_bad_row_is_named_by_number(silotune, below, tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n' + row + "\n")
    outcome = silotune("generate", "nano", "--file", tmp_path / "a.jsonl")
    assert (
        outcome.code == 3
        and (" row 2" in outcome.err or " line 2" in outcome.err)
        and "private" not in outcome.err
        and not outcome.out
    )


def test_generate_without_a_prompt(silotune, below, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert silotune("generate", "nano").code == 2
    assert silotune("generate", "nano", "--prompt", "x", "--file", "y").code == 2
    assert silotune("generate", "nano", "--file", tmp_path / "none").code == 3
    (tmp_path / "empty.txt").write_text("\n")
    assert silotune("generate", "nano", "--file", tmp_path / "empty.txt").code == 3


def test_chat_remembers_until_reset(silotune, below, monkeypatch):
    said = iter(["hello", "", "again", "too long", "/reset", "anew"])

    def answer(_: str) -> str:
        line = next(said, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", answer)
    outcome = silotune("chat", "runs/x")
    assert outcome.code == 0
    assert "federated of x: AGAIN" in outcome.out and "fills the context; /reset" in outcome.err
    assert below["messages"] == [("user", "anew")]
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    assert silotune("chat", "runs/x").code == 0


def test_export_says_how_to_load_it(silotune, below, tmp_path):
    outcome = silotune("export", "runs/x", tmp_path / "out", "--merge", "--mode", "centralized")
    assert below["export"] == (Path("runs/x"), True, "centralized")
    assert "transformers.AutoModelForCausalLM" in outcome.out
    assert "peft.AutoPeft" in silotune("export", "runs/x", tmp_path / "out").out
    assert json.loads(silotune("export", "runs/x", tmp_path / "out", "--json").out)["merged"] is False


def test_report_of_one_run_and_of_several(silotune, tmp_path):
    runs = [finished_run(tmp_path).path, finished_run(tmp_path, seconds=10.0).path]
    assert "each alone: mean" in silotune("report", runs[0]).out
    both = silotune("report", *runs).out
    assert "demo-2" in both and "61.2 s" in both
    value = json.loads(silotune("report", *runs, "--json").out)
    assert [Path(row["folder"]) for row in value["runs"]] == runs


def test_report_of_what_is_no_finished_run(silotune, tmp_path):
    assert silotune("report", tmp_path).code == 7
    run = RunFolder.create(tmp_path, "half", config={})
    outcome = silotune("report", run.path, "--json")
    assert outcome.code == 7 and "silotune resume" in outcome.err and not outcome.out


@pytest.mark.parametrize("text", ["{}", "[]", '{"task": 1}'])
def test_report_of_a_damaged_summary(silotune, tmp_path, text):
    run = finished_run(tmp_path)
    (run.path / "summary.json").write_text(text)
    outcome = silotune("report", run.path)
    assert outcome.code == 7 and "summary.json is damaged" in outcome.err and "Traceback" not in outcome.err


def test_a_grid_is_not_a_run(silotune):
    outcome = silotune("run", "benchmarks/embedded")
    assert outcome.code == 2 and "is a grid of runs: silotune benchmark embedded" in outcome.err


def test_configs_are_listed_shown_and_copied(silotune, tmp_path, monkeypatch):
    names = shipped.names()
    assert {"fpb", "quickstart"} <= set(names)
    listed = silotune("configs", "list").out
    assert all(name in listed for name in names)
    rows = json.loads(silotune("configs", "list", "--json").out)
    assert [row["name"] for row in rows] == names and all(row["summary"] for row in rows)
    assert silotune("configs", "show", "fpb").out == shipped.shipped("fpb").read_text()
    monkeypatch.chdir(tmp_path)
    assert silotune("configs", "copy", "fpb").code == 0
    assert (tmp_path / "fpb.toml").read_bytes() == shipped.shipped("fpb").read_bytes()
    assert silotune("configs", "copy", "fpb").code == 2
    assert silotune("configs", "copy", "fpb", "mine.toml").code == 0
    (tmp_path / "folder").mkdir()
    assert silotune("configs", "copy", "fpb", "folder").code == 0
    assert (tmp_path / "folder" / "fpb.toml").is_file()


def test_an_unknown_configuration_gets_the_nearest(silotune):
    outcome = silotune("configs", "show", "quickstar")
    assert outcome.code == 2 and "did you mean 'quickstart'" in outcome.err


def test_a_configuration_is_a_path_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("fpb") == shipped.find("fpb.toml") == shipped.shipped("fpb")
    (tmp_path / "fpb").mkdir()
    assert shipped.find("fpb") == shipped.shipped("fpb")
    (tmp_path / "fpb.toml").write_text("seed = 1")
    assert shipped.find("fpb.toml") == Path("fpb.toml")


def test_configurations_of_a_wheel_come_first(tmp_path, monkeypatch):
    package = tmp_path / "silotune"
    (package / "configs" / "more").mkdir(parents=True)
    (package / "configs" / "more" / "x.toml").write_text("seed = 1\n")
    monkeypatch.setattr(shipped, "__file__", str(package / "shipped.py"))
    assert shipped.names() == ["more/x"] and shipped.find("more/x").is_file()
    assert shipped.summary("more/x") == ""


def test_tasks_are_listed(silotune):
    assert "finance-news" in silotune("tasks").out
    rows = json.loads(silotune("tasks", "--json").out)
    assert {"name", "summary", "metric", "options", "fields", "hub_id", "embedded"} == set(rows[0])


def test_doctor_shows_the_machine(silotune, below):
    outcome = silotune("doctor")
    assert outcome.code == 0 and "cores" in outcome.out and "no problems found" in outcome.out
    value = json.loads(silotune("doctor", "--json").out)
    assert value["problems"] == [] and value["machine"]["cores"] >= 1 and "estimate" not in value


def test_doctor_estimates_a_configuration(silotune, below):
    outcome = silotune("doctor", "fpb", "--set", "federation.rounds=60")
    assert (
        outcome.code == 0 and "1,000" in outcome.out and "1 min 40 s" in outcome.out and "note: a note" in outcome.out
    )
    below["memory_bytes"] = 10**15
    value = json.loads((outcome := silotune("doctor", "fpb", "--json")).out)
    assert outcome.code == 1 and "main memory: 1000.0 TB needed" in value["problems"][0]
    assert "adapter.type=qlora" in value["problems"][0]
    assert "problem: main memory" in silotune("doctor", "fpb").out


def test_doctor_loads_nothing_whose_weights_alone_do_not_fit(silotune, below):
    below["weights_bytes"] = 10**15
    outcome = silotune("doctor", "fpb", "--json")
    value = json.loads(outcome.out)
    assert outcome.code == 1 and "main memory: 1000.0 TB needed" in value["problems"][0]
    assert value["estimate"] == {"memory_bytes": 10**15}  # no steps were tried


def test_doctor_names_what_is_missing(silotune, below, monkeypatch):
    monkeypatch.setattr(environment, "version_of", lambda name: None if name in ("bitsandbytes", "peft") else "1")
    monkeypatch.setattr(environment, "gpus", lambda: [{"name": "GPU", "memory_bytes": 8 * 10**9}])
    outcome = silotune("doctor", "fpb", "--set", "adapter.type=qlora")
    assert outcome.code == 1 and "silotune[int4]" in outcome.out and "peft is not installed" in outcome.out
    assert "8.0 GB" in outcome.out and "not found" in outcome.out


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [
        ("federation.engine=ray", "ray", "ray"),
        ("privacy.protection=he", "tenseal", "he"),
        ("federation.budget.joules=5", "codecarbon", "energy"),
        ("federation.upload.zstd=3", "zstandard", "zstd"),
    ],
)
def test_doctor_names_what_a_run_would_stop_at(silotune, below, monkeypatch, setting, package, extra):
    monkeypatch.setattr(environment, "version_of", lambda name: None if name == package else "1")
    outcome = silotune("doctor", "fpb", "--set", setting, "--json")
    assert outcome.code == 1 and f"{package}: pip install 'silotune[{extra}]'" in json.loads(outcome.out)["problems"][0]


def test_a_run_stops_at_all_that_is_missing_before_it_loads(monkeypatch):
    monkeypatch.setattr(environment, "version_of", lambda name: None)
    sections = {"precision": "int4", "name": "/nowhere"}, {"type": "qlora"}
    config = from_mapping({"model": sections[0], "adapter": sections[1], "federation": {"upload": {"zstd": 3}}})
    with pytest.raises(MissingPackageError, match=r"int4.*silotune\[int4\].*; zstd.*silotune\[zstd\]"):
        prepare(config)


def test_doctor_refuses_a_bad_configuration(silotune, below):
    assert silotune("doctor", "fpb", "--set", "model.nam=x", "--json").code == 2


def test_summary_of_the_fake_has_the_promised_keys():
    assert {"task", "model", "adapter", "algorithm", "metric", "split", "budget"} <= summary().keys()
