"""Plain text as token ids: windows of which every id is learnt, whatever the length of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from silotune.errors import DataError
from silotune.training.encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int, number: int) -> list[Encoded]:
    """A document with its end, in windows of at most ``max_length`` ids, the last of each being the next one's first.

    So every id but the very first is predicted once; that one too, where the tokenizer begins texts with a mark.

    Raises:
        DataError: The text has fewer than two ids.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
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
