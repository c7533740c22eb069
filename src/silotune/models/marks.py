"""Control marks of a tokenizer: those that end an answer, and how a text that spells one is read as text.

A chat template writes turns and marks into one string. A text of a row that spells a mark is parted inside of it by
``BREAK`` before the template sees it, and ids are made of the parts, so that no text can open or end a turn. A text
without marks is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Final

from silotune.errors import DataError
from silotune.settings.sections import ModelSection
from silotune.structs import Pair, Turn, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK: Final = "\ufdd0\ufdd1"
"""Parts a mark that a text spells; two noncharacters, which Unicode keeps out of texts."""
DATE_KEY: Final = "silotune_date"
"""Key of a tokenizer's settings: the day that its template is given as today."""
_CLOCK: Final = "strftime_now"
_DIRECTIVES: Final = tuple(f"%{letter}" for letter in (*"aAbBcdDeFgGHIjklmMpSTuUVwWxXyY", "-d", "-m", "-H", "-I", "-M"))
_PROBE: Final = "Yes, indeed"


class TemplateError(DataError):
    """The tokenizer's chat template cannot word these turns."""


def templated(
    messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    """The turns as the tokenizer's chat template words them, on the day of ``model.date`` whatever day it is.

    Raises:
        TemplateError: It refuses them, as some do a system's message or turns out of order.
    """
    from jinja2 import TemplateError as Refusal

    turns, tools = as_messages(messages)
    try:
        template = _dated(tokenizer.get_chat_template(tools=tools), day_of(tokenizer))
        return str(
            tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (Refusal, ValueError) as error:
        roles = ", ".join(role for role, _ in messages)
        raise TemplateError(f"the tokenizer's chat template refuses its turns ({roles}): {error}") from error


def day_of(tokenizer: PreTrainedTokenizerBase) -> date:
    """The day that the tokenizer's chat template is given as today."""
    return date.fromisoformat(tokenizer.init_kwargs.get(DATE_KEY, ModelSection.model_fields["date"].default))


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes today's date."""
    return _CLOCK in str(getattr(tokenizer, "chat_template", None))


def _dated(template: str, day: date) -> str:
    """A template whose clock stands still; transformers takes no other clock, but a template may define its own.

    The line's end belongs to the macro's last tag, as templates are read here, so the rest is read as it was.
    """
    if _CLOCK not in template:
        return template
    filled = "".join(f" | replace('{each}', '{day.strftime(each)}')" for each in _DIRECTIVES)
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


@dataclass(frozen=True)
class End:
    """How an assistant's turn ends.

    Attributes:
        ids: What is learnt after an answer: the mark that the template writes there, else the end of sequence; none
            where the tokenizer has neither.
        written: The template's own text from the answer to the mark, which is part of it.
        words: The same, where the template ends a turn in plain words instead of a mark; else empty.
    """

    ids: tuple[int, ...]
    written: str = ""
    words: str = ""


@dataclass(frozen=True)
class Marks:
    """A tokenizer's control marks.

    Attributes:
        ids: Mark -> id.
        end: What ends an answer.
        around: Those that the template writes around turns.
    """

    ids: Mapping[str, int]
    end: End
    around: frozenset[str]
    _pattern: re.Pattern[str]

    def as_text(self, text: str) -> str:
        """The text with a break in every mark that it spells; a mark of one character is left out."""
        parts = []
        while found := self._pattern.search(text):
            parts.append(text[: found.start() + (len(found[0]) > 1)])
            text = text[found.start() + 1 :]
        return BREAK.join([*parts, text])

    def turns_as_text(self, turns: Iterable[Pair]) -> tuple[Pair, ...]:
        """The turns with their contents, tools and calls as ``as_text`` gives them."""
        return tuple(
            Turn((turn[0], self.as_text(turn[1])), self.as_text(turn.more), is_learnt=turn.is_learnt)
            if isinstance(turn, Turn)
            else (turn[0], self.as_text(turn[1]))
            for turn in turns
        )


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that a tokenizer calls special, and those that its template writes around turns."""
    written = _worded(tokenizer, "assistant", "user")
    ids = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or token.content in written)
    }
    ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    pattern = _pattern(ids)
    around = frozenset(found[0] for found in pattern.finditer(written))
    return Marks(ids, _end_of(tokenizer, ids, pattern, written), around, pattern)


def _pattern(ids: Mapping[str, int]) -> re.Pattern[str]:
    if not ids:
        return re.compile(r"(?!)")  # found nowhere
    return re.compile("|".join(re.escape(mark) for mark in sorted(ids, key=len, reverse=True)))


def _end_of(tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int], pattern: re.Pattern[str], followed: str) -> End:
    """The first mark after an answer, if it is the same whether a turn follows or not; else the end of sequence."""
    number = tokenizer.eos_token_id
    usual = () if number is None else (number,)
    alone, followed = (_after_probe(text) for text in (_worded(tokenizer, "assistant"), followed))
    first, same = pattern.search(alone), pattern.search(followed)
    if first and same and first[0] == same[0]:
        return End((ids[first[0]],), written=alone[: first.end()])
    words = alone.rstrip()
    if words and not first and followed.startswith(words):
        return End(usual, written=words, words=words.strip())
    return End(usual)


def _worded(tokenizer: PreTrainedTokenizerBase, *roles: str) -> str:
    """What the template makes of a user's turn and turns of these roles; empty without one, or where it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    said = {"user": "Is it so?", "assistant": _PROBE}
    try:
        return templated([(role, said[role]) for role in ("user", *roles)], tokenizer)
    except TemplateError:
        return ""


def _after_probe(text: str) -> str:
    return text.rpartition(_PROBE)[2] if _PROBE in text else ""
