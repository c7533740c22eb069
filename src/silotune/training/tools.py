"""Tools, their calls and what they answer, as a model's chat template words them; one that hides them is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from silotune.models.marks import TemplateError, templated
from silotune.structs import TOOLS, Pair, Turn, more_of
from silotune.training.encode import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER = "another"


def check_shown(turns: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what the tokenizer's chat template does not show of tools, because the model would learn without it.

    Raises:
        TemplateError: Changing it does not change what the template writes, or there is no template.
    """
    changed = list(_changed(turns))
    if not changed:
        return
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError(f"the tokenizer has no chat template, which alone could show {changed[0][0]}")
    text = templated(turns, tokenizer)
    for what, others in changed:
        if templated(others, tokenizer) == text:
            raise TemplateError(f"the tokenizer's chat template does not show {what}: use a model whose template does")


def _changed(turns: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
    """What turns say of tools, each with turns that say something else there."""
    for place, (role, content) in enumerate(turns):
        if role == TOOLS:
            first, *rest = json.loads(content)
            other = {**first, "function": {**first["function"], "name": _OTHER}}
            yield "tools", [*turns[:place], (TOOLS, json.dumps([other, *rest])), *turns[place + 1 :]]
        elif role == "tool":
            made = Turn((role, content + _OTHER), more_of(turns[place]))
            yield "what a tool answered", [*turns[:place], made, *turns[place + 1 :]]
        elif more_of(turns[place]):
            more = json.loads(more_of(turns[place]))
            call, *rest = more["tool_calls"]
            other = {**call, "function": {**call["function"], "name": _OTHER}}
            made = Turn((role, content), json.dumps({**more, "tool_calls": [other, *rest]}))
            yield "calls of tools", [*turns[:place], made, *turns[place + 1 :]]


def words_of(turns: Sequence[Pair], place: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What an assistant says at ``place``, without its end: a turn's content, or a call as the template writes it.

    Raises:
        TemplateError: The template does not end a call as it ends an answer, or has no place of its own for it.
    """
    content = turns[place][1]
    if not more_of(turns[place]):
        return content
    asked = render(turns[:place], tokenizer)
    shown = templated(turns[: place + 1], tokenizer)
    plain = templated([*turns[:place], ("assistant", _OTHER)], tokenizer)
    end = plain[plain.rindex(_OTHER) + len(_OTHER) :]
    if not shown.startswith(asked) or not shown.endswith(end):
        raise TemplateError("the tokenizer's chat template does not word a call of a tool as a turn of the assistant's")
    return shown[len(asked) : len(shown) - len(end)]
