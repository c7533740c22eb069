"""Chats with several answers, and plain text, as token ids.

Every turn of the assistant in a chat is learnt, with its end, and nothing else. Where one speaks and the other begins
is taken from the tokenizer's template, rendered up to each turn, never searched in the ids. A template that words
earlier turns differently once later ones follow cannot be read so, and is refused. Plain text becomes windows of which
every id is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from silotune.errors import DataError
from silotune.models.marks import End
from silotune.structs import TOOLS, is_learnt
from silotune.training.encode import Encoded, answer_ids, ids_of, prompt_ids, render
from silotune.training.tools import words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[tuple[str, str]]


def chat(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, end: End, *, max_length: int, number: int
) -> tuple[Encoded | None, Turns, int]:
    """A chat that ends with an answer; its earliest exchanges are left out until the rest fits.

    Args:
        turns: As (role, content); the last is the assistant's.
        tokenizer: One with a chat template.
        end: What ends an answer.
        max_length: Most ids.
        number: The example's number, for errors.

    Returns:
        The chat's ids; None where only one answer is left: such a chat is a prompt and its answer. The turns that are
        left. The ids of all turns; 0 where there was but one answer.

    Raises:
        DataError: An answer has no tokens, or the template cannot be read turn by turn.
    """
    whole = 0
    while sum(role == "assistant" for role, _ in turns) > 1:
        made = _encoded(turns, tokenizer, end, number)
        whole = max(whole, made.length)
        if made.length <= max_length:
            return replace(made, prompt_cut=whole - made.length), turns, whole
        left = without_first_exchange(turns)
        if len(left) == len(turns):
            break
        turns = left
    return None, turns, whole


def without_first_exchange(turns: Turns) -> Turns:
    """The turns without the first exchange: the tools, the system's turn and everything after the first answer.

    An answer that calls a tool has its own answer behind that of the tool; where nothing is behind it, all turns stay.
    """
    begin = int(turns[0][0] == TOOLS)
    head = turns[: begin + int(turns[begin][0] == "system")]
    answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    first = next((place for place in answers[:-1] if turns[place + 1][0] != "tool"), None)
    return turns if first is None else [*head, *turns[first + 1 :]]


def _encoded(turns: Turns, tokenizer: PreTrainedTokenizerBase, end: End, number: int) -> Encoded:
    begin = int(turns[0][0] == TOOLS)
    spoken = [place for place, turn in enumerate(turns) if is_learnt(turn) and place > begin]  # the first is a greeting
    prompt = prompt_ids(turns[: spoken[0]], tokenizer)
    ids: list[int] = []
    others: list[tuple[int, int]] = []
    for place, following in zip(spoken, [*spoken[1:], None], strict=True):
        said = answer_ids(words_of(turns, place, tokenizer), tokenizer)
        if not said:
            raise DataError(f"example {number}: an answer has no tokens, so there is nothing to learn from")
        ids.extend(said)
        if following is None:
            ids.extend(end.ids)
            break
        after = _between(turns, place, following, tokenizer, number)
        mark = end.written if after.startswith(end.written) else ""
        ids.extend(_ids(mark, tokenizer))
        start = len(ids)
        ids.extend(_ids(after[len(mark) :], tokenizer))
        others.append((start, len(ids)))
    return Encoded(tuple(prompt), tuple(ids), unsupervised=tuple(others))


def _between(turns: Turns, place: int, following: int, tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """What the template writes from the end of the answer at ``place`` to where the answer ``following`` begins."""
    before = render(turns[:place], tokenizer)
    asked = render(turns[:following], tokenizer)
    after = _after(asked[len(before) :], words_of(turns, place, tokenizer)) if asked.startswith(before) else None
    if after is None:
        raise DataError(
            f"example {number}: the tokenizer's chat template words earlier turns differently once others follow, so "
            "they cannot be learnt in one piece; set training.objective.turns = 'last'"
        )
    return after


def _after(text: str, answer: str) -> str | None:
    """What follows an answer that a text begins with; a template may put spaces before it, or take its own away."""
    for words in (answer, answer.strip()):
        space, found, after = text.partition(words)
        if found and not space.strip():
            return after
    return None


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids_of(text, tokenizer) if text else []


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int, number: int) -> list[Encoded]:
    """A document with its end, in windows of at most ``max_length`` ids, the last of each being the next one's first.

    So every id but the very first is predicted once; that one too, where the tokenizer begins texts with a mark.

    Raises:
        DataError: The text has fewer than two ids.
    """
    ids = ids_of(text, tokenizer)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:1] != [begin] and begin in tokenizer("")["input_ids"][:1]:
        ids.insert(0, begin)
    if end is not None:
        ids.append(end)
    if len(ids) < 2:
        raise DataError(f"example {number}: its text has no tokens to learn from")
    step = max_length - 1
    parts = [ids[start : start + max_length] for start in range(0, len(ids) - 1, step)]
    return [Encoded(tuple(part[:1]), tuple(part[1:])) for part in parts]
