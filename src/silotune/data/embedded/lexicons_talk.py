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
    *ANIMALS, *FOODS, *TOOLS, "house", "river", "window", "letter", "garden", "road", "night", "morning",
    "stone", "tree", "hand", "door", "fire", "boat", "chair", "clock",
)  # fmt: skip
OPPOSITES: tuple[tuple[str, str], ...] = (
    ("up", "down"), ("rise", "fall"), ("grow", "shrink"), ("more", "less"), ("win", "lose"), ("hot", "cold"),
    ("open", "closed"), ("early", "late"), ("strong", "weak"), ("new", "old"), ("long", "short"),
    ("rich", "poor"), ("positive", "negative"), ("increase", "decrease"), ("gain", "loss"), ("high", "low"),
)  # fmt: skip
REQUESTS: tuple[tuple[str, str], ...] = (
    ("Repeat these words", "repeat"), ("Reverse this list", "reverse"), ("Sort these words", "sort"),
    ("Give only the first word", "first"), ("Give only the last word", "last"),
)  # fmt: skip
DEFINITIONS: tuple[tuple[str, str], ...] = (
    ("sentiment", "The feeling or leaning that a text shows."),
    ("positive", "Good, or above zero."),
    ("negative", "Bad, or below zero."),
    ("neutral", "Neither good nor bad, on no side."),
    ("a question", "A sentence that asks for an answer."),
    ("an answer", "What is said in reply to a question."),
    ("an option", "One of several things to choose from."),
    ("a letter", "A sign of the alphabet, such as A, B, C or D."),
    ("a company", "A firm that sells goods or services."),
    ("an investor", "Someone who puts money into a company."),
    ("the news", "What has happened lately."),
    ("a diagnosis", "The name of the illness that a patient has."),
    ("a sentence", "A group of words that says something whole."),
    ("to classify", "To put a thing into one of several classes."),
    ("medical", "Having to do with medicine."),
    ("financial", "Having to do with money."),
    ("a label", "The name of the class that a thing belongs to."),
    ("correct", "Right, without mistake."),
)
