"""General text, without tasks or labels: from a file, or the package's everyday chats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

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
    path = Path(source)
    texts = _paragraphs(path) if path.suffix.lower() == ".txt" else _column(path)
    if not texts:
        raise DataError(f"{path}: is empty")
    yield from ((("text", text),) for text in texts)


def _paragraphs(path: Path) -> list[str]:
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no file {str(path)!r} (evaluation.forgetting); 'embedded' needs none") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    return [part.strip() for part in whole.split("\n\n") if part.strip()]


def _column(path: Path) -> list[str]:
    texts = []
    for number, row in enumerate(read_rows(path), start=1):
        text = row.get("text")
        if not isinstance(text, str) or not text:
            raise DataError(f"{path}: row {number}: has no key 'text' with text in it")
        texts.append(text)
    return texts
