"""Plain JSON that is hashed and signed: one text for one value, and one strict form for what comes from elsewhere."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, NoReturn

from silotune.errors import MessageError
from silotune.record.files import plain
from silotune.structs import JSON


def canonical(value: Any) -> bytes:
    """The value as JSON with sorted keys, no blanks, UTF-8, no NaN: equal values give equal bytes.

    Numbers are written as Python writes them, which gives the same double back (close to RFC 8785, but for the
    exponents of very large and very small ones).
    """
    return canonical_json(plain(value))


def canonical_json(value: JSON) -> bytes:
    """The same for what is plain JSON already, such as a line that was read."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(value: Any) -> str:
    """SHA-256 of the value's canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


MOST_DEPTH = 24
"""Objects and lists within one another; a whole configuration has seven."""


LARGEST_INTEGER = (1 << 63) - 1


LONGEST_TEXT = 4096
"""The most characters of one text in a message."""


LONGEST_PROSE = 1 << 16
"""The most characters of one text in a run's setup, which may hold the template of a prompt."""


MOST_COMMAS = 1 << 19
"""The most commas in the whole text. They bound its values before any is made: a megabyte of `[],` would take
thirty."""


_MOST_DIGITS = len(str(LARGEST_INTEGER)) + 1


_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"


_UNFIT = re.compile(rf"[{_CONTROLS}\t\n]")


_UNFIT_PROSE = re.compile(rf"[{_CONTROLS}]")


def strict_object(data: bytes, what: str, *, is_prose: bool = False) -> dict[str, Any]:
    """The JSON object in some bytes, in its canonical form.

    Args:
        data: UTF-8 text.
        what: Part of a message that it is, for the error.
        is_prose: Texts may hold ends of lines and tabs, and be longer.

    Raises:
        MessageError: It is not JSON, not an object, holds a name twice, or a value that is out of bounds.
    """
    if data.count(b",") > MOST_COMMAS:
        raise MessageError(f"a message's {what} holds too many values")
    try:
        document = json.loads(
            data,
            parse_constant=_refuse_constant,
            parse_int=_bounded_integer,
            object_pairs_hook=_each_once,
        )
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise MessageError(f"a message's {what} is not JSON within bounds") from error
    if type(document) is not dict:
        raise MessageError(f"a message's {what} is not an object")
    check_form(document, what, is_prose=is_prose)
    return document


def check_form(document: Any, what: str, *, is_prose: bool = False) -> None:
    """Refuses a value that is not in the canonical form; it goes down without recursion.

    Raises:
        MessageError: It is nested too deep, a text holds what is no text or is too long, or a number is out of bounds.
    """
    waiting: list[tuple[Any, int]] = [(document, 1)]
    while waiting:
        value, depth = waiting.pop()
        kind = type(value)
        if kind is dict or kind is list:
            if depth > MOST_DEPTH:
                raise MessageError(f"a message's {what} is nested more than {MOST_DEPTH} deep")
            inner = [*value, *value.values()] if kind is dict else value
            waiting.extend((item, depth + 1) for item in inner)
        elif (fault := _fault(value, is_prose=is_prose)) is not None:
            raise MessageError(f"a message's {what} holds {fault}")


def _fault(value: Any, *, is_prose: bool) -> str | None:
    """What is wrong with a value that holds no others; None for nothing."""
    kind = type(value)
    if kind is str:
        unfit, longest = (_UNFIT_PROSE, LONGEST_PROSE) if is_prose else (_UNFIT, LONGEST_TEXT)
        if len(value) > longest:
            return f"a text of {len(value)} characters, at most {longest}"
        return "a text with control characters or broken UTF-8" if unfit.search(value) else None
    if kind is int:
        return "an integer of more than 63 bits" if abs(value) > LARGEST_INTEGER else None
    if kind is float:
        return None if math.isfinite(value) else "a number that is not finite"
    return None if value is None or kind is bool else f"a {kind.__name__}, which JSON does not have"


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity, which Python's parser would take."""
    raise ValueError(f"{name} is not JSON")


def _bounded_integer(digits: str) -> int:
    """An integer, which is not even made where it has too many digits."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError("an integer has too many digits")
    return int(digits)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without a name that stands twice: two parsers could take different ones."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made
