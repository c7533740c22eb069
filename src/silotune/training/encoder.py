"""What turns examples into ids for a language model: prompts with an answer or options, pairs, chats and plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from silotune.errors import DataError
from silotune.models.load import Base
from silotune.models.marks import BREAK, Marks, TemplateError, marks_of
from silotune.settings.sections import Truncate
from silotune.structs import Example, Turn, more_of
from silotune.training.chats import chat, windows_of
from silotune.training.cuts import fitted, tail_ids
from silotune.training.encode import Encoded, answer_ids, framed_ids, prompt_ids
from silotune.training.tools import check_shown, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encodes examples for one tokenizer and length; remembers the options it has met.

    Args:
        tokenizer: The model's.
        max_length: Most ids of an example.
        turns: ``all`` answers of a chat are learnt, or the ``last`` alone. Without a chat template there is no mark
            where an answer ends, and the last alone is learnt.
        truncate: Where a prompt that is too long is cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        turns: str = "all",
        truncate: Truncate = "left",
    ) -> None:
        self._tokenizer = tokenizer
        self._truncate = truncate
        self._max_length = max_length
        self._all_turns = turns == "all" and bool(getattr(tokenizer, "chat_template", None))
        self._marks = marks_of(tokenizer)
        self._options: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def __call__(self, examples: Iterable[Example], *, first: int = 1) -> list[Encoded]:
        """Encodes examples in order, which are numbered from ``first``: one by one, but a long text as several.

        A pair whose two answers are equal in what fits is left out: it says of neither that it is better.

        Raises:
            DataError: A closed-ended answer alone does not fit, or an answer is empty; names the example's number.
        """
        found = (self._numbered(example, number) for number, example in enumerate(examples, first))
        return [made for several in found for made in several if not made.is_even]

    def _numbered(self, example: Example, number: int) -> list[Encoded]:
        plain, marks, words = _as_text(example, self._marks)
        try:
            first, *rest = self._encode(self._with_calls(plain), number)
            return [replace(first, marks=marks, turn_words=words) if marks or words else first, *rest]
        except TemplateError as error:
            raise DataError(f"example {number}: {error}") from error

    def _with_calls(self, example: Example) -> Example:
        """The example with the calls of its answer as the template words them."""
        turns = [*example.messages, Turn(("assistant", example.answer), example.calls)]
        check_shown(turns, self._tokenizer)
        return replace(example, answer=words_of(turns, len(turns) - 1, self._tokenizer), calls="")

    def _encode(self, example: Example, number: int) -> list[Encoded]:
        if example.is_document:
            return windows_of(example.answer, self._tokenizer, max_length=self._max_length, number=number)
        if example.rejected or example.wanted is not None:
            return [self._compared(example, number)]
        if self._all_turns and not example.options:
            turns = [*example.messages, ("assistant", example.answer)]
            made, left, whole = chat(
                turns, self._tokenizer, self._marks.end, max_length=self._max_length, number=number
            )
            if made is not None:
                return [made]
            if len(left) < len(turns):
                made = self._answered(replace(example, messages=tuple(left[:-1])), number)
                return [replace(made, prompt_cut=whole - made.length - made.answer_cut)]
        return [self._answered(example, number)]

    def _answer(self, text: str, example: Example, number: int) -> list[int]:
        """The ids of an answer to an example's prompt, with the end; one without any is refused."""
        ids = answer_ids(text, self._tokenizer, after=example.messages[-1][1])
        if not ids:
            raise DataError(f"example {number}: its answer has no tokens, so there is nothing to learn from")
        return [*ids, *self._marks.end.ids]

    def _prompt(self, example: Example, number: int) -> list[int]:
        prompt = prompt_ids(example.messages, self._tokenizer)
        if not prompt:
            raise DataError(f"example {number}: its prompt has no tokens")
        return prompt

    def _kept(self, prompt: list[int], room: int, example: Example) -> list[int]:
        """What fits of a prompt, with its beginning mark."""
        if len(prompt) <= room:
            return prompt
        first = int(room > 1 and prompt[0] == self._tokenizer.bos_token_id)
        return fitted(
            prompt,
            room,
            example,
            lambda other: prompt_ids(_as_text(other, self._marks)[0].messages, self._tokenizer),
            truncate=self._truncate,
            first=first,
            last=tail_ids(example.messages, self._tokenizer),
        )

    def _answered(self, example: Example, number: int) -> Encoded:
        answer = self._answer(example.answer, example, number)
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
        prompt = self._prompt(example, number)
        room = self._max_length - min(longest, self._max_length - 1)  # for the longest option, whichever is right
        kept = self._kept(prompt, room, example)
        return Encoded(
            prompt=tuple(kept),
            answer=tuple(answer),
            options=options,
            label=example.label,
            prompt_cut=len(prompt) - len(kept),
            answer_cut=answer_cut,
        )

    def _compared(self, example: Example, number: int) -> Encoded:
        """A pair, or a judged answer; where they do not fit, the prompt keeps up to half of the length."""
        answers = [self._answer(text, example, number) for text in (example.answer, example.rejected) if text]
        prompt = self._prompt(example, number)
        longest = max(map(len, answers))
        kept = self._kept(prompt, max(self._max_length - longest, self._max_length // 2), example)
        room = self._max_length - len(kept)
        options = tuple(tuple(answer[:room]) for answer in answers)
        return Encoded(
            prompt=tuple(kept),
            answer=options[0],
            options=options,
            label=-1 if example.wanted is False else 0,
            prompt_cut=len(prompt) - len(kept),
            answer_cut=max(0, longest - room),
        )

    def _option_ids(self, options: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        if options and options not in self._options:
            ids = [tuple(answer_ids(option, self._tokenizer)) for option in options]
            if not _is_prefix_free(ids):  # the end tells "A" from "A B"
                if not self._marks.end.ids:
                    raise DataError(
                        "one option is the beginning of another, and the tokenizer has no end mark to tell them apart"
                    )
                ids = [(*option, *self._marks.end.ids) for option in ids]
            if len(set(ids)) != len(ids) or not all(ids):
                raise DataError("two options of the task have the same tokens; give them other wordings")
            self._options[options] = tuple(ids)
        return self._options.get(options, ())


def _is_prefix_free(options: Sequence[tuple[int, ...]]) -> bool:
    ordered = sorted(options)
    return all(later[: len(earlier)] != earlier for earlier, later in zip(ordered, ordered[1:], strict=False))


def _as_text(example: Example, marks: Marks) -> tuple[Example, int, int]:
    """The example with all that it says read as text, and how many control marks and words of turns it spells."""

    def texts(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(marks.as_text, given))

    content = example.messages[-1][1] if example.shorten else ""
    made = replace(
        example,
        messages=marks.turns_as_text(example.messages),
        answer=marks.as_text(example.answer),
        calls=marks.json_as_text(example.calls),
        rejected=marks.as_text(example.rejected),
        options=texts(example.options),
        text=texts(example.text),
        shorten=tuple(
            (len(marks.as_text(content[:start])), len(marks.as_text(content[:end]))) for start, end in example.shorten
        ),
    )
    said = (
        *(text for turn in made.messages for text in (turn[1], more_of(turn))),
        made.answer,
        made.calls,
        made.rejected,
    )
    spelt, spoken = (sum(text.count(each) for text in said for each in sought) for sought in ((BREAK,), marks.words))
    return made, spelt, spoken


class ClassEncoder:
    """Encodes examples for a classifier: the text begun and ended as the tokenizer does it, and no answer."""

    def __init__(self, base: Base, *, max_length: int, wording: str, truncate: Truncate = "left") -> None:
        self._truncate = truncate
        self._tokenizer = base.tokenizer
        self._labels = base.labels
        self._max_length = max_length
        self._messages = WORDINGS[_AUTO[base.is_encoder] if wording == "auto" else wording]
        self._marks = base.marks
        self._between = f" {base.tokenizer.sep_token} " if base.is_encoder and base.tokenizer.sep_token else "\n"

    def __call__(self, examples: Iterable[Example], *, first: int = 1) -> list[Encoded]:
        """Encodes examples in order, which are numbered from ``first``.

        Raises:
            DataError: An example has other options than the head has classes, or no text; names its number.
        """
        return [self._encode(example, number) for number, example in enumerate(examples, first)]

    def _encode(self, example: Example, number: int) -> Encoded:
        if example.options != self._labels:
            raise DataError(f"example {number}: its options are not the classes of the head; use another objective")
        plain, marks, words = _as_text(example, self._marks)
        messages = self._messages(plain, self._between)
        ids, first, last = framed_ids(messages, self._tokenizer)
        if len(ids) == first + last:
            raise DataError(f"example {number}: its prompt has no tokens")
        kept = ids
        if len(ids) > self._max_length:
            kept = fitted(
                ids,
                self._max_length,
                plain,
                lambda other: framed_ids(
                    self._messages(_as_text(other, self._marks)[0], self._between), self._tokenizer
                )[0],
                truncate=self._truncate,
                first=first,
                last=last or tail_ids(messages, self._tokenizer),
            )
        cut = len(ids) - len(kept)
        return Encoded(tuple(kept), (), label=example.label, prompt_cut=cut, marks=marks, turn_words=words)


def _prompt(example: Example, between: str) -> Sequence[tuple[str, str]]:
    return example.messages


def _text(example: Example, between: str) -> Sequence[tuple[str, str]]:
    return (("user", between.join(example.text)),) if example.text else example.messages


WORDINGS: Mapping[str, Callable[[Example, str], Sequence[tuple[str, str]]]] = {"prompt": _prompt, "text": _text}
_AUTO: Mapping[bool, str] = {True: "text", False: "prompt"}
"""Whether the model is an encoder -> what it reads."""
