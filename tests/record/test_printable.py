"""No text that comes from elsewhere acts on a terminal, and none changes what JSON says."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from silotune.record.printable import one_line, printable

BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
TEXTS = st.text(st.characters(exclude_categories=()))


def acts(character: str) -> bool:
    """By what Unicode says of the character, not by the list that the code has."""
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return is_control or unicodedata.bidirectional(character) in BIDI or character in "\u061c\u200e\u200f"


def test_every_character_that_acts_stands_as_its_code_and_no_other() -> None:
    for first in range(0, 0x110000, 0x1000):
        characters = [chr(number) for number in range(first, first + 0x1000)]
        codes = [f"\\u{ord(character):04x}" if acts(character) else character for character in characters]
        assert one_line("".join(characters)) == "".join(codes)
        kept = [each if each in "\t\n" else code for each, code in zip(characters, codes, strict=True)]
        assert printable("".join(characters)) == "".join(kept)


@given(TEXTS)
def test_what_was_made_printable_stays_as_it_is(text: str) -> None:
    assert not any(map(acts, one_line(text)))
    assert one_line(one_line(text)) == one_line(text) and printable(printable(text)) == printable(text)
    printable(text).encode()


@given(st.text(st.characters(exclude_categories=["Cs"])))  # two halves of pairs side by side are one character in JSON
def test_json_that_was_made_printable_says_the_same(text: str) -> None:
    for shown in (json.dumps({text: text}, ensure_ascii=False), json.dumps([text], ensure_ascii=False, indent=2)):
        assert json.loads(printable(shown)) == json.loads(shown)
