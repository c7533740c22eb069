"""Control marks of a tokenizer: those that end an answer, and how a text that spells one is read as text.

A chat template writes turns and marks into one string. A text of a row that spells a mark is parted inside of it by
``BREAK`` before the template sees it, and ids are made of the parts, so that no text can open or end a turn. A text
without marks is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Final

from silotune.errors import DataError
from silotune.settings.sections import ModelSection
from silotune.structs import TOOLS, Pair, Turn, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK: Final = "\ufdd0\ufdd1"
"""Parts a mark that a text spells; two noncharacters, which Unicode keeps out of texts."""
DATE_KEY: Final = "silotune_date"
"""Key of a tokenizer's settings: the day that its template is given as today."""
_CLOCK: Final = "strftime_now"
_DIRECTIVES: Final = tuple(f"%{letter}" for letter in (*"aAbBcdDeFgGHIjklmMpSTuUVwWxXyY", "-d", "-m", "-H", "-I", "-M"))
_PROBE: Final = "Yes, indeed"
_ASKED: Final = "Is it so?"
_LITERAL: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
"""A text in JSON."""
_LEAST_TURN_WORDS: Final = 3
"""Characters of plain words that may count as a template's own."""


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
    except (Refusal, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        roles = ", ".join(role for role, _ in messages)
        is_known = type(error) is not Refusal or str(error) in template
        why = error if is_known else "in words that it makes of them"  # which may repeat what they say
        raise TemplateError(f"the tokenizer's chat template refuses its turns ({roles}): {why}") from error


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
        words: What it writes there in plain words instead, such as ``[INST]``: a text that spells it cannot be told
            from it.
    """

    ids: Mapping[str, int]
    end: End
    around: frozenset[str]
    words: tuple[str, ...] = field(repr=False)
    _pattern: re.Pattern[str]
    _forms: _Forms | None

    def as_text(self, text: str) -> str:
        """The text with a break in every mark that it spells; a mark of one character is left out."""
        parts, at = [], 0
        while found := self._pattern.search(text, at):
            parts.append(text[at : found.start() + (len(found[0]) > 1)])
            at = found.start() + 1
        parts.append(text[at:])
        return BREAK.join(parts if self._forms is None else map(self._forms.as_text, parts))

    def json_as_text(self, document: str) -> str:
        """JSON with the texts in it as ``as_text`` gives them, whichever way JSON writes their characters."""
        return _LITERAL.sub(lambda each: json.dumps(self.as_text(json.loads(each[0])), ensure_ascii=False), document)

    def turns_as_text(self, turns: Iterable[Pair]) -> tuple[Pair, ...]:
        """The turns with their contents, tools and calls as ``as_text`` gives them."""
        return tuple(map(self._turn_as_text, turns))

    def _turn_as_text(self, turn: Pair) -> Pair:
        role, content = turn
        said = (role, self.json_as_text(content) if role == TOOLS else self.as_text(content))
        if not isinstance(turn, Turn):
            return said
        return Turn(said, self.json_as_text(turn.more), is_learnt=turn.is_learnt)


@dataclass(frozen=True)
class _Forms:
    """Other spellings that a tokenizer reads as a mark, because it changes a text before it looks: wide or small
    letters, for one.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: frozenset[int]
    spelt: re.Pattern[str]

    def as_text(self, text: str) -> str:
        """The text with a break in all that becomes a mark; what becomes one by itself is left out."""
        while places := self._places(text):  # a break may let another mark begin
            parts, at = [], 0
            for start, end in places:
                if start >= at:
                    parts.append(text[at : start + (end - start > 1)])
                    at = start + 1
            text = BREAK.join([*parts, text[at:]])
        return text

    def _places(self, text: str) -> list[tuple[int, int]]:
        """Where marks without a break stand, as (start, end); a sign that the tokenizer does not know is none."""
        if not self._spells(text):
            return []
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found = zip(made["input_ids"], made["offset_mapping"], strict=True)
        marks = ((start, end) for number, (start, end) in found if number in self.ids and end > start)
        return [
            (start, end)
            for start, end in marks
            if not text.startswith(BREAK, start + 1) and self._spells(text[start:end])
        ]

    def _spells(self, text: str) -> bool:
        return self.spelt.search(self.tokenizer.backend_tokenizer.normalizer.normalize_str(text)) is not None


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that a tokenizer calls special, and those that its template writes around turns and calls of tools."""
    chat = _worded(tokenizer, *_turns("assistant", "user"))
    written = chat + _worded(tokenizer, ("system", "Be brief."), *_turns("user")) + _worded(tokenizer, *_calling())
    ids = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or token.content in written)
    }
    ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    pattern = _pattern(ids)
    around = frozenset(found[0] for found in pattern.finditer(chat))
    end = _end_of(tokenizer, ids, pattern, chat)
    # a space, or one character that pads and does nothing else, is what it is in every text
    telling = {mark: ids[mark] for mark in ids if len(mark) > 1 or (mark.strip() and mark != tokenizer.pad_token)}
    return Marks(ids, end, around, _words_of(chat, pattern), _pattern(telling), _forms_of(tokenizer, telling))


def _pattern(marks: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")  # found nowhere


def _forms_of(tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int]) -> _Forms | None:
    """The other spellings of marks; None for a tokenizer that takes a text as it stands."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return None
    # it may put a sign of its own before a text, which is not before a mark
    spelt = {mark for each in ids for mark in (each, backend.normalizer.normalize_str(each).lstrip("\u2581 "))}
    return _Forms(tokenizer, frozenset(ids.values()), _pattern(filter(None, spelt)))


def _words_of(chat: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """What stands between the turns of a chat in plain words, with signs that no name of a role has."""
    between = chat.partition(_ASKED)[2].rpartition(_ASKED)[0].replace(_PROBE, "\n")
    pieces = (line.strip() for line in pattern.sub("\n", between).split("\n"))
    return tuple(dict.fromkeys(piece for piece in pieces if len(piece) >= _LEAST_TURN_WORDS and not piece.isalnum()))


def _end_of(tokenizer: PreTrainedTokenizerBase, ids: Mapping[str, int], pattern: re.Pattern[str], followed: str) -> End:
    """The first mark after an answer, if it is the same whether a turn follows or not; else the end of sequence."""
    number = tokenizer.eos_token_id
    usual = () if number is None else (number,)
    alone, followed = (_after_probe(text) for text in (_worded(tokenizer, *_turns("assistant")), followed))
    first, same = pattern.search(alone), pattern.search(followed)
    if first and same and first[0] == same[0]:
        return End((ids[first[0]],), written=alone[: first.end()])
    words = alone.rstrip()
    if words and not first and followed.startswith(words):
        return End(usual, written=words, words=words.strip())
    return End(usual)


def _worded(tokenizer: PreTrainedTokenizerBase, *turns: Pair) -> str:
    """What the template makes of turns; empty without one, or where it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return templated(turns, tokenizer)
    except TemplateError:
        return ""


def _turns(*roles: str) -> list[Pair]:
    """A user's turn, and turns of these roles."""
    return [(role, _PROBE if role == "assistant" else _ASKED) for role in ("user", *roles)]


def _calling() -> list[Pair]:
    """Turns with a tool, a call of it and what it answers."""
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    call = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]}
    return [
        (TOOLS, json.dumps([{"type": "function", "function": function}])),
        ("user", _ASKED),
        Turn(("assistant", ""), json.dumps(call)),
        Turn(("tool", "It is."), json.dumps({"name": "look"})),
        *_turns("assistant", "user")[1:],
    ]


def _after_probe(text: str) -> str:
    return text.rpartition(_PROBE)[2] if _PROBE in text else ""
