"""Runs with the objective ``classify``: the three modes, resume, scoring, export, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from silotune import tensors as arithmetic
from silotune.config import Config, from_mapping
from silotune.errors import ConfigError, ModelError
from silotune.experiment.estimate import estimate
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.experiment.tuned import evaluate, export, load_tuned, loader_of, next_command
from silotune.record.runs import RunFolder

Make = Callable[..., Config]
TEXT = "shares fell by five million"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bodies")
    made = {name: tiny.save_body(root / name, name) for name in ("bert", "roberta")}
    made["llama"] = tiny.save_body(root / "llama", "llama", pad=None)
    configuration = tiny.configuration("llama")
    configuration.pad_token_id = None
    configuration.save_pretrained(made["llama"])
    return made


@pytest.fixture
def make(configuration: Make, folders: dict[str, Path]) -> Make:
    def classify(name: str = "bert", **sections: Any) -> Config:
        model = {"name": str(folders[name]), **sections.pop("model", {})}
        training = {"objective": "classify", **sections.pop("training", {})}
        return configuration(model=model, training=training, **sections)

    return classify


def logits(model: torch.nn.Module, words: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**words(TEXT, return_tensors="pt", return_token_type_ids=False)).logits


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_three_modes_with_the_figures_of_every_task(make: Make, name: str) -> None:
    modes = {"modes": ["federated", "isolated", "centralized"], "rounds": 2, "algorithm": "fedprox"}
    run = run_experiment(make(name, federation=modes, evaluation={"per_client": True}))
    summary = run.read_json("summary")
    assert {"federated", "isolated", "centralized", "base"} <= summary.keys()
    metrics = run.part("federated").read_json("result")["metrics"]
    assert {"accuracy", "macro_f1", "per_class", "confusion", "accuracy_interval"} <= metrics.keys()
    assert metrics["unparsed"] == 0
    assert summary["federated"]["bytes_up"] > 0 and len(run.part("isolated").parts()) == 3
    tensors, config = run.part("federated").load_adapter()
    assert config["task_type"] == "SEQ_CLS" and set(config["modules_to_save"]) == {"classifier", "score"}
    assert any(key.endswith(("classifier.weight", "score.weight")) for key in tensors)
    card = (run.part("federated").path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "text-classification" in card and "3 classes: negative, neutral, positive" in card
    for mode in ("federated", "centralized"):
        figures = evaluate(run.path, mode=mode)
        expected = run.part(mode).read_json("result")["metrics"]
        assert {key: figures[key] for key in expected} == expected
    assert "accuracy" in json.loads((run.part("federated").path / "per_client.json").read_text())["client-0"]


@pytest.mark.end_to_end
def test_the_same_seed_gives_the_same_bits_and_another_another_head(make: Make) -> None:
    first, second, other = (
        run_experiment(make(federation={"rounds": 1}, seed=seed)).part("federated").load_adapter()[0]
        for seed in (0, 0, 1)
    )
    tiny.assert_same_bits(first, second)
    assert arithmetic.digest(first) != arithmetic.digest(other)


@pytest.mark.end_to_end
def test_a_killed_run_ends_with_the_same_bits(make: Make) -> None:
    sections: dict[str, Any] = {"training": {"optimizer_state": "keep"}, "federation": {"rounds": 3}}
    whole = run_experiment(make(**sections))

    def interrupt(event: str, fields: Any) -> None:
        if event == "client_finished" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(make(**sections, record={"name": "cut"}), observer=interrupt)
    cut = resume_experiment(whole.path.parent / "cut")
    tiny.assert_same_bits(*(run.part("federated").load_adapter()[0] for run in (whole, cut)))


@pytest.mark.end_to_end
@pytest.mark.parametrize("kind", ["lora", "ia3", "none", "qlora", "int4 ia3"])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's, not ours
def test_a_merged_export_is_a_plain_classifier(make: Make, tmp_path: Path, name: str, kind: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = {"precision": "int4"} if kind in ("qlora", "int4 ia3") else {}
    if model and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    config = make(
        name, model=model, adapter={"type": kind.split()[-1]}, federation={"rounds": 1},
        training={"learning_rate": 0.05},
    )  # fmt: skip
    run = run_experiment(config)
    merged = export(run.path, tmp_path / "merged", merge=True)
    words, plain = AutoTokenizer.from_pretrained(merged), AutoModelForSequenceClassification.from_pretrained(merged)
    assert plain.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert words.pad_token_id == plain.config.pad_token_id is not None
    made = logits(plain, words)
    if kind == "none":
        with pytest.raises(ModelError, match="--merge"):
            export(run.path, tmp_path / "adapter", merge=False)
        return
    if not model:
        torch.testing.assert_close(made, through_peft(run, tmp_path), rtol=1e-4, atol=1e-4)
    both = plain.eval()(**words([TEXT, "x"], padding=True, return_tensors="pt", return_token_type_ids=False)).logits
    torch.testing.assert_close(both[:1], made, rtol=1e-4, atol=1e-4)


def through_peft(run: RunFolder, place: Path) -> torch.Tensor:
    """Logits of the exported adapter, loaded by the very call that the command line names."""
    import peft
    from transformers import AutoTokenizer

    out = export(run.path, place / "adapter", merge=False)
    call = loader_of(run.path, out, merge=False)
    names = {0: "negative", 1: "neutral", 2: "positive"}
    assert call == f"peft.AutoPeftModelForSequenceClassification.from_pretrained({str(out)!r}, id2label={names})"
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(out, id2label=names)
    assert model.config.id2label == names
    return logits(model, AutoTokenizer.from_pretrained(out))


@pytest.mark.end_to_end
def test_a_merged_classifier_is_a_base_for_the_next_run(make: Make, tmp_path: Path) -> None:
    run = run_experiment(make(federation={"rounds": 1}, training={"learning_rate": 0.05}))
    merged = export(run.path, tmp_path / "merged", merge=True)
    again = run_experiment(make(model={"name": str(merged)}, federation={"rounds": 1}))
    before = again.part("federated").read_rows("metrics")[0]
    assert before["accuracy"] == run.part("federated").read_json("result")["metrics"]["accuracy"]


def test_a_classifier_writes_no_text(make: Make, tmp_path: Path) -> None:
    run = run_experiment(make("llama", federation={"rounds": 1}))
    merged = export(run.path, tmp_path / "merged", merge=True)
    for path, base in ((run.path, False), (run.path, True), (merged, False)):
        with pytest.raises(ModelError, match="classifier.*which writes no text") as caught:
            load_tuned(path, base=base)
        assert "\n" not in str(caught.value)
    assert next_command(run.path) == f"silotune evaluate {run.path}"
    with pytest.raises(ModelError, match="classification head, which writes no text"):
        evaluate(run.path, scoring="generation")


def refused(config: Config, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        run_experiment(config)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    assert not config.record.folder.exists()


def test_a_task_whose_options_differ_by_row_is_refused(make: Make, tmp_path: Path) -> None:
    refused(make(data={"task": "medical-choice"}), ConfigError, "'medical-choice' has options that differ", "'choice'")
    options = dict.fromkeys("ABCD", "x")
    rows: list[dict[str, Any]] = [{"question": f"which {n}?", "options": options, "answer_idx": "A"} for n in range(40)]
    path = tmp_path / "medqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(make(data={"task": "medqa", "train": str(path)}), ConfigError, "'medqa' has options that differ by row")
    rows = [{"instruction": f"say {n}", "output": "yes"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": "instruct", "train": str(path), "partition": {"scheme": "iid", "clients": 2}}
    refused(make(data=data), ConfigError, "'instruct' has open answers: use 'sft'")


def test_an_encoder_is_refused_where_text_is_to_be_written(make: Make) -> None:
    for objective in ("sft", "choice"):
        refused(make(training={"objective": objective}), ModelError, "is an encoder (bert)", "'classify'")


def test_a_context_longer_than_the_positions_is_refused(make: Make) -> None:
    refused(make("roberta", model={"max_length": 257}), ModelError, "model.max_length = 257 exceeds the 256")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"objective": "classify"}, "evaluation": {"scoring": "generation"}}, "writes no text"),
        (
            {"training": {"objective": "classify"}, "evaluation": {"forgetting": "embedded"}},
            "leave evaluation.forgetting",
        ),
        (
            {"training": {"objective": {"type": "choice", "wording": "text"}}},
            "training.objective.wording: this is a setting of 'classify' and means nothing with 'choice'",
        ),
    ],
)
def test_settings_that_do_not_go_together(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(sections)


def test_long_texts_are_cut_and_noted(make: Make) -> None:
    run = run_experiment(make(model={"max_length": 16}, federation={"rounds": 1}))
    assert any("prompts were cut on the left" in note for note in run.read_json("summary")["notes"])


def test_an_estimate_knows_the_head(make: Make) -> None:
    figures = estimate(make())
    assert figures["trainable"] > 3 * 32 and figures["seconds"] > 0
