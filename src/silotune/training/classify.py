"""How a text is put to a classifier: its wording, and the ids around it.

What the model reads is the whole prompt or the row's text alone (``training.objective.wording``). A head learns from
labels and not from wording, so an instruction that is the same in every row tells an encoder nothing; a decoder was
trained to go on after one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from silotune.errors import DataError
from silotune.models.load import Base
from silotune.structs import Example
from silotune.training.encode import Encoded, cut_left, framed_ids


class ClassEncoder:
    """Encodes examples for a classifier: the text begun and ended as the tokenizer does it, and no answer."""

    def __init__(self, base: Base, *, max_length: int, wording: str) -> None:
        self._tokenizer = base.tokenizer
        self._labels = base.labels
        self._max_length = max_length
        self._messages = WORDINGS[_AUTO[base.is_encoder] if wording == "auto" else wording]
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
        ids, first, last = framed_ids(self._messages(example, self._between), self._tokenizer)
        if len(ids) == first + last:
            raise DataError(f"example {number}: its prompt has no tokens")
        kept = cut_left(ids, self._max_length, first=first)
        return Encoded(tuple(kept), (), label=example.label, prompt_cut=len(ids) - len(kept))


def _prompt(example: Example, between: str) -> Sequence[tuple[str, str]]:
    return example.messages


def _text(example: Example, between: str) -> Sequence[tuple[str, str]]:
    return (("user", between.join(example.text)),) if example.text else example.messages


WORDINGS: Mapping[str, Callable[[Example, str], Sequence[tuple[str, str]]]] = {"prompt": _prompt, "text": _text}
_AUTO: Mapping[bool, str] = {True: "text", False: "prompt"}
"""Whether the model is an encoder -> what it reads."""
