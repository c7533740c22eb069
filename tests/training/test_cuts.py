"""Prompts that are too long: where they are cut, what stays, and columns that alone are shortened."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny
from silotune.data.tasks import resolve, to_example
from silotune.errors import ConfigError
from silotune.settings.sections import DataSection, TaskSection, Truncate
from silotune.structs import Example
from silotune.training.encode import Encoded, prompt_ids, truncation_note
from silotune.training.encoder import ClassEncoder, Encoder

WORDS = tiny.tokenizer()
LONG = Example((("system", "be short"), ("user", "first " + "profit rose " * 20 + "last")), "yes")
NOTE = "begin " + "profit rose " * 30 + "end"
DEFINITION = TaskSection(prompt="Say {how}.\nNote: {note}\nUrgent?", answer="level", options=("yes", "no"))


def encode(example: Example, truncate: Truncate, *, max_length: int = 32) -> Encoded:
    (made,) = Encoder(WORDS, max_length=max_length, truncate=truncate)([example])
    return made


def noted(note: str, *, options: bool = True) -> Example:
    definition = DEFINITION if options else DEFINITION.model_copy(update={"options": ()})
    task = resolve(DataSection(task="custom", definition=definition, shorten=("note",)))
    return to_example(task, {"how": "it", "note": note, "level": "yes"}, where="x", number=1)


@pytest.mark.parametrize("truncate", ["left", "right", "middle"])
def test_a_prompt_is_cut_where_it_is_asked_and_stays_a_prompt(truncate: Truncate) -> None:
    whole, made = prompt_ids(LONG.messages, WORDS), encode(LONG, truncate)
    text = WORDS.decode(made.prompt)
    assert made.length == 32 and made.prompt_cut == len(whole) - len(made.prompt)
    assert text.endswith("</s><|assistant|>")  # whatever is cut, the assistant begins
    assert ("last" in text, "be short" in text) == {
        "left": (True, False), "right": (False, True), "middle": (True, True)
    }[truncate]  # fmt: skip
    where = {"left": "on the left", "right": "on the right", "middle": "in the middle"}[truncate]
    assert f"1 of 1 prompts were cut {where} and 0" in str(truncation_note([made], "train", truncate=truncate))
    assert encode(LONG, truncate, max_length=250).prompt == tuple(whole)


def test_a_cut_keeps_the_mark_that_begins_a_text() -> None:
    words = tiny.tokenizer(chat=False, begin="<s>")
    for truncate in ("left", "right", "middle"):
        (made,) = Encoder(words, max_length=16, truncate=truncate)([LONG])  # type: ignore[arg-type]
        assert made.prompt[0] == words.bos_token_id and made.length == 16


@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("truncate", ["left", "right", "middle"])
def test_only_the_named_columns_are_shortened(truncate: Truncate, options: bool) -> None:
    example = noted(NOTE, options=options)
    made, whole = encode(example, truncate, max_length=96), prompt_ids(example.messages, WORDS)
    text = WORDS.decode(made.prompt)
    assert text.startswith("<|user|>Say it.\nNote: ") and text.endswith("\nUrgent?</s><|assistant|>")
    assert ("begin" in text, "end" in text) == {
        "left": (False, True), "right": (True, False), "middle": (True, True)
    }[truncate]  # fmt: skip
    assert made.prompt_cut == len(whole) - len(made.prompt) > 0
    assert 90 <= made.length <= 96  # no more is taken away than has to be
    short = noted("profit rose")
    assert encode(short, truncate, max_length=96).prompt == tuple(prompt_ids(short.messages, WORDS))


def test_a_prompt_that_is_too_long_without_its_columns_is_cut_as_any() -> None:
    example = noted(NOTE)
    made = encode(example, "left", max_length=16)
    assert made.length <= 16 and WORDS.decode(made.prompt).endswith("Urgent?</s><|assistant|>")


def test_pairs_and_classes_are_shortened_alike() -> None:
    pair = Example(noted(NOTE).messages, "yes", rejected="no", shorten=noted(NOTE).shorten)
    text = WORDS.decode(encode(pair, "right", max_length=96).prompt)
    assert text.startswith("<|user|>Say it.\nNote: begin") and text.endswith("Urgent?</s><|assistant|>")
    base = replace(tiny.base(), labels=("yes", "no"))
    for wording, start in (("prompt", "<|user|>Say it.\nNote: begin"), ("text", "<|user|>it\nbegin")):
        (made,) = ClassEncoder(base, max_length=64, wording=wording, truncate="right")([noted(NOTE)])
        text = WORDS.decode(made.prompt)
        assert text.startswith(start) and text.endswith("</s><|assistant|>") and 58 <= made.length <= 64
        assert made.prompt_cut


def test_where_columns_stand_is_known_from_the_template() -> None:
    section = DataSection(task="instruct", shorten=("input",))
    row = {"instruction": "{input}", "input": "a {b}", "output": "x"}
    example = to_example(resolve(section), row, where="x", number=1)
    (start, end), content = example.shorten[0], example.messages[0][1]
    assert (content[start:end], start) == ("a {b}", content.rindex("a {b}"))
    assert to_example(resolve(section), {**row, "input": ""}, where="x", number=1).shorten == ()
    assert to_example(resolve(section), {"prompt": "p", "response": "x"}, where="x", number=1).shorten == ()
    first = resolve(DataSection(task="instruct", shorten=("instruction",), prompt=None))
    assert to_example(first, row, where="x", number=1).shorten == ((0, len("{input}")),)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"task": "fpb", "shorten": ("txt",)}, "data.shorten: .*'txt'.*'?text"),
        ({"task": "text", "shorten": ("text",)}, "data.shorten: task 'text' has no prompt with columns"),
        ({"task": "medqa", "shorten": ("options",)}, "data.shorten: .*'options'"),
    ],
)
def test_a_column_that_is_not_in_the_prompt_is_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(DataSection(**section))
