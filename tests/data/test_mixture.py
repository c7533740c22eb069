"""Mixtures of tasks, plain text files, and the embedded world of preferences."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from silotune.config import from_mapping
from silotune.data.embedded import lexicons, notes
from silotune.data.load import load, read_examples
from silotune.data.mixture import load_examples
from silotune.data.tasks import resolve
from silotune.errors import ConfigError, DataError
from silotune.settings.sections import DataSection

SHARES = {"finance-news": 3.0, "client-notes": 1.0}


def mixed(**changes: object) -> DataSection:
    sizes = {"num_train": 40, "num_validation": 8, "num_test": 12}
    return DataSection(**{"task": "mixture", "mixture": SHARES, **sizes, **changes})


def test_a_mixture_has_the_shares_it_is_asked_for() -> None:
    dataset = load_examples(mixed(), seed=3)
    counts = {
        split: dict(Counter(example.fields["task"] for example in examples))
        for split, examples in dataset.splits.items()
    }
    assert counts["train"] == {"finance-news": 30, "client-notes": 10}
    assert counts["test"] == {"finance-news": 9, "client-notes": 3}
    assert [task.name for task in dataset.tasks] == list(SHARES)
    assert (dataset.task.name, dataset.task.metric) == ("mixture", "accuracy")
    assert dataset.notes[-1] == "mixture: 30 training examples of finance-news, 10 training examples of client-notes"
    assert load_examples(mixed(), seed=3) == dataset != load_examples(mixed(), seed=4)
    alone = DataSection(task="finance-news", num_train=40)
    assert load_examples(alone, seed=3) == load(alone, seed=3)


def test_a_mixture_takes_what_a_root_has_and_generates_the_rest(tmp_path: Path) -> None:
    (tmp_path / "instruct").mkdir()
    rows = "".join(f'{{"prompt": "say {n}", "response": "{n}"}}\n' for n in range(30))
    (tmp_path / "instruct" / "train.jsonl").write_text(rows)
    section = mixed(mixture={"finance-news": 1.0, "instruct": 1.0}, root=tmp_path, num_train=None, num_test=None)
    dataset = load_examples(section, seed=0)
    assert Counter(example.fields["task"] for example in dataset.splits["train"]) == {
        "finance-news": 21,
        "instruct": 21,
    }


def test_what_a_mixture_cannot_be() -> None:
    for changes, words in (
        ({"mixture": {"odd": 1.0, "instruct": 1.0}}, "unknown task 'odd'"),
        ({"mixture": {"instruct": 1.0}}, "two or more tasks"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_examples(mixed(**changes), seed=0)
    with pytest.raises(DataError, match="gets none of 8 validation examples"):
        load_examples(mixed(mixture={"finance-news": 99.0, "client-notes": 1.0}, num_train=400), seed=0)
    with pytest.raises(DataError, match="name a split"):
        read_examples("mine.jsonl", resolve(mixed()))
    data = {"task": "mixture", "mixture": SHARES, "prompt": "{text}", "train": "a.jsonl"}
    with pytest.raises(ConfigError) as caught:
        from_mapping({"data": data, "evaluation": {"per_client": True}})
    assert len(caught.value.faults) == 3
    with pytest.raises(ConfigError, match=r"data.mixture needs data.task = 'mixture'"):
        from_mapping({"data": {"mixture": SHARES}})


def test_a_text_file_is_parted_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("".join(f"Part {n}.\nGoes on.\n\n\n" for n in range(20)))
    dataset = load(DataSection(task="text", train=path), seed=0)
    examples = [example for split in dataset.splits.values() for example in split]
    assert all(example.is_document and not example.messages for example in examples)
    assert {example.answer for example in examples} == {f"Part {n}.\nGoes on." for n in range(20)}
    assert len(dataset.splits["train"]) == 14 and not any("also stand" in note for note in dataset.notes)


def test_pairs_differ_in_one_principle_and_no_news_is_in_two_splits() -> None:
    made = notes.generate(num_train=200, num_validation=20, num_test=60, seed=1)
    news = {split: {row["text"] for row in rows} for split, rows in made.items()}
    assert not news["train"] & news["test"] and not news["validation"] & (news["train"] | news["test"])
    assert {row["principle"] for row in made["test"]} == {"caution", "patience", "source", "courtesy"}
    for row in made["test"]:
        assert notes.keeps_to_principles(row["chosen"]) is True
        assert notes.keeps_to_principles(row["rejected"]) is False
        assert row["written"] in (row["chosen"], row["rejected"])
        principle = next(each for each in lexicons.notes().principles if each.name == row["principle"])
        kept = next(wording for wording in principle.kept if wording in row["chosen"])
        broken = next(wording for wording in principle.broken if wording in row["rejected"])
        assert row["chosen"].replace(kept, "") == row["rejected"].replace(broken, "")
    wrong = sum(notes.keeps_to_principles(row["chosen"]) is False for row in made["train"])
    assert 8 <= wrong <= 34  # a tenth of 200, more or less
    assert made == notes.generate(num_train=200, num_validation=20, num_test=60, seed=1)
    assert notes.keeps_to_principles("This is good.") is None
