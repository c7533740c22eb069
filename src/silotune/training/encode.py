"""Turns examples into token ids: prompt and answer apart, so that what is supervised is known by construction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from silotune.errors import DataError
from silotune.structs import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompt: At least one id; the answer's first token is predicted from its last position.
        answer: The answer's ids and the end-of-sequence id; at least one.
        options: Ids of each option (closed-ended tasks), without a common end.
        label: Index of the right option; -1 for open answers.
        prompt_cut: Prompt ids dropped on the left to fit.
        answer_cut: Answer ids dropped on the right to fit (open answers only).
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] = ()
    label: int = -1
    prompt_cut: int = 0
    answer_cut: int = 0

    @property
    def length(self) -> int:
        """Ids of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


def render(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as text: through the chat template where there is one, else the turns' contents."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(content for _, content in messages if content)
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def prompt_ids(messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt, begun as the tokenizer begins a text (a chat template begins it itself)."""
    text = render(messages, tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
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
    made = tokenizer(render(messages, tokenizer), return_special_tokens_mask=True)
    own = list(made["special_tokens_mask"])
    first = own.index(0) if 0 in own else len(own)
    last = own[::-1].index(0) if 0 in own else 0
    return list(made["input_ids"]), first, last


def answer_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an answer that follows a prompt, without an end."""
    gap = "" if getattr(tokenizer, "chat_template", None) else " "
    return list(tokenizer(gap + text, add_special_tokens=False)["input_ids"])


class Encoder:
    """Encodes examples for one tokenizer and length; remembers the options it has met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._options: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def __call__(self, examples: Iterable[Example]) -> list[Encoded]:
        """Encodes examples in order.

        Raises:
            DataError: A closed-ended answer alone does not fit, or an answer is empty; names the example's number.
        """
        return [self._encode(example, number) for number, example in enumerate(examples, start=1)]

    def _encode(self, example: Example, number: int) -> Encoded:
        answer = answer_ids(example.answer, self._tokenizer)
        if not answer:
            raise DataError(f"example {number}: its answer has no tokens, so there is nothing to learn from")
        end = self._tokenizer.eos_token_id
        if end is not None:
            answer.append(end)
        options = self._option_ids(example.options)
        longest = max(len(answer), *(len(ids) for ids in options), 1)
        answer_cut = max(0, longest - (self._max_length - 1))
        if answer_cut and example.options:
            raise DataError(
                f"example {number}: its answer has {longest} tokens and model.max_length is {self._max_length}; "
                "raise model.max_length"
            )
        if answer_cut:
            answer = answer[: self._max_length - 1]
        prompt = prompt_ids(example.messages, self._tokenizer)
        if not prompt:
            raise DataError(f"example {number}: its prompt has no tokens")
        room = self._max_length - min(longest, self._max_length - 1)  # for the longest option, whichever is right
        kept = cut_left(prompt, room, first=int(room > 1 and prompt[0] == self._tokenizer.bos_token_id))
        return Encoded(
            prompt=tuple(kept),
            answer=tuple(answer),
            options=options,
            label=example.label,
            prompt_cut=len(prompt) - len(kept),
            answer_cut=answer_cut,
        )

    def _option_ids(self, options: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        if options and options not in self._options:
            ids = [tuple(answer_ids(option, self._tokenizer)) for option in options]
            if not _is_prefix_free(ids):  # the end tells "A" from "A B"
                end = self._tokenizer.eos_token_id
                if end is None:
                    raise DataError("an option begins like another, and the tokenizer has no end to tell them apart")
                ids = [(*option, end) for option in ids]
            if len(set(ids)) != len(ids) or not all(ids):
                raise DataError("two options of the task have the same tokens; give them other wordings")
            self._options[options] = tuple(ids)
        return self._options.get(options, ())


def truncation_note(encoded: Sequence[Encoded], what: str) -> str | None:
    """One line that counts cut examples; None when nothing was cut."""
    prompts = sum(1 for example in encoded if example.prompt_cut)
    answers = sum(1 for example in encoded if example.answer_cut)
    if not prompts and not answers:
        return None
    return (
        f"{what}: {prompts} of {len(encoded)} prompts were cut on the left and {answers} answers on the right "
        "to fit model.max_length"
    )


def cut_left(ids: list[int], room: int, *, first: int = 0) -> list[int]:
    """The last ``room`` ids, but the ``first`` few are kept."""
    return ids if len(ids) <= room else [*ids[:first], *ids[len(ids) - room + first :]]


def _is_prefix_free(options: Sequence[tuple[int, ...]]) -> bool:
    ordered = sorted(options)
    return all(later[: len(earlier)] != earlier for earlier, later in zip(ordered, ordered[1:], strict=False))
