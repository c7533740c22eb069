"""Cuts a prompt that is too long: where the configuration says, and first the columns that may be shortened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from silotune.settings.sections import Truncate
from silotune.structs import Example, Pair
from silotune.training.encode import cut_left, ids_of, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fitted(
    ids: list[int],
    room: int,
    example: Example,
    encode: Callable[[Example], list[int]],
    *,
    truncate: Truncate,
    first: int,
    last: int,
) -> list[int]:
    """A prompt's ids, at most ``room`` of them.

    Args:
        ids: Those of the whole prompt.
        room: Most ids.
        example: Whose prompt it is; ``shorten`` says which parts are shortened, until nothing is left of them.
        encode: Makes the ids of a prompt.
        truncate: Where the parts, and the prompt if that is not enough, are cut.
        first: Ids that stay at the beginning, and ``last`` at the end; those at the end only for a cut that is not on
            the left, and as far as there is room.
        last: See ``first``.
    """
    if len(ids) > room and example.shorten:
        ids = _shortened(example, encode, room, truncate)
    return cut_left(ids, room, first=_FRONTS[truncate](room, first, min(last, room - first)))


def tail_ids(messages: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a chat template writes behind the last content, such as the mark that the assistant begins."""
    text, content = render(messages, tokenizer), messages[-1][1].strip()
    tail = text[text.rindex(content) + len(content) :] if content in text else ""
    return len(ids_of(tail, tokenizer)) if tail else 0


_FRONTS: dict[Truncate, Callable[[int, int, int], int]] = {
    "left": lambda room, first, last: first,
    "middle": lambda room, first, last: max(first, (room - last) // 2),
    "right": lambda room, first, last: room - last,
}
"""Where a prompt is cut -> how many of the ids that fit stand before the cut."""


def _shortened(example: Example, encode: Callable[[Example], list[int]], room: int, truncate: Truncate) -> list[int]:
    """The ids of the prompt with as much of its shortened parts as fits; with nothing of them where nothing fits."""
    least, most = 0, max(end - start for start, end in example.shorten)
    while least < most:
        length = (least + most + 1) // 2
        fits = len(encode(_with_parts(example, length, truncate))) <= room
        least, most = (length, most) if fits else (least, length - 1)
    return encode(_with_parts(example, least, truncate))


def _with_parts(example: Example, length: int, truncate: Truncate) -> Example:
    """The example with at most so many characters of each part that may be shortened."""
    role, content = example.messages[-1]
    pieces, done, shorter = [], 0, {}
    for start, end in example.shorten:
        own = content[start:end]
        shorter[own] = _PARTS[truncate](own, length) if len(own) > length else own
        pieces += [content[done:start], shorter[own]]
        done = end
    turn = (role, "".join([*pieces, content[done:]]))
    text = tuple(shorter.get(each, each) for each in example.text)
    return replace(example, messages=(*example.messages[:-1], turn), text=text, shorten=())


_PARTS: dict[Truncate, Callable[[str, int], str]] = {
    "left": lambda text, length: text[len(text) - length :],
    "middle": lambda text, length: f"{text[: length // 2]} {text[len(text) - (length - length // 2) :]}",
    "right": lambda text, length: text[:length],
}
"""Where a text is cut -> the text with so many of its characters."""
