"""Reads JSON that comes from elsewhere: one object, no name twice, no NaN; imports nothing heavy."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from silotune.errors import MessageError


def strict_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in some bytes.

    Args:
        data: UTF-8 text.
        what: Part of a message that it is, for the error.

    Raises:
        MessageError: It is not JSON, not an object, or holds a name twice.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and numbers of endless digits
        raise MessageError(f"a message's {what} is not JSON") from error
    if not isinstance(document, dict):
        raise MessageError(f"a message's {what} is not an object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity, which Python's parser would take."""
    raise ValueError(f"{name} is not JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without a name that stands twice: two parsers could take different ones."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made
