"""Turns examples into token ids: prompt and answer apart, so that what is supervised is known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from silotune.models.marks import BREAK, templated
from silotune.settings.sections import Truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompt: At least one id; the answer's first token is predicted from its last position.
        answer: The answer's ids and its end; at least one. Of a chat with several answers: all from the
            first of them on, what others say in between included.
        options: Ids of each option (closed-ended tasks), without a common end; of a pair, its two answers with their
            ends, the preferred one first; of an answer that was judged by itself, that answer.
        label: Index of the right option; -1 for open answers, and where the one judged answer is not wanted.
        prompt_cut: Prompt ids dropped to fit, where ``data.truncate`` says.
        answer_cut: Answer ids dropped on the right to fit (open answers and pairs only).
        unsupervised: Where in ``answer`` others speak, as (start, end): these ids are read and not learnt.
        marks: Control marks that the example's text spells, which were read as text.
        turn_words: Times that it spells words which the chat template puts around turns in place of marks.
        adjustment: What is added to the score of each option, or class, in training alone; empty for nothing.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] = ()
    label: int = -1
    prompt_cut: int = 0
    answer_cut: int = 0
    unsupervised: tuple[tuple[int, int], ...] = ()
    marks: int = 0
    turn_words: int = 0
    adjustment: tuple[float, ...] = ()

    @property
    def is_even(self) -> bool:
        """Whether it is a pair of the same ids twice, as two answers are that differ behind the cut only."""
        return len(self.options) == 2 and self.options[0] == self.options[1]

    @property
    def supervised(self) -> int:
        """Ids of the answer that are learnt."""
        return len(self.answer) - sum(end - start for start, end in self.unsupervised)

    @property
    def length(self) -> int:
        """Ids of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


def render(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as text: through the chat template where there is one, else the turns' contents."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(content for _, content in messages if content)
    return templated(messages, tokenizer, add_generation_prompt=True)


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text without anything around it; made of its parts where marks that it spells were parted."""
    first, *rest = text.split(BREAK)
    ids = list(tokenizer(first, add_special_tokens=False)["input_ids"])
    for part in rest:
        ids.extend(_continued(part, tokenizer))
    return ids


def _continued(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text in the middle of a line: without the space that some tokenizers put before a text."""
    start = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    if whole[: len(start)] == start:
        return whole[len(start) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, begun as the tokenizer begins a text (a chat template begins it itself)."""
    ids = ids_of(render(messages, tokenizer), tokenizer)
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:1] != [begin] and begin in tokenizer("")["input_ids"][:1]:
        ids.insert(0, begin)
    return ids


def framed_ids(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int, int]:
    """Token ids of a text that nothing follows, with all that the tokenizer puts around one, such as [CLS] and [SEP].

    Returns:
        The ids, and how many of the first and of the last are the tokenizer's own.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = prompt_ids(messages, tokenizer)
        return ids, int(ids[:1] == [tokenizer.bos_token_id]), 0
    text = render(messages, tokenizer)
    parted = BREAK in text
    made = tokenizer("a" if parted else text, return_special_tokens_mask=True)
    ids, own = list(made["input_ids"]), list(made["special_tokens_mask"])
    first = own.index(0) if 0 in own else len(own)
    last = own[::-1].index(0) if 0 in own else 0
    if parted:
        ids = [*ids[:first], *ids_of(text, tokenizer), *ids[len(ids) - last :]]
    return ids, first, last


def answer_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, after: str = "") -> list[int]:
    """Token ids of an answer that follows a prompt, without an end.

    Without a chat template a space parts the two, unless the prompt ends, or the answer begins, with white space.
    """
    apart = getattr(tokenizer, "chat_template", None) or after[-1:].isspace() or text[:1].isspace()
    return ids_of(text if apart else f" {text}", tokenizer)


WHERE: Mapping[Truncate, str] = {"left": "on the left", "right": "on the right", "middle": "in the middle"}


def truncation_note(encoded: Sequence[Encoded], what: str, *, truncate: Truncate = "left") -> str | None:
    """One line that counts cut examples; None when nothing was cut."""
    prompts = sum(1 for example in encoded if example.prompt_cut)
    answers = sum(1 for example in encoded if example.answer_cut)
    if not prompts and not answers:
        return None
    return (
        f"{what}: {prompts} of {len(encoded)} prompts were cut {WHERE[truncate]} and {answers} answers on the right "
        "to fit model.max_length"
    )


def marks_note(encoded: Sequence[Encoded], what: str) -> str | None:
    """One line that counts texts that spell control marks of the tokenizer, or words of the template that stand for
    such; None where none does."""
    texts = sum(1 for example in encoded if example.marks)
    spoken = sum(1 for example in encoded if example.turn_words)
    told = [
        f"{what}: {texts} of {len(encoded)} texts spell control marks of the tokenizer "
        f"({sum(example.marks for example in encoded)} in all), which were read as plain text"
        if texts
        else "",
        f"{what}: {spoken} of {len(encoded)} texts spell plain words that the chat template puts around turns "
        f"({sum(example.turn_words for example in encoded)} in all), which a model cannot tell from the template's own"
        if spoken
        else "",
    ]
    return "; ".join(filter(None, told)) or None


def cut_left(ids: list[int], room: int, *, first: int = 0) -> list[int]:
    """The last ``room`` ids, but the ``first`` few are kept."""
    return ids if len(ids) <= room else [*ids[:first], *ids[len(ids) - room + first :]]
