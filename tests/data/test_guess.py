from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from silotune.config import from_mapping
from silotune.data.files import Fault, Table
from silotune.data.guess import GuessError, columns_of, guess, guess_from
from silotune.data.load import fitting
from silotune.data.tasks import resolve
from silotune.data.toml import written
from silotune.errors import DataError
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


def test_labels_that_differ_in_what_nobody_sees_are_one_option() -> None:
    labels = ["1.0", 1, "1 ", "\u200b1", "0", 0.0, "0.0", "0\u200f"]
    rows: list[Row] = [{"note": text, "label": labels[number % 8]} for number, text in enumerate(TEXTS)]
    found = guess(rows)
    assert found.data["definition"]["options"] == ["0", "1"]
    examples, faults = fitting(Table(list(rows)), resolve(from_mapping({"data": found.data}).data), "w")
    assert ([example.label for example in examples[:8]], faults) == ([1] * 4 + [0] * 4, [])


OWN = [[f"finding {(number + place) % 7}" for place in range(3)] for number in range(24)]


@pytest.mark.parametrize(
    ("said", "label_names"),
    [
        (lambda place, own: "ABC"[place], {}),
        (lambda place, own: own[place].upper(), {}),
        (lambda place, own: place, {"0": "A", "1": "B", "2": "C"}),
        (lambda place, own: float(place + 1), {"1": "A", "2": "B", "3": "C"}),
        (
            lambda place, own: [place, "abc"[place], own[place]][len(own[0] + own[1]) % 3],
            {"0": "A", "1": "B", "2": "C"},
        ),
    ],
)
@pytest.mark.parametrize(
    "columns", [("options",), ("option_a", "option_b", "option_c"), ("op1", "op2", "op3"), ("A", "B", "C")]
)
def test_options_of_the_rows_own_are_asked_whatever_the_answers_call_them(
    said: Any, label_names: dict[str, str], columns: tuple[str, ...]
) -> None:
    rows: list[Row] = [
        {"question": text, **(dict(zip(columns, own, strict=True)) if len(columns) > 1 else {"options": own}),
         "answer": said(number % 3, own)}
        for number, (text, own) in enumerate(zip(TEXTS, OWN, strict=True))
    ]  # fmt: skip
    found = guess(rows)
    definition = found.data["definition"]
    assert (definition["choices"], definition["options"]) == (list(columns), ["A", "B", "C"])
    assert set(definition.get("label_names", {})) <= set(label_names)
    assert "fields" not in definition and found.unused == ()
    examples, faults = fitting(Table(list(rows)), resolve(from_mapping({"data": found.data}).data), "w")
    assert ([example.label for example in examples], faults) == ([number % 3 for number in range(24)], [])
    assert "A. finding" in examples[0].messages[0][1]


@pytest.mark.parametrize(
    ("options", "answers"), [(["x", "y", "z"], (1, 2)), (["x", "y", "z"], (0, 3)), (["2", "4", "6"], ("2", "6"))]
)
def test_numbers_that_may_count_options_in_two_ways_are_not_guessed(options: list[str], answers: Any) -> None:
    rows: list[Row] = [
        {"question": text, "options": options, "answer": answers[number % 2]} for number, text in enumerate(TEXTS)
    ]
    with pytest.raises(DataError, match=r"the numbers in column 'answer' .* do not show which: say it in label_names"):
        guess(rows)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_are_known_by_most_of_them_and_say_why_none_fits(column: str) -> None:
    def chat(role: str) -> Row:
        return {column: [{"role": "USER", "content": "a"}, {"role": role, "content": "b"}]}

    assert guess([chat("Assistant"), chat("x"), chat("GPT ")]).data == {"task": "instruct"}
    with pytest.raises(DataError, match=rf"most chats do not fit; the first: row 1: {column}: message 2 needs a role"):
        guess([chat("x"), chat("y"), chat("gpt")])


@pytest.mark.parametrize("first", [("short", "wait"), ("A long note. " * 6, "b")])
def test_a_first_row_that_is_an_example_is_no_row_of_names(first: tuple[str, str]) -> None:
    rows = [dict(zip(first, (text, ["wait", "urgent"][number % 2]), strict=True)) for number, text in enumerate(TEXTS)]
    with pytest.raises(DataError, match="the first row looks like an example: put a row with a short name") as caught:
        guess(rows)
    assert "long note" not in str(caught.value)


def test_files_without_a_row_that_can_be_read_show_no_task_and_notes_stand_beside_the_error() -> None:
    faults = [Fault("row 1", "has 3 cells"), Fault("row 2", "has 3 cells")]
    with pytest.raises(DataError, match="a.csv: none of 2 rows fits: has 3 cells$"):
        guess_from({Path("a.csv"): Table([*faults])})
    with pytest.raises(GuessError, match="looks like an answer: .*; column 1 has no name"):
        guess_from({Path("a.csv"): Table([{"a": "x"}], ("column 1 has no name",))})


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


def test_a_text_that_slipped_into_the_labels_is_no_option() -> None:
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(TEXTS)]
    slipped = [{"text": "oops", "label": text * 2} for text in TEXTS[:2]]
    assert guess([*rows, *slipped]).data["definition"]["options"] == ["a", "b"]


def test_a_file_without_a_row_of_names_shows_none_of_its_texts() -> None:
    text = "A patient who is not to be named came at night with pains in the chest."
    with pytest.raises(DataError, match="the first row looks like an example") as caught:
        guess([{text: other, "wait": "urgent"} for other in TEXTS])
    assert text not in str(caught.value)


def test_columns_of_rows_that_share_none_are_told_in_one_pass_and_named_in_part() -> None:
    rows = [{f"k{number}": "v"} for number in range(5000)]
    found = columns_of(rows)
    assert (len(found), found[0].filled, found[0].empty) == (5000, 1, 4999)
    with pytest.raises(GuessError, match="k11 and 4988 more looks like an answer"):
        guess(rows)
