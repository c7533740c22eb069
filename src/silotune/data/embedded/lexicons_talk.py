"""Everyday words for the chats of the pre-training corpus."""

from __future__ import annotations

COLOURS: tuple[str, ...] = ("red", "blue", "green", "brown", "white", "black", "yellow", "grey")
ANIMALS: tuple[str, ...] = ("dog", "horse", "cow", "goat", "cat", "sheep", "mouse", "fox")
FOODS: tuple[str, ...] = ("bread", "cheese", "soup", "rice", "cake", "apple", "fish", "butter")
TOOLS: tuple[str, ...] = ("hammer", "saw", "spade", "needle", "knife", "rope", "wheel", "ladder")
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a colour", COLOURS),
    ("an animal", ANIMALS),
    ("food", FOODS),
    ("a tool", TOOLS),
)
WORDS: tuple[str, ...] = (
    *ANIMALS, *FOODS, *TOOLS, "house", "river", "window", "letter", "garden", "road", "night", "morning", "stone", "tree",
    "hand", "door", "fire", "boat", "chair", "clock",
)  # fmt: skip
OPPOSITES: tuple[tuple[str, str], ...] = (
    ("up", "down"), ("rise", "fall"), ("grow", "shrink"), ("more", "less"), ("win", "lose"), ("hot", "cold"),
    ("open", "closed"), ("early", "late"), ("strong", "weak"), ("new", "old"), ("long", "short"), ("rich", "poor"),
    ("positive", "negative"), ("increase", "decrease"), ("gain", "loss"), ("high", "low"),
)  # fmt: skip
REQUESTS: tuple[tuple[str, str], ...] = (
    ("Repeat these words", "repeat"), ("Reverse this list", "reverse"), ("Sort these words", "sort"),
    ("Give only the first word", "first"), ("Give only the last word", "last"),
)  # fmt: skip
