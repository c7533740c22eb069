"""Whole runs with preferences, plain text, chats and mixtures: figures, start, resume, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from silotune.cli.tuned import _lines
from silotune.config import Config, from_mapping
from silotune.errors import ConfigError, DataError, ModelError
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.experiment.tuned import evaluate
from silotune.models import adapters
from silotune.record.runs import RunFolder
from silotune.report.runs import tasks_table

pytestmark = pytest.mark.end_to_end
Make = Callable[..., Config]
PAIRS = {"task": "note-preference", "partition": {"scheme": "field", "field": "principle", "min_examples": 2}}


def metrics(run: RunFolder) -> dict[str, Any]:
    return run.part("federated").read_json("result")["metrics"]


def interrupt(event: str, fields: Any) -> None:
    if event == "client_finished" and fields["round"] == 2:
        raise KeyboardInterrupt


def test_alignment_goes_on_from_a_tuned_model(configuration: Make, tmp_path: Path) -> None:
    notes = {**PAIRS, "task": "client-notes"}
    first = run_experiment(configuration(data=notes, training={"objective": "sft"}, record={"name": "sft"}))
    options: dict[str, Any] = {
        "data": PAIRS, "adapter": {"start": str(first.path)}, "training": {"objective": {"type": "dpo", "beta": 1.0}},
    }  # fmt: skip
    run = run_experiment(configuration(**options))
    tensors, _ = first.part("federated").load_adapter()
    rows = run.part("federated").read_rows("metrics")
    assert (rows[0]["gain"], rows[0]["margin"], rows[0]["win_rate"]) == (0.0, 0.0, 0.5)
    made = metrics(run)
    assert made["gain"] == pytest.approx(made["preference_accuracy"] - made["start_accuracy"])
    assert made["start_accuracy"] == rows[0]["preference_accuracy"]
    assert len(made["gain_interval"]) == 2 and made["margin"] != 0
    summary = run.read_json("summary")
    assert summary["start"] == str(first.path) and summary["base"]["margin"] == 0
    assert summary["federated"]["preference_accuracy"] == made["preference_accuracy"]
    figures = evaluate(run.path)
    assert {key: figures[key] for key in made} == made

    with pytest.raises(KeyboardInterrupt):
        run_experiment(configuration(**options, record={"name": "cut"}), observer=interrupt)
    cut = resume_experiment(run.path.parent / "cut")
    tiny.assert_same_bits(*(each.part("federated").load_adapter()[0] for each in (run, cut)))

    part = {**options, "adapter": {"start": str(first.path / "federated")}, "training": {"objective": "kto"}}
    other = run_experiment(configuration(**part, record={"name": "kto"}))
    assert metrics(other)["start_accuracy"] == made["start_accuracy"]
    assert adapters.read  # the start itself is left alone
    tiny.assert_same_bits(first.part("federated").load_adapter()[0], tensors)
    for start, words in ((str(tmp_path / "none"), "holds no adapter"), (str(first.path), "does not fit")):
        with pytest.raises(ModelError, match=words):
            run_experiment(configuration(**{**options, "adapter": {"start": start, "rank": 3}}))
    for other in ({"alpha": 64.0}, {"rslora": True}, {"dora": True}):
        with pytest.raises(ModelError):
            run_experiment(configuration(**{**options, "adapter": {"start": str(first.path), **other}}))


def test_plain_text_in_windows(configuration: Make, tmp_path: Path) -> None:
    for split, count in (("train", 24), ("validation", 4), ("test", 6)):
        lines = [
            json.dumps({"text": " ".join(tiny.TEXTS) + f" {split} {n}", "source": f"s{n % 2}"}) for n in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    data = {
        "task": "text", "root": str(tmp_path), "num_train": None, "num_validation": None, "num_test": None,
        "partition": {"scheme": "field", "field": "source"},
    }  # fmt: skip
    training = {"objective": {"type": "pretrain", "packing": True}}
    run = run_experiment(configuration(model={"max_length": 32}, data=data, training=training))
    made = run.part("federated").read_json("result")
    rows = run.part("federated").read_rows("metrics")
    assert made["metrics"]["perplexity"] < rows[0]["perplexity"]
    assert made["num_examples"] > 6  # windows, not documents
    assert sum(own["num_examples"] for own in made["by_client"].values()) == made["num_examples"]
    assert evaluate(run.path)["perplexity"] == made["metrics"]["perplexity"]
    with pytest.raises(DataError, match="has none: leave it out"):
        evaluate(run.path, scoring="generation")
    with pytest.raises(
        DataError, match=r"'other' is neither a split that is there \(train, validation, test\) nor a file$"
    ):
        evaluate(run.path, split="other")


def test_a_mixture_has_results_per_task(configuration: Make) -> None:
    data = {
        "task": "mixture", "mixture": {"finance-news": 2, "medical-choice": 1, "client-notes": 1},
        "partition": {"scheme": "iid", "clients": 2},
    }  # fmt: skip
    run = run_experiment(configuration(data=data, training={"objective": "sft"}, evaluation={"keep": "best"}))
    made = metrics(run)
    by_task = made["by_task"]
    assert set(by_task) == {"finance-news", "medical-choice", "client-notes"}
    closed = [by_task[name]["accuracy"] for name in ("finance-news", "medical-choice")]
    assert made["accuracy"] == pytest.approx(sum(closed) / 2)
    assert by_task["client-notes"]["perplexity"] > 1 and "perplexity" not in made
    assert run.read_json("summary")["federated"]["by_task"] == by_task
    figures = evaluate(run.path)
    assert figures["by_task"] == by_task and figures["accuracy"] == made["accuracy"]
    some = configuration(
        data=data, training={"objective": "sft"}, evaluation={"max_examples": 8}, record={"name": "some"}
    )
    few = metrics(run_experiment(some))
    shares = [own["num_examples"] for own in few["by_task"].values()]
    assert sum(shares) == 8 and set(few["by_task"]) == set(by_task)  # of every task, not of the first
    assert tasks_table(run.read_json("summary")).row_count == 3
    shown = dict(_lines(figures))
    assert shown["  client-notes"].startswith("perplexity ") and shown["  finance-news"].endswith("9 examples")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": PAIRS, "training": {"objective": "choice"}}, "'choice' needs a task with a closed set of options"),
        ({"training": {"objective": "dpo"}}, "'finance-news' has a closed set of options: use 'sft'"),
        (
            {"data": {**PAIRS, "task": "client-notes"}, "training": {"objective": "kto"}},
            "pairs of answers; 'client-notes' has open",
        ),
        ({"data": PAIRS, "adapter": {"type": "none"}, "training": {"objective": "sft"}}, "does not keep"),
    ],
)
def test_objectives_that_do_not_suit_the_task(configuration: Make, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_experiment(configuration(**sections))


def test_all_faults_of_an_objective_are_told_at_once() -> None:
    training = {"objective": "kto", "batch_size": 1}
    with pytest.raises(ConfigError) as caught:
        from_mapping({"training": training, "adapter": "none", "evaluation": {"scoring": "generation"}})
    assert len(caught.value.faults) == 3
    ipo = {"objective": {"type": "dpo", "preference_loss": "ipo", "label_smoothing": 0.1}}
    with pytest.raises(ConfigError, match="label_smoothing is for preference_loss = 'sigmoid' or 'robust'"):
        from_mapping({"training": ipo})
