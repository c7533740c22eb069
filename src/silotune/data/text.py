"""General text, without tasks or labels: from a file, or the package's everyday chats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from silotune.data.embedded import corpus
from silotune.data.files import read_rows
from silotune.errors import DataError

EMBEDDED = "embedded"
_MOST_DOCUMENTS = 100_000


def documents(source: str) -> Iterator[tuple[tuple[str, str], ...]]:
    """Documents as (role, content); prose is one turn of role ``text``.

    Args:
        source: ``embedded``; a ``.txt`` file, whose blank lines part the documents; or a file of rows with ``text``.

    Raises:
        DataError: The file is missing, broken or empty, or a row has no text.
    """
    if source == EMBEDDED:
        for made in itertools.islice(corpus.talk(seed=0), _MOST_DOCUMENTS):  # the same for every seed of a run
            yield tuple((turn["role"], turn["content"]) for turn in made)
        return
    for number, row in enumerate(read_rows(source), start=1):
        text = row.get("text")
        if not isinstance(text, str) or not text:
            raise DataError(f"{source}: row {number}: has no key 'text' with text in it")
        yield (("text", text),)
