from __future__ import annotations

import tomllib
from typing import Any

import pytest

from silotune.config import from_mapping
from silotune.data.files import Table
from silotune.data.guess import GuessError, columns_of, guess
from silotune.data.load import fitting
from silotune.data.tasks import resolve
from silotune.data.toml import written
from silotune.structs import Row

TEXTS = [f"Patient {number} came at night with a case of {number % 7}." for number in range(24)]


def test_labels_are_a_column_of_few_values_that_come_again() -> None:
    rows = [
        {"id": number, "Note": text, "Ward": "AB"[number % 2], "Urgency": ["wait", "urgent", "Urgent"][number % 3]}
        for number, text in enumerate(TEXTS)
    ]
    found = guess([*rows, {**rows[0], "Urgency": ""}])
    assert found.objective == "choice"
    definition = found.data["definition"]
    assert (definition["answer"], definition["options"]) == ("Urgency", ["urgent", "wait"])
    assert definition["prompt"] == "{Note}\nWhich of these is it: urgent, wait?\nAnswer:"
    assert (definition["fields"], found.unused) == (["Ward"], ("id",))


@pytest.mark.parametrize("name", ["Note: text", "a{b}", "free text (2024)", "été"])
@pytest.mark.parametrize("options", [["0", "1"], ["a {b}", "c"], ["é", "x"]])
def test_any_column_can_be_asked_and_every_row_fits(name: str, options: list[str]) -> None:
    rows: list[Row] = [{name: text, "Grade": options[number % 2]} for number, text in enumerate(TEXTS)]
    section = from_mapping({"data": guess(rows).data}).data
    examples, faults = fitting(Table(list(rows)), resolve(section), "w")
    assert (len(examples), faults) == (24, [])
    assert examples[0].messages[0][1].startswith(TEXTS[0])


@pytest.mark.parametrize(
    ("row", "task", "objective"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "instruct", "sft"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "instruct", "sft"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "dpo"),
        ({"text": "a"}, "text", "pretrain"),
    ],
)
def test_columns_that_tell_a_known_task(row: Row, task: str, objective: str) -> None:
    found = guess([row] * 3)
    assert (found.data, found.objective) == ({"task": task}, objective)


def test_answers_that_never_come_again_are_open() -> None:
    found = guess([{"question": text, "reply": f"It is {number}."} for number, text in enumerate(TEXTS)])
    assert found.objective == "sft" and found.data["definition"] == {"prompt": "{question}\nAnswer:", "answer": "reply"}


@pytest.mark.parametrize("row", [{"n": 1, "label": 2}, {"a": "SECRET", "b": "x y"}, {"list": [1]}])
def test_columns_that_show_no_task_are_said_with_the_remedy(row: Row) -> None:
    with pytest.raises(GuessError, match="none of the columns .* looks like an? .*: name them in") as caught:
        guess([row])
    assert [column.name for column in caught.value.columns] == list(row)
    assert "SECRET" not in str(caught.value)


def test_bytes_that_are_text_are_text() -> None:
    rows = [{"note": f"é {text}".encode(), "urgency": b"now" if place % 2 else b"later", "scan": b"\xff"}
            for place, text in enumerate(TEXTS * 4)]  # fmt: skip
    found = guess(rows)
    assert found.data["definition"]["options"] == ["later", "now"] and "note" in found.data["definition"]["prompt"]
    assert columns_of(rows)[2].kinds == ("bytes",)


def test_what_a_column_holds() -> None:
    rows: list[Row] = [{"a": "xy", "b": 1}, {"a": " ", "b": 2.5}, {"a": "xy", "c": None}, {"b": float("nan"), "a": "z"}]
    a, b, c = columns_of(rows)
    assert (a.kinds, a.filled, a.empty, a.distinct) == (("text",), 3, 1, 2)
    assert (b.kinds, b.filled, b.empty) == (("number",), 2, 2)
    assert (c.kinds, c.filled, c.characters) == ((), 0, 0.0)


@pytest.mark.parametrize(
    "document",
    [
        {"data": {"task": "custom", "definition": {"columns": {"text": 'a "b"\n\\ \x7fé'}, "options": ["x", "ü"]}}},
        {"data": {"partition": {"files": {"a.b": "c", "d e": "f"}}, "n": 3, "x": 0.001, "yes": True}, "empty": {}},
        {"seed": 3},
    ],
)
def test_what_is_written_as_toml_is_read_back(document: dict[str, Any]) -> None:
    assert tomllib.loads(written(document)) == document
