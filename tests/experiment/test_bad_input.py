"""Faults that a user can make: one clear line of the right class, and no run folder left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from silotune.config import Config
from silotune.errors import ConfigError, DataError, ModelError, RunFolderError, SilotuneError
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

Make = Callable[..., Config]
ROWS = [
    {"sentence": f"shares {word} {number}", "label": label}
    for number in range(8)
    for word, label in (("fell", "negative"), ("slept", "neutral"), ("rose", "positive"))
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def silos(tmp_path: Path, **rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A data section of one file per client; test and validation are apart."""
    files = {name: write(tmp_path / f"{name}.jsonl", own) for name, own in rows.items()}
    apart = {name: write(tmp_path / f"held-{name}.jsonl", ROWS[:6]) for name in ("validation", "test")}
    partition = {"scheme": "file", "files": files}
    return {"task": "fpb", "num_train": None, "num_validation": None, "num_test": None, "partition": partition, **apart}


def refused(config: Config, kind: type[SilotuneError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        run_experiment(config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message
    assert not config.record.folder.exists()


def test_a_missing_file(configuration: Make, tmp_path: Path) -> None:
    config = configuration(data={"task": "fpb", "train": str(tmp_path / "nowhere.jsonl")})
    refused(config, DataError, "nowhere.jsonl")


def test_an_empty_silo(configuration: Make, tmp_path: Path) -> None:
    refused(configuration(data=silos(tmp_path, a=ROWS, b=[])), DataError, "b.jsonl")


def test_a_silo_of_one_class_is_noted_and_trained(configuration: Make, tmp_path: Path) -> None:
    single = [row for row in ROWS if row["label"] == "neutral"]
    run = run_experiment(configuration(data=silos(tmp_path, a=ROWS, b=single), federation={"rounds": 1}))
    notes = run.read_json("summary")["notes"]
    assert any("1 of 2 clients hold one class only: b" in note for note in notes)
    assert len(run.part("federated").read_rows("clients")) == 2


def test_an_unknown_label_is_named_by_its_row(configuration: Make, tmp_path: Path) -> None:
    wrong = [*ROWS[:4], {"sentence": "a secret", "label": "splendid"}]
    config = configuration(data=silos(tmp_path, a=ROWS, b=wrong))
    refused(config, DataError, "b.jsonl", "row 5", "negative, neutral, positive")
    with pytest.raises(DataError) as caught:
        run_experiment(config)
    assert "secret" not in str(caught.value)


def test_text_longer_than_the_context_is_cut_and_noted(configuration: Make, tmp_path: Path) -> None:
    long = [{"sentence": "shares fell " * 80, "label": "negative"}, *ROWS]
    run = run_experiment(configuration(data=silos(tmp_path, a=ROWS, b=long), federation={"rounds": 1}))
    notes = run.read_json("summary")["notes"]
    assert any(note.startswith("train: 1 of 49 prompts were cut on the left") for note in notes)


def test_an_answer_longer_than_the_context(configuration: Make, tmp_path: Path) -> None:
    options = ["no", "yes, by all means, and then some more of it"]
    path = write(tmp_path / "x.jsonl", [{"q": f"why {number}?", "a": options[number % 2]} for number in range(30)])
    definition = {"prompt": "{q}", "answer": "a", "options": options}
    config = configuration(
        data={"task": "custom", "train": path, "definition": definition, "partition": {"clients": 2}},
        model={"max_length": 12},
    )
    refused(config, DataError, "model.max_length is 12")


def test_a_context_longer_than_the_model_s(configuration: Make) -> None:
    refused(configuration(model={"max_length": 512}), ModelError, "256 positions")


def test_an_unknown_adapter_target(configuration: Make) -> None:
    refused(configuration(adapter={"targets": ["q_prj"]}), ModelError, "q_prj", "did you mean 'q_proj'?")


def test_more_clients_than_examples(configuration: Make) -> None:
    refused(configuration(data={"num_train": 9, "partition": {"clients": 20}}), DataError, "20 clients", "there are 9")


def test_more_sampled_clients_than_there_are(configuration: Make, tmp_path: Path) -> None:
    config = configuration(data=silos(tmp_path, a=ROWS, b=ROWS[:6]), federation={"clients_per_round": 3})
    refused(config, ConfigError, "clients_per_round = 3", "2 clients")


def test_a_model_that_is_not_there(configuration: Make, tmp_path: Path) -> None:
    refused(
        configuration(model={"name": str(tmp_path / "model"), "offline": True}), ModelError, "neither a local folder"
    )


def test_a_gold_set_that_is_not_there(configuration: Make, tmp_path: Path) -> None:
    refused(configuration(evaluation={"gold": "tset"}), DataError, "'tset'", "train, validation, test")
    refused(configuration(evaluation={"gold": str(tmp_path / "gold.jsonl")}), DataError, "gold.jsonl")


def test_options_for_an_open_task(configuration: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "open.jsonl", [{"q": f"why {number}?", "a": "because"} for number in range(30)])
    definition = {"prompt": "{q}", "answer": "a", "metric": "perplexity"}
    data = {"task": "custom", "train": path, "definition": definition, "partition": {"scheme": "iid", "clients": 2}}
    refused(configuration(data=data), ConfigError, "training.objective = 'choice'", "use 'sft'")


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a folder"):
        resume_experiment(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="not a run folder"):
        resume_experiment(tmp_path)


def test_a_run_does_not_go_on_with_other_examples(configuration: Make, tmp_path: Path) -> None:
    config = configuration(data=silos(tmp_path, a=ROWS, b=ROWS[:9]), federation={"rounds": 1})

    def interrupt(event: str, fields: Mapping[str, Any]) -> None:
        if event == "client_finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, observer=interrupt)
    run = RunFolder.open(config.record.folder / str(config.record.name))
    began = run.read_json("partition")
    write(tmp_path / "b.jsonl", [*ROWS[:8], {**ROWS[8], "label": "negative"}])
    with pytest.raises(DataError, match="begun with other examples: the data changed since"):
        resume_experiment(run.path)
    assert run.read_json("partition") == began
    write(tmp_path / "b.jsonl", ROWS[:9])
    assert resume_experiment(run.path).has("summary")


def test_examples_of_nobody(configuration: Make, tmp_path: Path) -> None:
    data = silos(tmp_path, a=ROWS, b=ROWS[:9])
    refused(configuration(data={**data, "train": data["test"]}), ConfigError, "data.train", "would not be read")
    refused(configuration(data={**data, "holdout": 0.2}), ConfigError, "data.validation belong to no client")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (r'{"sentence": "up \ud83d cut", "label": "positive"}', "row 1: holds half a character"),
        ("[" * 100_000, "JSON that nests too deep or holds too long a number (RecursionError)"),
        ('{"sentence": "x", "label": ' + "9" * 5000 + "}", "too long a number (ValueError)"),
    ],
    ids=["half a character", "deep", "long number"],
)
def test_text_and_numbers_that_cannot_be_read(configuration: Make, tmp_path: Path, line: str, words: str) -> None:
    data = silos(tmp_path, a=ROWS, b=ROWS)
    (tmp_path / "b.jsonl").write_text(line + "\n", encoding="utf-8")
    refused(configuration(data=data), DataError, "b.jsonl", words)


def test_a_base_that_does_not_fit_its_own_configuration(configuration: Make, tmp_path: Path, tiny_folder: Path) -> None:
    for name, change in (("size", {"hidden_size": 4096}), ("type", {"hidden_size": "x"})):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**said, **change}), encoding="utf-8")
        refused(configuration(model={"name": str(folder)}), ModelError, "is a folder, but not one that transformers")


def test_an_attention_that_is_not_installed(configuration: Make) -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    refused(configuration(model={"attention": "flash_attention_2"}), ModelError, "cannot be loaded with these settings")
