"""Chats with several answers, and plain text: what is learnt of them, and what is only read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from silotune.errors import DataError
from silotune.structs import Example, Turn
from silotune.training.batches import answer_batch
from silotune.training.encode import Encoded, answer_ids, prompt_ids
from silotune.training.encoder import Encoder

WORDS = tiny.tokenizer()
TURNS = (
    ("system", "be short"),
    ("user", "profit rose"),
    ("assistant", "good news"),
    ("user", "and the shares"),
    ("assistant", "up too"),
    ("user", "thanks"),
)
CHAT = Example(TURNS, "see you")


def encode(example: Example, *, max_length: int = 128, **options: str) -> Encoded:
    (made,) = Encoder(WORDS, max_length=max_length, **options)([example])
    return made


def learnt(made: Encoded) -> list[int]:
    return answer_batch([made], pad_id=0, device=torch.device("cpu")).targets.tolist()


def test_every_answer_is_learnt_with_its_end_and_nothing_else() -> None:
    made = encode(CHAT)
    end = WORDS.eos_token_id
    said = [answer_ids(text, WORDS) for text in ("good news", "up too", "see you")]
    assert learnt(made) == [number for answer in said for number in (*answer, end)]
    assert made.supervised == len(learnt(made)) < len(made.answer)
    whole = WORDS.apply_chat_template(
        [{"role": role, "content": text} for role, text in (*TURNS, ("assistant", "see you"))], tokenize=False
    )
    assert WORDS.decode([*made.prompt, *made.answer]) == whole


def test_the_last_answer_alone_is_what_one_answer_was_before() -> None:
    last = encode(CHAT, turns="last")
    assert last.prompt == tuple(prompt_ids(TURNS, WORDS))
    assert learnt(last) == [*answer_ids("see you", WORDS), WORDS.eos_token_id]
    (plain,) = Encoder(tiny.tokenizer(chat=False), max_length=128)([CHAT])
    assert plain.unsupervised == ()  # nothing marks the end of an earlier answer
    single = Example(TURNS[:2], "good news")
    assert encode(single) == encode(single, turns="last")


def test_a_chat_learns_what_its_answers_would_alone() -> None:
    """The losses of the answers of one pass are those of a pass for each, the chat so far as its prompt."""
    from silotune.training.scores import answer_losses

    model = tiny.adapted()
    with torch.no_grad():
        together, _ = answer_losses(model, [encode(CHAT)])
        apart = [
            answer_losses(model, [encode(Example(TURNS[:place], text), turns="last")])[0]
            for place, text in ((2, "good news"), (4, "up too"), (6, "see you"))
        ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)


def test_the_earliest_exchanges_make_room() -> None:
    whole = encode(CHAT)
    cut = encode(CHAT, max_length=whole.length - 1)
    assert cut == Encoded(
        *(getattr(encode(Example((TURNS[0], *TURNS[3:]), "see you")), name) for name in ("prompt", "answer")),
        prompt_cut=whole.length - cut.length,
        unsupervised=cut.unsupervised,
    )
    last = encode(Example((TURNS[0], TURNS[5]), "see you"))
    one = encode(CHAT, max_length=last.length)
    assert one == Encoded(last.prompt, last.answer, prompt_cut=whole.length - last.length)  # the system's message stays
    cut = encode(CHAT, max_length=last.length - 3)
    assert (cut.length, cut.prompt_cut) == (last.length - 3, whole.length - cut.length)


def test_a_greeting_is_read_and_not_learnt() -> None:
    greeted = encode(Example((("assistant", "good news"), *TURNS[3:]), "see you"))
    end = WORDS.eos_token_id
    assert learnt(greeted) == [*answer_ids("up too", WORDS), end, *answer_ids("see you", WORDS), end]
    assert "good news" in WORDS.decode(greeted.prompt)


def test_a_template_that_refuses_a_role_names_the_example() -> None:
    words = tiny.tokenizer()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    words.chat_template = refuses + tiny.TEMPLATE
    with pytest.raises(DataError, match=r"example 1: .*\(system, user.*\): System role not supported") as caught:
        Encoder(words, max_length=128)([CHAT])
    assert "profit" not in str(caught.value)
    assert Encoder(words, max_length=128)([Example(TURNS[1:], "see you")])


def test_the_mark_with_which_the_template_ends_turns_is_learnt_after_every_answer() -> None:
    words = tiny.tokenizer()
    words.chat_template = tiny.TEMPLATE.replace("</s>{% endfor %}", "<pad>\n{% endfor %}")
    (made,) = Encoder(words, max_length=128)([CHAT])
    mark = words.convert_tokens_to_ids("<pad>")
    said = [answer_ids(text, words) for text in ("good news", "up too", "see you")]
    assert learnt(made) == [number for answer in said for number in (*answer, mark)]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    words = tiny.tokenizer()
    words.chat_template = tiny.TEMPLATE.replace("{{ message['content'] }}", "{{ messages | length }}")
    with pytest.raises(DataError, match=r"example 1: .*set training.objective.turns = 'last'") as caught:
        Encoder(words, max_length=128)([CHAT])
    assert "profit" not in str(caught.value)
    assert Encoder(words, max_length=128, turns="last")([CHAT])


# --- tools, and messages that are only read --------------------------------------------------------------------------

TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}</s>{% endif %}"
    "{% for message in messages %}<|{{ 'user' if message['role'] == 'tool' else message['role'] }}|>"
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
    "call {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LOOK = ("tools", '[{"type": "function", "function": {"name": "look"}}]')
CALLS = '{"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}]}'
CALL, SAID = Turn(("assistant", ""), CALLS), 'call look {"at": "x"}'
USED = Example((LOOK, TURNS[0], TURNS[1], CALL, ("tool", "up too")), "good news")


def tool_words() -> Any:
    words = tiny.tokenizer()
    words.chat_template = TOOL_TEMPLATE
    return words


def test_a_call_of_a_tool_is_learnt_as_the_template_writes_it_and_what_it_answered_is_read() -> None:
    words = tool_words()
    (made,) = Encoder(words, max_length=256)([USED])
    end = words.eos_token
    assert words.decode(learnt(made)) == f"{SAID}{end}good news{end}"
    whole = words.decode([*made.prompt, *made.answer])
    assert "up too" in whole and whole.startswith('<|system|>[{"type": "function"')
    (last,) = Encoder(words, max_length=256)([Example(USED.messages[:3], "", calls=CALLS)])
    assert words.decode(last.answer) == f"{SAID}{end}"
    pair = Example(USED.messages, "yes", rejected="no")
    assert "up too" in words.decode(Encoder(words, max_length=256)([pair])[0].prompt)


def test_a_call_and_what_came_of_it_are_left_out_together() -> None:
    from silotune.training.chats import without_first_exchange

    turns = [*USED.messages, ("assistant", "good news"), TURNS[3], ("assistant", "up too")]
    assert without_first_exchange(turns) == [LOOK, TURNS[0], TURNS[3], ("assistant", "up too")]
    assert without_first_exchange(turns[:6]) == turns[:6]
    words = tool_words()
    (whole,) = Encoder(words, max_length=256)([USED])
    (cut,) = Encoder(words, max_length=whole.length - 1)([USED])
    assert words.decode(cut.answer) == f"good news{words.eos_token}" and cut.prompt_cut


@pytest.mark.parametrize(
    ("hides", "example", "what"),
    [
        ("{% if tools %}<|system|>{{ tools | tojson }}</s>{% endif %}", USED, "does not show tools"),
        ("call {{ call.function.name }} {{ call.function.arguments | tojson }}", USED, "does not show calls of tools"),
        (None, USED, "has no chat template, which alone could show tools"),
        (None, Example(TURNS[:2], "", calls=CALLS), "has no chat template"),
    ],
)
def test_a_template_that_hides_tools_is_refused_by_example(hides: str | None, example: Example, what: str) -> None:
    words = tool_words()
    words.chat_template = words.chat_template.replace(hides, "") if hides else None
    with pytest.raises(DataError, match=f"example 1: .*{what}") as caught:
        Encoder(words, max_length=256)([example])
    assert "look" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_answer_that_is_only_read_is_not_learnt() -> None:
    turns = [Turn(turn, is_learnt=False) if turn[1] == "up too" else turn for turn in TURNS]
    made, whole = encode(Example(tuple(turns), "see you")), encode(CHAT)
    end = WORDS.eos_token_id
    assert learnt(made) == [*answer_ids("good news", WORDS), end, *answer_ids("see you", WORDS), end]
    assert (made.prompt, made.answer) == (whole.prompt, whole.answer)


def test_a_template_may_put_a_space_around_an_answer() -> None:
    words = tiny.tokenizer()
    spaced = "{{ ' ' + message['content'] + ' ' if message['role'] == 'assistant' else message['content'] }}"
    words.chat_template = tiny.TEMPLATE.replace("{{ message['content'] }}", spaced)
    (made,) = Encoder(words, max_length=128)([CHAT])
    assert words.decode(learnt(made)) == "good news </s>up too </s>see you</s>"
    words.chat_template = tiny.TEMPLATE.replace("message['content']", "message['content'] | trim")
    indented = Example((*TURNS[:2], ("assistant", "  good news"), TURNS[3]), "up too")
    (made,) = Encoder(words, max_length=128)([indented])
    assert words.decode(learnt(made)) == "  good news</s>up too</s>"


def test_pairs_are_whole_answers_and_share_the_room() -> None:
    pair = Example((("user", "profit rose " * 20),), "yes " * 30, rejected="no " * 3)
    made = encode(pair, max_length=40)
    assert made.label == 0 and made.options[0] == made.answer
    assert made.options[1] == (*answer_ids("no " * 3, WORDS), WORDS.eos_token_id)
    assert len(made.prompt) == 20 and len(made.answer) == 20 and made.prompt_cut and made.answer_cut
    short = encode(Example((("user", "profit rose " * 20),), "yes", rejected="no"), max_length=40)
    assert len(short.prompt) == 40 - len(short.answer) and not short.answer_cut


def test_plain_text_is_read_in_windows_and_every_id_is_learnt_once() -> None:
    text = " ".join(tiny.TEXTS)
    ids = WORDS(text, add_special_tokens=False)["input_ids"]
    made = Encoder(WORDS, max_length=16)([Example((), text)])
    assert len(made) > 2 and all(window.length <= 16 for window in made)
    assert [number for window in made for number in window.answer] == [*ids[1:], WORDS.eos_token_id]
    assert all(earlier.answer[-1:] == later.prompt for earlier, later in zip(made, made[1:], strict=False))
    begun = tiny.tokenizer(chat=False, begin="<s>")
    (window,) = Encoder(begun, max_length=64)([Example((), "profit rose")])
    assert window.prompt == (begun.bos_token_id,)
    with pytest.raises(DataError, match="example 5: its text has no tokens"):
        Encoder(WORDS, max_length=16)([Example((), "")], first=5)


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gemma3-window", "bloom"])
@pytest.mark.parametrize("instruction", [0, 20], ids=["plain", "shared"])
def test_packed_rows_give_the_same_losses_and_gradients(name: str, instruction: int) -> None:
    from silotune.training.scores import answer_losses

    model = tiny.adapted(name, targets="all-linear")
    lead = tuple(range(30, 30 + instruction))
    examples = [Encoded((*lead, *range(40, 40 + length)), (*range(50, 50 + length), 2)) for length in (6, 1, 2, 3, 1)]
    examples.append(Encoded((*lead, 60, 61), (70, 71, 72, 73, 2), unsupervised=((1, 3),)))
    plain, owner = answer_losses(model, examples)
    expected = tiny.gradients(model, plain.sum())
    packed, of = answer_losses(model, examples, packed=True)
    for place in range(len(examples)):
        torch.testing.assert_close(packed[of == place], plain[owner == place], rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, packed.sum()), expected, 1e-5)


def test_rows_are_filled_and_none_grows() -> None:
    from silotune.training.batches import packed_rows

    examples = [Encoded((9,) * length, (8,)) for length in (9, 3, 4, 5, 2)]  # lengths 10, 4, 5, 6, 3
    assert packed_rows(examples) == [[0], [3, 1], [2, 4]]
    made = answer_batch(examples, pad_id=0, device=torch.device("cpu"), rows=packed_rows(examples))
    assert made.batch.ids.shape == (3, 9) and len(made.targets) == 5
