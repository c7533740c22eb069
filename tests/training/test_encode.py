"""What is supervised: the answer and its end, nothing of the prompt, nothing of the padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from silotune.errors import DataError
from silotune.structs import Example
from silotune.training.batches import answer_batch
from silotune.training.encode import answer_ids, prompt_ids, render, truncation_note
from silotune.training.encoder import Encoder

CPU = torch.device("cpu")
CHAT, PLAIN, BEGUN = tiny.tokenizer(), tiny.tokenizer(chat=False), tiny.tokenizer(chat=False, begin="<s>")
PAD_IS_END = tiny.tokenizer(pad="</s>")


@pytest.mark.parametrize("words", [CHAT, PLAIN, BEGUN, PAD_IS_END], ids=["chat", "plain", "begun", "pad is end"])
@pytest.mark.parametrize("examples", [tiny.closed(), tiny.opened()], ids=["closed", "open"])
def test_exactly_answer_and_end_are_supervised(words, examples: list[Example]) -> None:
    encoded = Encoder(words, max_length=128)(examples)
    made = answer_batch(encoded, pad_id=words.pad_token_id, device=CPU)
    length = made.batch.ids.shape[1]
    for row, example in enumerate(examples):
        own = made.owner == row
        assert made.targets[own].tolist() == [*answer_ids(example.answer, words), words.eos_token_id]
        places = made.batch.positions[own] - row * length  # the place before each supervised id
        first = len(prompt_ids(example.messages, words))
        assert places.tolist() == list(range(first - 1, first + len(encoded[row].answer) - 1))
        line = made.batch.ids[row].tolist()
        inputs = [*encoded[row].prompt, *encoded[row].answer[:-1]]
        assert line == [*inputs, *[words.pad_token_id] * (length - len(inputs))]
        assert int(places.max()) < len(inputs)


def test_prompt_and_answer_joined_read_as_the_template_says() -> None:
    example = tiny.opened(1)[0]
    encoded = tiny.encoded([example])[0]
    text = CHAT.decode([*encoded.prompt, *encoded.answer])
    assert text == f"<|system|>be short</s><|user|>{tiny.TEXTS[0]}</s><|assistant|>{example.answer}</s>"
    plain = Encoder(PLAIN, max_length=128)([example])[0]
    assert PLAIN.decode([*plain.prompt, *plain.answer]) == f"be short\n{tiny.TEXTS[0]} {example.answer}</s>"


def test_a_text_begins_as_the_tokenizer_begins_it_and_once() -> None:
    turns = (("user", "shares fell"),)
    assert prompt_ids(turns, BEGUN)[0] == BEGUN.bos_token_id
    assert prompt_ids(turns, PLAIN) == PLAIN("shares fell")["input_ids"]
    twice = tiny.tokenizer(begin="<s>")
    twice.chat_template = "<s>" + tiny.TEMPLATE
    assert prompt_ids(turns, twice).count(twice.bos_token_id) == 1
    assert render(turns, BEGUN) == "shares fell"


def test_truncation_cuts_the_prompt_on_the_left_and_is_counted() -> None:
    long = Example((("user", "shares " * 60 + "fell"),), "negative", tiny.LABELS, 0)
    short = tiny.closed(1)[0]
    whole = tiny.encoded([long], max_length=256)[0]
    cut = tiny.encoded([long, short], max_length=40)
    assert cut[0].prompt == whole.prompt[-len(cut[0].prompt) :]
    assert cut[0].answer == whole.answer
    assert cut[0].prompt_cut == len(whole.prompt) - len(cut[0].prompt) > 0
    assert cut[1].prompt_cut == 0
    note = truncation_note(cut, "train")
    assert note is not None and "1 of 2 prompts" in note and "0 answers" in note
    assert truncation_note(cut[1:], "train") is None


def test_a_cut_prompt_keeps_its_beginning_mark() -> None:
    long = Example((("user", "shares " * 60 + "fell"),), "negative")
    cut = Encoder(BEGUN, max_length=20)([long])[0]
    assert cut.length == 20
    assert cut.prompt[0] == BEGUN.bos_token_id
    assert cut.prompt_cut == len(prompt_ids(long.messages, BEGUN)) - len(cut.prompt)


@pytest.mark.parametrize("label", [0, 1])
def test_prompt_and_longest_option_fit_the_context(label: int) -> None:
    options = ("no", "a neutral outlook of the company")
    example = Example((("user", "shares " * 60),), options[label], options, label)
    made = tiny.encoded([example], max_length=40)[0]
    assert len(made.prompt) + max(map(len, made.options)) <= 40
    assert made.length <= 40


def test_an_open_answer_is_cut_on_the_right_and_counted() -> None:
    example = Example((("user", "shares fell"),), "yes " * 50)
    made = tiny.encoded([example], max_length=16)[0]
    full = [*answer_ids(example.answer, CHAT), CHAT.eos_token_id]
    assert made.answer == tuple(full[:15])
    assert made.answer_cut == len(full) - 15
    assert len(made.prompt) == 1
    assert "1 answers" in str(truncation_note([made], "train"))


def test_a_closed_answer_that_does_not_fit_is_refused_by_number() -> None:
    options = ("no", "profit " * 20)
    examples = [tiny.closed(1)[0], Example((("user", "secret words"),), "no", options, 0)]
    with pytest.raises(DataError, match=r"example 2: .*max_length is 16") as caught:
        tiny.encoded(examples, max_length=16)
    assert "secret" not in str(caught.value)


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(DataError, match="example 1: its answer has no tokens"):
        tiny.encoded([replace(tiny.opened(1)[0], answer="")])
    with pytest.raises(DataError, match="example 1: its prompt has no tokens"):
        Encoder(PLAIN, max_length=16)([Example((("user", ""),), "yes")])


def test_options_that_begin_alike_get_the_end() -> None:
    apart = tiny.encoded(tiny.closed(1))[0]
    assert all(option[-1] != CHAT.eos_token_id for option in apart.options)
    alike = tiny.encoded(tiny.closed(2, options=("A", "A B")))
    assert alike[0].options == tuple((*answer_ids(text, CHAT), CHAT.eos_token_id) for text in ("A", "A B"))
    assert [example.answer for example in alike] == list(alike[0].options)


def test_options_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(DataError, match="same tokens"):
        tiny.encoded([Example((("user", "x"),), "A", ("A", "A"), 0)])
    endless = tiny.tokenizer(chat=False)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end"):
        Encoder(endless, max_length=64)([Example((("user", "x"),), "A", ("A", "A B"), 0)])


def test_a_space_parts_prompt_and_answer_only_where_there_is_no_white_space() -> None:
    for prompt, answer, joined in (("a:", "b", "a: b"), ("a:\n", "b", "a:\nb"), ("a:", "  b", "a:  b")):
        made = Encoder(PLAIN, max_length=64)([Example((("user", prompt),), answer)])[0]
        assert PLAIN.decode([*made.prompt, *made.answer]) == f"{joined}</s>"
        chat = tiny.encoded([Example((("user", prompt),), answer)])[0]
        assert CHAT.decode([*chat.prompt, *chat.answer]) == f"<|user|>{prompt}</s><|assistant|>{answer}</s>"
