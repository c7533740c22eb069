"""Chats and pairs as people have them: every format of the docs, and what is refused by row and message."""

from __future__ import annotations

import json
from typing import Any

import pytest

from markdown import ROOT, tables
from silotune.data.chats import asked_in, turns_of
from silotune.data.tasks import TASKS, to_example
from silotune.errors import DataError
from silotune.structs import Example, Turn

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}
WORSE, THANKS = {"role": "assistant", "content": "no"}, {"role": "user", "content": "SECRET"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
LOOK = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}


def convert(task: str, **row: Any) -> Example:
    return to_example(TASKS[task], row, where="a.jsonl", number=17)


def documented() -> list[tuple[str, dict[str, Any]]]:
    """Task and row of every line of the docs' tables of formats."""
    pages = [ROOT / "docs" / name for name in ("own-data.md", "preference.md")]
    found = [lines for page in pages for head, lines in tables(page) if head[-1] == "example row"]
    return [(cells[0].strip("`"), json.loads(cells[-1].strip("`"))) for lines in found for cells in lines]


@pytest.mark.parametrize(("task", "row"), documented())
def test_every_format_in_the_docs_is_read(task: str, row: dict[str, Any]) -> None:
    example = convert(task, **row)
    assert example.answer or example.calls
    assert bool(example.rejected) == ("rejected" in row) and (example.wanted is None) == ("label" not in row)


def test_the_docs_name_every_layout() -> None:
    rows = documented()
    for task in ("instruct", "preference", "text"):
        for layout in TASKS[task].layouts:
            assert any(name == task and set(layout.required()) <= set(row) for name, row in rows), layout


# --- contents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}], "One, two."),
        ({"type": "text", "text": "One."}, "One."),
        ([{"type": "text", "text": "One.", "image_url": None}, "Two."], "One.Two."),  # Parquet fills with None
        (3, "3"),
    ],
)
def test_parts_of_text_are_joined(content: Any, text: str) -> None:
    (turn,) = turns_of([{"role": "user", "content": content}], "x")
    assert turn == ("user", text) and type(turn) is tuple


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "SECRET"}, {"type": "image_url", "image_url": {"url": "SECRET"}}],
        {"type": "input_audio", "text": "SECRET"},
        {"SECRET": "SECRET"},
        [["SECRET"]],
        b"SECRET",
    ],
)
def test_other_parts_are_refused_by_row_and_message(content: Any) -> None:
    with pytest.raises(DataError, match=r"row 17: messages: message 2: part \d of its content is not text") as caught:
        convert("instruct", messages=[USER, {"role": "assistant", "content": content}, ANSWER])
    assert "SECRET" not in str(caught.value)


def test_an_answer_keeps_how_far_it_is_indented() -> None:
    example = convert("instruct", messages=[USER, {"role": "assistant", "content": "\n    y = 1\n    return y\n"}])
    assert example.answer == "    y = 1\n    return y"


# --- ShareGPT, tools, weights ----------------------------------------------------------------------------------------


def test_sharegpt_is_the_same_chat() -> None:
    names = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}
    said = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Wait."), ("tool", "3"), ("gpt", "It is 3.")]
    example = convert("instruct", conversations=[{"from": who, "value": text} for who, text in said])
    assert example == convert("instruct", messages=[{"role": names[who], "content": text} for who, text in said])
    assert [role for role, _ in example.messages] == ["system", "user", "assistant", "tool"]


def test_a_system_s_message_beside_a_sharegpt_chat_is_its_first_turn() -> None:
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    own = [{"from": "system", "value": "Be kind."}, *chat]
    assert convert("instruct", conversations=chat, system="Be kind.") == convert("instruct", conversations=own)
    assert convert("instruct", conversations=own, system="Be rude.") == convert("instruct", conversations=own)
    assert convert("instruct", conversations=chat, system=" ") == convert("instruct", conversations=chat)
    with pytest.raises(DataError, match="field 'system' is not text"):
        convert("instruct", conversations=chat, system=["SECRET"])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "x"}'}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "look", "arguments": '{"at": "x"}'}},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "x"}}'},
    ],
)
@pytest.mark.parametrize("tools", [[LOOK], json.dumps([{"type": "function", "function": LOOK}])])
def test_calls_of_tools_are_read_alike(message: dict[str, Any], tools: Any) -> None:
    result = {"role": "tool", "content": "3", "name": "look"}
    example = convert("instruct", messages=[USER, message, result, ANSWER], tools=tools)
    described, _, called, answered = example.messages
    assert described == ("tools", json.dumps([{"type": "function", "function": LOOK}]))
    assert called == Turn(("assistant", ""), json.dumps({"tool_calls": [CALL]})) != ("assistant", "")
    assert answered == Turn(("tool", "3"), '{"name": "look"}')
    last = convert("instruct", messages=[USER, message], tools=tools)
    assert (last.answer, json.loads(last.calls)) == ("", {"tool_calls": [CALL]})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "message 1 calls a tool, which an assistant's"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["SECRET"]}]}, "message 2 calls a tool without"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "look", "arguments": "SECRET"}]}]},
            "arguments, which are a JSON object",
        ),
        ({"messages": [USER, {"from": "function_call", "value": "SECRET"}]}, "message 2 calls a tool without"),
        ({"messages": [USER, ANSWER], "tools": "SECRET"}, "'tools' is not a list of functions with a name"),
        ({"messages": [USER, ANSWER], "tools": [{"description": "SECRET"}]}, "not a list of functions with a name"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2: its weight must be 0 or 1"),
        ({"messages": [USER, {**ANSWER, "train": "SECRET"}]}, "message 2: its weight must be 0 or 1, and its train"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "has no answer to learn: each has a weight of 0"),
        ({"messages": [USER, {"role": "tool", "content": "SECRET"}]}, "must end with a user's message and an"),
    ],
)
def test_what_a_message_says_beside_its_text_is_refused_where_it_does_not_fit(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        convert("instruct", **row)
    assert "row 17" in str(caught.value) and "SECRET" not in str(caught.value)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0, "train": None}, {"train": False}, {"train": "false"}])
def test_a_message_may_be_read_and_not_learnt(mark: dict[str, Any]) -> None:
    example = convert("instruct", messages=[USER, {**WORSE, **mark}, USER, {**ANSWER, "weight": 1}])
    greeting = example.messages[1]
    assert isinstance(greeting, Turn) and greeting == ("assistant", "no") and not greeting.is_learnt
    assert example.answer == "yes"
    behind = convert("instruct", messages=[USER, ANSWER, USER, {**WORSE, **mark}])
    assert (behind.messages, behind.answer) == ((("user", "Hi"),), "yes")


# --- trl's formats ---------------------------------------------------------------------------------------------------


def test_of_prompt_and_completion_the_completion_is_learnt() -> None:
    example = convert("instruct", prompt=[USER, WORSE, USER], completion=[ANSWER, USER, WORSE])
    assert [turn[1] for turn in example.messages] == ["Hi", "no", "Hi", "yes", "Hi"] and example.answer == "no"
    learnt = [turn.is_learnt for turn in example.messages if isinstance(turn, Turn)]
    assert learnt == [False]
    for row in ({"prompt": "Hi", "completion": "yes"}, {"prompt": [USER], "completion": [ANSWER]}):
        example = convert("instruct", **row)
        assert (example.messages, example.answer) == ((("user", "Hi"),), "yes")


@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_judged_answers_are_not_learnt_as_any(label: Any) -> None:
    with pytest.raises(DataError, match="row 17: field 'label' judges the answer: use data.task = 'preference' with"):
        convert("instruct", prompt="Hi", completion="yes", label=label)
    assert convert("instruct", prompt="Hi", completion="yes", label="greeting").answer == "yes"


def test_a_chat_within_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="row 17: field 'instruction' holds a chat, which is read where it is all of"):
        convert("instruct", instruction=[USER], input="", output="yes")


PAIR = Example((("user", "Hi"),), "yes", rejected="no")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [WORSE]},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, WORSE])},  # as in a CSV file
        {"chosen": "Hi\nyes", "rejected": "Hi\nno"},
        {"messages": [USER, ANSWER], "prompt": "x", "chosen": [USER, ANSWER], "rejected": "no"},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
    ],
)  # fmt: skip
def test_pairs_are_read_in_every_format(row: dict[str, Any]) -> None:
    example = convert("preference", **row)
    assert (example.messages, example.answer, example.rejected) == (PAIR.messages, PAIR.answer, PAIR.rejected)


@pytest.mark.parametrize("prompt", ["Hi", [USER]])
@pytest.mark.parametrize("completion", ["yes", [ANSWER]])
def test_single_answers_are_judged_in_every_format(prompt: Any, completion: Any) -> None:
    example = convert("preference", prompt=prompt, completion=completion, label=False)
    assert (example.messages, example.answer, example.wanted) == (PAIR.messages, "yes", False)


def test_words_that_two_texts_begin_with_are_whole() -> None:
    example = convert(
        "preference", chosen="Human: Hi\n\nAssistant: surely", rejected="Human: Hi\n\nAssistant: sure not"
    )
    assert example.messages == (("user", "Human: Hi\n\nAssistant:"),)
    assert (example.answer, example.rejected) == ("surely", "sure not")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, WORSE, THANKS]},
            "'rejected' must end with an assistant's answer",
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "'rejected' must end with an assistant's answer"),
        ({"chosen": [USER, ANSWER], "rejected": [THANKS, WORSE]}, "'rejected' begins with other turns"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "hold the same answer"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "give what it answers in a column 'prompt'"),
        ({"prompt": "Other", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "'chosen' begins with other turns"),
        (
            {"prompt": "Hi", "chosen": [{"role": "system", "content": "SECRET"}, USER, ANSWER], "rejected": [WORSE]},
            "'chosen' begins with other turns",
        ),
        ({"prompt": [USER, ANSWER], "chosen": [ANSWER], "rejected": [WORSE]}, "prompt: ends with an answer"),
        ({"chosen": "SECRET one", "rejected": "other"}, "have no beginning in common: add a 'prompt'"),
        ({"chosen": "SECRET ", "rejected": "SECRET one"}, "have no beginning in common"),
        ({"chosen": "Hi SECRET", "rejected": [USER, WORSE]}, "'rejected'"),
        (
            {"prompt": "Hi", "chosen": [{"role": "assistant", "tool_calls": [CALL]}], "rejected": [WORSE]},
            "'chosen' ends with a call of a tool",
        ),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused_by_row(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        convert("preference", **row)
    assert "row 17" in str(caught.value) and "SECRET" not in str(caught.value)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_row_asks_by_its_chat_without_the_answer() -> None:
    for row in ({"prompt": "Hi"}, {"prompt": [USER]}, {"messages": [USER]}, {"messages": [USER, ANSWER]},
                {"conversations": [{"from": "human", "value": "Hi"}]}):  # fmt: skip
        assert asked_in(row, "x") == (("user", "Hi"),)
    assert asked_in({"messages": [USER], "tools": [LOOK]}, "x")[0][0] == "tools"
    for row in ({}, {"messages": []}, {"messages": [ANSWER]}, {"prompt": 3}):
        with pytest.raises(DataError, match="^x"):
            asked_in(row, "x")


@pytest.mark.parametrize("depth", [100, 500, 5000])
def test_a_tool_or_a_call_that_nests_without_end_is_refused_by_row(depth: int) -> None:
    nested: Any = "a"
    for _ in range(depth):
        nested = [nested]
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    called = {**answered, "tool_calls": [{"name": "f", "arguments": {"p": nested}}]}
    for row in (
        {"messages": [asked, answered], "tools": [{"name": "f", "p": nested}]},
        {"messages": [asked, called]},
    ):
        with pytest.raises(DataError, match="x: row 1: .* nests more than 64 deep"):
            to_example(TASKS["instruct"], row, where="x", number=1)
