from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from silotune.data import load as loader
from silotune.data.load import Dataset, load, read_examples, read_noted
from silotune.data.partition import find_faults, partition
from silotune.data.tasks import TASKS
from silotune.errors import ConfigError, DataError
from silotune.settings.sections import DataSection, FileSettings, PartitionSection, TaskSection
from silotune.structs import Row

SHARED = Path(os.environ.get("SILOTUNE_SHARED", Path(__file__).parents[2].parent / "shared"))
LABELS = ("negative", "neutral", "positive")


def rows(count: int, start: int = 0, **more: Any) -> list[Row]:
    return [{"text": f"Firm {n} said.", "label": LABELS[n % 3], **more} for n in range(start, start + count)]


def write(path: Path, content: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def sizes(dataset: Dataset) -> tuple[int, ...]:
    return tuple(len(dataset.splits[split]) for split in ("train", "validation", "test"))


def texts(dataset: Dataset, split: str) -> list[str]:
    return [example.messages[0][1] for example in dataset.splits[split]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "fpb" / "train.jsonl", rows(30))
    write(tmp_path / "fpb" / "validation.jsonl", rows(6, 30))
    write(tmp_path / "fpb" / "test.jsonl", rows(9, 36))
    return tmp_path


def run(root: Path | None = None, seed: int = 0, task: str = "fpb", **section: Any) -> Dataset:
    return load(DataSection(task=task, root=root, **section), seed=seed)


# --- local


def test_root_may_be_the_parent_or_the_folder_itself(root: Path) -> None:
    dataset = run(root)
    assert sizes(dataset) == (30, 6, 9)
    assert dataset.splits == run(root / "fpb").splits
    assert dataset.clients is None
    assert dataset.task is TASKS["fpb"]
    assert len(dataset.notes) == 3
    assert "train.jsonl, 30 examples" in dataset.notes[0]


def test_given_files_win_over_the_folder(root: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", rows(4, 90))
    assert sizes(run(root, test=own)) == (30, 6, 4)
    assert sizes(run(train=root / "fpb" / "train.jsonl", test=own)) == (27, 3, 4)


def test_missing_splits_are_carved_and_the_notes_say_so(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", rows(100))
    dataset = run(train=path)
    assert sizes(dataset) == (70, 10, 20)
    parts = [set(texts(dataset, split)) for split in dataset.splits]
    assert len(set.union(*parts)) == 100
    assert texts(dataset, "train") == sorted(texts(dataset, "train"), key=lambda text: int(text.split()[-3]))
    assert dataset.notes[1:] == (
        "test: carved from train, 20 of 100 examples (20% by seed)",
        "validation: carved from train, 10 of 100 examples (10% by seed)",
    )
    assert run(train=path).splits == dataset.splits
    assert run(train=path, seed=1).splits != dataset.splits


def test_rows_of_one_text_stay_on_one_side(tmp_path: Path) -> None:
    content = [{**row, "target": f"T{index % 2}"} for index, row in enumerate(rows(20) * 3)]
    dataset = run(train=write(tmp_path / "train.jsonl", content), task="fiqa-sa")
    bodies = [{text.split("\n")[1] for text in texts(dataset, split)} for split in dataset.splits]
    assert sum(map(len, bodies)) == len(set.union(*bodies)) == 20
    assert sum(sizes(dataset)) == 60


def test_too_few_examples_to_carve(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", rows(2))
    with pytest.raises(DataError, match="2 training examples are too few to carve a validation split from"):
        run(train=path)


def test_subsamples_are_drawn_by_seed(root: Path) -> None:
    section = {"num_train": 10, "num_validation": 3, "num_test": 50}
    dataset = run(root, **section)
    assert sizes(dataset) == (10, 3, 9)
    assert dataset.splits == run(root, **section).splits
    assert dataset.splits["train"] != run(root, seed=1, **section).splits["train"]
    assert set(texts(dataset, "train")) < set(texts(run(root), "train"))
    assert dataset.notes[3:] == (
        "train: 10 of 30 examples, drawn by seed",
        "validation: 3 of 6 examples, drawn by seed",
        "test: 9 examples, fewer than the 50 asked for",
    )


def test_prompts_that_stand_in_train_too_are_counted(root: Path) -> None:
    write(root / "fpb" / "test.jsonl", rows(9, 25))
    assert "test: 5 of 9 prompts also stand in train" in run(root).notes


def test_prompts_that_differ_in_case_spaces_and_punctuation_are_counted_too(root: Path) -> None:
    near = [{**row, "text": row["text"].replace(" said.", "  SAID")} for row in rows(9, 25)]
    write(root / "fpb" / "test.jsonl", near[:3] + rows(6, 28))
    assert "test: 5 of 9 prompts also stand in train (3 of them but for case, spaces or punctuation)" in run(root).notes


@pytest.mark.parametrize("task", ["fpb", "custom"])
def test_twins_of_a_text_stay_on_one_side(tmp_path: Path, task: str) -> None:
    twins = [{**row, "text": row["text"].replace(" said.", "\nSaid!")} for row in rows(30)]
    section: dict[str, Any] = {"train": write(tmp_path / "a.jsonl", rows(30) + twins), "task": task}
    if task == "custom":
        section["definition"] = TaskSection(prompt="{text}", answer="label", options=LABELS)
    dataset = run(**section)
    numbers = {split: {text.split("Firm ")[1].split()[0] for text in texts(dataset, split)} for split in dataset.splits}
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values())) == 30


def test_texts_without_twins_are_carved_as_ever(tmp_path: Path) -> None:
    drawn = texts(run(train=write(tmp_path / "train.jsonl", rows(20))), "test")
    assert [text.split("Firm ")[1].split()[0] for text in drawn] == ["1", "7", "9", "14"]


# --- rows that do not fit

BAD: list[Row] = [{"text": "SECRET"}, {"text": "", "label": "neutral"}, {"text": "SECRET", "label": "SECRET"}]


def test_every_row_that_does_not_fit_is_named_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", rows(3) + BAD + rows(3, 3) + BAD[1:2] * 20)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": SECRET\n')
    with pytest.raises(DataError) as caught:
        run(train=path)
    told = str(caught.value)
    assert "train.jsonl: row 4: field 'label' is missing" in told
    assert "; row 5: field 'text' is empty; row 6: label is not one of negative, neutral, positive; row 10: " in told
    assert "; row 16: field 'text' is empty; and 14 more. In all 24 rows (21 x field 'text' is empty; 1 x " in told
    assert "1 x not valid JSON (column 10: Expecting value)) of 30 do not fit: mend them, or set" in told
    assert "SECRET" not in told and "\n" not in told


def test_a_single_row_that_does_not_fit_is_told_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", rows(3) + BAD[:1])
    with pytest.raises(DataError, match=r"train.jsonl: row 4: field 'label' is missing; task 'fpb' needs [^;]*$"):
        run(train=path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_that_do_not_fit_are_left_out_where_the_user_says_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        lines = [f"{row['text']},{row['label']}" for row in rows(20)]
        path.write_text("\n".join(["text,label", *lines[:5], "SECRET", ",neutral", *lines[5:]]), encoding="utf-8")
    else:
        write(path, rows(5) + [{"label": "neutral"}, {"text": "", "label": "neutral"}] + rows(15, 5))
    clean = run(train=write(tmp_path / "clean.jsonl", rows(20)))
    dataset = run(train=path, on_bad_row="skip")
    assert dataset.splits == clean.splits
    [note] = [note for note in dataset.notes if "left out" in note]
    assert f"a.{suffix}: left out 2 rows (1 x " in note and "1 x field 'text' is empty" in note


def test_a_file_without_a_row_that_fits_is_refused_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="In all 3 rows .* of 3 do not fit"):
        run(train=write(tmp_path / "train.jsonl", BAD), on_bad_row="skip")


def test_a_gold_standard_set_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path, skip = write(tmp_path / "gold.jsonl", rows(3) + BAD[:1]), FileSettings(on_bad_row="skip")
    with pytest.raises(DataError, match="row 4: field 'label' is missing"):
        read_examples(path, TASKS["fpb"], skip)
    examples, [note] = read_noted(path, TASKS["fpb"], skip)
    assert len(examples) == 3 and "left out 1 row" in note
    with pytest.raises(DataError, match="mend them, or take them out$"):  # no setting leaves rows of this set out
        read_examples(write(tmp_path / "gold.jsonl", rows(3) + BAD), TASKS["fpb"], skip)


def test_a_wrong_split_is_a_row_that_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", rows(5) + rows(2, 5, split="dev") + rows(3, 7, split="test") + rows(1, 9, split="x"))
    dataset = run(tmp_path, on_bad_row="skip")
    assert sizes(dataset) == (5, 2, 3)
    assert "all.jsonl: left out 1 row (1 x split is not one of train" in dataset.notes[-1]


def test_how_a_file_is_read_holds_for_every_file_and_is_noted(tmp_path: Path) -> None:
    for name, start in (("train", 0), ("test", 30)):
        lines = [f"{row['text']} é%{row['label']}" for row in rows(30, start)]
        (tmp_path / f"{name}.csv").write_bytes("\n".join(["text%label", *lines]).encode("cp1252"))
    dataset = run(tmp_path, delimiter="%")
    assert sizes(dataset) == (27, 3, 30)
    assert sum("read as cp1252" in note for note in dataset.notes) == 2


def test_medqa_scores_on_dev_unless_there_is_a_test_file(tmp_path: Path) -> None:
    content = [
        {"question": f"Q{n}?", "options": {"A": "1", "B": "2", "C": "3", "D": "4"}, "answer_idx": "A"}
        for n in range(20)
    ]
    write(tmp_path / "medqa" / "train.jsonl", content[:10])
    write(tmp_path / "medqa" / "dev.jsonl", content[10:17])
    assert sizes(run(tmp_path, task="medqa")) == (9, 1, 7)
    write(tmp_path / "medqa" / "test.jsonl", content[17:])
    assert sizes(run(tmp_path, task="medqa")) == (10, 7, 3)


def test_tfns_scores_on_its_official_validation_part(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(10))
    write(tmp_path / "validation.jsonl", rows(5, 10))
    assert sizes(run(tmp_path, task="tfns")) == (9, 1, 5)


def test_a_pooled_file_is_told_apart_by_its_split_column(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", rows(5, split="train") + rows(2, 5, split="dev") + rows(3, 7, split="test"))
    assert sizes(run(tmp_path)) == (5, 2, 3)
    write(tmp_path / "all.jsonl", rows(10))
    assert sizes(run(tmp_path)) == (7, 1, 2)
    write(tmp_path / "all.jsonl", rows(2) + rows(1, 2, split="secret"))
    with pytest.raises(DataError, match="all.jsonl: row 3: split is not one of train, validation"):
        run(tmp_path)
    write(tmp_path / "all.jsonl", rows(2, split="test"))
    with pytest.raises(DataError, match="no training examples"):
        run(tmp_path)


def test_instruct_takes_both_of_its_files(tmp_path: Path) -> None:
    for name, domain in (("alpaca_1k", "general"), ("chatdoctor_5k", "medical")):
        content = [
            {
                "instruction": f"{name} {n}",
                "input": "",
                "output": "o",
                "domain": domain,
                "split": "test" if n > 7 else "train",
            }
            for n in range(10)
        ]
        write(tmp_path / f"{name}.jsonl", content)
    dataset = run(tmp_path, task="instruct")
    assert sizes(dataset) == (14, 2, 4)
    assert {example.fields["domain"] for example in dataset.splits["train"]} == {"general", "medical"}


def test_one_file_per_client(tmp_path: Path) -> None:
    files = {
        "south": write(tmp_path / "s.jsonl", rows(5, 100)),
        "north": write(tmp_path / "n.jsonl", rows(7, 200)),
    }
    test = write(tmp_path / "test.jsonl", rows(3, 300))
    section = {"test": test, "validation": test.rename(tmp_path / "v.jsonl"), "partition": None}
    write(test, rows(3, 400))
    section["partition"] = PartitionSection(scheme="file", files=files)
    dataset = run(**section)
    assert dataset.clients is not None
    assert {name: len(own) for name, own in dataset.clients.items()} == {"north": 7, "south": 5}
    assert all("Firm 2" in texts(dataset, "train")[index] for index in dataset.clients["north"])
    assert all("Firm 1" in texts(dataset, "train")[index] for index in dataset.clients["south"])
    assert find_faults(dataset.splits["train"], dataset.clients) == ()

    carved = run(partition=PartitionSection(scheme="file", files=files), num_train=6)
    assert sizes(carved) == (6, 1, 2)
    assert carved.clients is not None
    assert sorted(index for own in carved.clients.values() for index in own) == list(range(6))


def test_client_names_and_files_must_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(9))
    with pytest.raises(DataError, match=r"a.jsonl is given twice"):
        run(partition=PartitionSection(scheme="file", files={"a": path, "b": path}))
    with pytest.raises(DataError, match=r"a.jsonl is given twice"):
        run(train=path, test=path)
    with pytest.raises(ConfigError, match=r"client name '\.\./x' may hold"):
        run(partition=PartitionSection(scheme="file", files={"../x": path}))


def test_what_is_missing_is_said_with_what_is_there(root: Path) -> None:
    with pytest.raises(DataError, match=r"no folder '.*nowhere' \(data.root\); .* holds fpb/"):
        run(root / "nowhere")
    with pytest.raises(DataError, match=r"task 'tfns': no train file in .*; it holds fpb/"):
        run(root, task="tfns")
    with pytest.raises(DataError, match="is a file; data.root takes a folder"):
        run(root / "fpb" / "train.jsonl")
    with pytest.raises(DataError, match="no training examples; pass data.train=FILE"):
        run(test=root / "fpb" / "test.jsonl")
    with pytest.raises(DataError, match=r"no file '.*gone.jsonl'; .* holds test.jsonl, train.jsonl, validation.jsonl"):
        run(train=root / "fpb" / "gone.jsonl")


def test_a_row_that_does_not_fit_is_an_error_not_a_gap(root: Path) -> None:
    path = write(root / "fpb" / "train.jsonl", [*rows(4), {"text": "SECRET", "label": "SECRET"}])
    with pytest.raises(DataError) as caught:
        run(root)
    assert str(caught.value) == f"{path}: row 5: label is not one of negative, neutral, positive"


# --- sources


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"source": "local"}, "needs data.root"),
        ({"source": "embedded"}, "task 'fpb' has no such source"),
        ({"source": "hub", "task": "finance-news"}, "task 'finance-news' has no such source"),
        ({"source": "hub", "train": Path("x.jsonl")}, "does not go with files of your own"),
        ({"task": "custom", "definition": TaskSection(prompt="{a}", answer="b")}, "needs data.root or data.train"),
    ],
)
def test_sources_that_do_not_fit(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(**section)


def test_embedded_tasks_are_generated() -> None:
    for task in ("finance-news", "medical-choice"):
        dataset = run(task=task, num_train=30, num_validation=5, num_test=10)
        assert sizes(dataset) == (30, 5, 10)
        assert dataset.notes[0] == "train: generated, 30 examples"
        assert dataset.splits == run(task=task, source="embedded", num_train=30, num_validation=5, num_test=10).splits


def test_embedded_sizes_have_defaults_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def generate(**sizes: int) -> dict[str, list[Row]]:
        asked.update(sizes)
        raise ValueError("train: asked for 9 examples; ask for fewer")

    monkeypatch.setattr(loader, "_GENERATORS", {"finance-news": generate})
    with pytest.raises(DataError, match="task 'finance-news': train: asked for 9 examples"):
        run(task="finance-news", seed=5)
    assert asked == {"num_train": 1600, "num_validation": 300, "num_test": 600, "seed": 5}


def test_an_embedded_task_reads_files_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(10, sector="chips"))
    assert sizes(run(task="finance-news", train=path)) == (7, 1, 2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, str | None], Any]]:
    """What ``datasets.load_dataset`` gives, by id and configuration."""
    copies: dict[tuple[str, str | None], Any] = {}

    def fake(name: str, config: str | None = None) -> Any:
        found = copies.get((name, config), ConnectionError("offline"))
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(datasets, "load_dataset", fake)
    yield copies


def as_dataset(content: list[Row]) -> datasets.Dataset:
    return datasets.Dataset.from_list(content)


def test_hub_with_class_labels(hub: dict[tuple[str, str | None], Any]) -> None:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)})
    content = [{"sentence": f"Firm {n}.", "label": n % 3} for n in range(20)]
    copy = datasets.Dataset.from_list(content, features=features)
    hub["atrost/financial_phrasebank", None] = datasets.DatasetDict(train=copy, validation=copy, test=copy)
    dataset = run()
    assert sizes(dataset) == (20, 20, 20)
    assert [example.answer for example in dataset.splits["test"][:3]] == list(LABELS)
    assert dataset.notes[0] == "train: atrost/financial_phrasebank train, 20 examples"


def test_hub_splits_as_they_are_named_there(hub: dict[tuple[str, str | None], Any]) -> None:
    fiqa = as_dataset([{"sentence": f"S{n}", "target": "T", "score": -0.5, "type": "post"} for n in range(10)])
    hub["TheFinAI/fiqa-sentiment-classification", None] = datasets.DatasetDict(train=fiqa, valid=fiqa, test=fiqa)
    assert sizes(run(task="fiqa-sa")) == (10, 10, 10)

    quiz = [
        {"question": f"Q{n}", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 1, "subject_name": "Skin"}
        for n in range(10)
    ]
    secret = as_dataset([{**row, "cop": -1} for row in quiz])
    hub["openlifescienceai/medmcqa", None] = datasets.DatasetDict(
        train=as_dataset(quiz), validation=as_dataset(quiz[:4]), test=secret
    )
    dataset = run(task="medmcqa")
    assert sizes(dataset) == (9, 1, 4)
    assert dataset.splits["test"][0].answer == "B"

    papers = [{"question": f"Q{n}", "context": {"contexts": ["a"]}, "final_decision": "yes"} for n in range(10)]
    hub["qiaojin/PubMedQA", "pqa_labeled"] = datasets.DatasetDict(train=as_dataset(papers))
    dataset = run(task="pubmedqa")
    assert sizes(dataset) == (7, 1, 2)
    assert dataset.notes[0] == "train: qiaojin/PubMedQA (pqa_labeled) train, 10 examples"


def test_hub_that_cannot_be_reached_says_what_to_do(hub: dict[tuple[str, str | None], Any]) -> None:
    with pytest.raises(DataError, match=r"cannot load .* \(ConnectionError\); without a network pass data.root=FOLDER"):
        run(task="tfns")
    hub["zeroshot/twitter-financial-news-sentiment", None] = RuntimeError("Dataset scripts are no longer supported")
    with pytest.raises(DataError, match="RuntimeError"):
        run(task="tfns")
    hub["zeroshot/twitter-financial-news-sentiment", None] = datasets.exceptions.DatasetNotFoundError("x")
    with pytest.raises(DataError, match="DatasetNotFoundError"):
        run(task="tfns")


def test_hub_without_a_train_split(hub: dict[tuple[str, str | None], Any]) -> None:
    hub["x/y", None] = datasets.DatasetDict(unsplit=as_dataset([{"a": "1", "b": "2"}]))
    definition = TaskSection(prompt="{a}", answer="b", hub_id="x/y")
    with pytest.raises(DataError, match="x/y has no train split; it has unsplit"):
        run(task="custom", definition=definition)


def test_loading_and_partitioning_need_no_torch() -> None:
    code = (
        "import sys\n"
        "import silotune.data.load, silotune.data.partition, silotune.data.tasks\n"
        "print([name for name in ('torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- real data, where there are any


EXPECTED = {
    "fpb": (3386, 464, 996),
    "fiqa-sa": (668, 95, 191),
    "tfns": (8589, 954, 2388),
    "medqa": (900, 100, 1272),
    "medmcqa": (3146, 229, 808),
    "pubmedqa": (350, 50, 100),
    "instruct": (5233, 582, 630),
}
HELD_OUT = ("fiqa-sa", "medqa", "pubmedqa")
"""Tasks whose test file may or may not be there."""
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no folder with real data")


@needs_shared
@pytest.mark.parametrize("task", EXPECTED)
def test_shared_data_load_as_they_are(task: str) -> None:
    folder = SHARED / "data" / TASKS[task].folder
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    dataset = run(SHARED / "data", task=task)
    assert all(sizes(dataset))
    if task not in HELD_OUT or not (folder / "test.jsonl").exists():
        assert sizes(dataset) == EXPECTED[task]
    assert dataset.splits == run(folder, task=task).splits
    field = next((name for name in dataset.task.partition_fields if name != "label"), "label")
    present = {name for example in dataset.splits["train"] for name in example.fields}
    if task != "medqa" and field in present:
        section = PartitionSection(scheme="field", field=field)
        assert len(partition(dataset.splits["train"], section, seed=0)) >= 2


# --- holdout


def test_a_holdout_is_the_draw_of_train_test_split(root: Path) -> None:
    dataset = run(root, holdout=0.25)
    everything = [row["text"] for row in rows(45)]
    split = datasets.Dataset.from_dict({"text": everything}).train_test_split(0.25, seed=42)
    assert [text.splitlines()[1] for text in texts(dataset, "test")] == split["test"]["text"]
    rest = {text.splitlines()[1] for part in ("train", "validation") for text in texts(dataset, part)}
    assert rest == set(split["train"]["text"]) and len(dataset.splits["validation"]) > 0
    assert any("12 of all 45 examples, held out with seed 42" in note for note in dataset.notes)


def test_a_holdout_stays_when_the_seed_of_the_run_changes(root: Path) -> None:
    first, second = run(root, seed=0, holdout=0.2), run(root, seed=1, holdout=0.2)
    assert texts(first, "test") == texts(second, "test") and texts(first, "validation") != texts(second, "validation")
    assert texts(first, "test") != texts(run(root, holdout=0.2, holdout_seed=7), "test")


def test_too_few_rows_to_hold_out_are_one_line(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(1))
    with pytest.raises(DataError, match="too few to hold some out"):
        run(None, train=tmp_path / "train.jsonl", holdout=0.5)
