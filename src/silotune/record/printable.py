"""Makes other parties' texts safe to show: characters that act on a terminal or turn the order of letters become codes.

A site writes reasons, a coordinator names, a run folder comes from elsewhere: any of them may hold escape sequences.
"""

from __future__ import annotations

import re

_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""C0 without tab and end of line, DEL, and C1, among which is a one-character form of ESC [."""
_ORDER = "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
"""Marks, embeddings, overrides and isolates of bidirectional text, and Unicode's own ends of line."""
_NO_TEXT = r"\ud800-\udfff"
"""Halves of a pair alone, which JSON can hold and no terminal takes."""
_ACTING = re.compile(f"[{_CONTROLS}{_ORDER}{_NO_TEXT}]")
_ACTING_IN_LINE = re.compile(f"[\t\n{_CONTROLS}{_ORDER}{_NO_TEXT}]")


def printable(text: str) -> str:
    """The text with every character that acts on a terminal as ``\\uXXXX``; tabs and ends of line stay.

    In JSON such a code stands for the very character, so that a document stays what it is.
    """
    return _ACTING.sub(_code, text)


def one_line(text: str) -> str:
    """The text as ``printable`` gives it, with tabs and ends of line as codes, too."""
    return _ACTING_IN_LINE.sub(_code, text)


def _code(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 round``, ``2 rounds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
