"""The hand-written words of the embedded worlds, from the TOML files beside this one; each is read once, when asked."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

Words = tuple[str, ...]


@dataclass(frozen=True)
class Sector:
    """The vocabulary of one business sector."""

    name: str
    suffixes: Words
    strengths: Words
    burdens: Words
    prizes: Words
    blows: Words
    rises: Words
    falls: Words
    cheers: Words
    sighs: Words
    shrugs: Words


@dataclass(frozen=True)
class Finance:
    """What financial news is composed from."""

    sectors: tuple[Sector, ...]
    names: Words
    rises: Words
    falls: Words
    holds: Words
    rise_nouns: Words
    fall_nouns: Words
    gains: Words
    losses: Words
    times: Words
    days: Words


@dataclass(frozen=True)
class Condition:
    """One illness: two findings, the investigation that shows it, its first treatment, and its cause."""

    name: str
    findings: tuple[str, str]
    investigation: str
    treatment: str
    cause: str


@dataclass(frozen=True)
class Specialty:
    """One field of medicine and its conditions; every fact is unlike the others of its kind."""

    name: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Medicine:
    """What exam questions are composed from; ``asks`` are the questions by kind of fact."""

    specialties: tuple[Specialty, ...]
    asks: dict[str, Words]
    occupations: Words
    durations: Words


@dataclass(frozen=True)
class Principle:
    """What a pair of notes may differ in: wordings that keep to it and wordings that do not."""

    name: str
    kept: Words
    broken: Words


@dataclass(frozen=True)
class Notes:
    """What notes to clients are composed from; ``effects`` are of bad, indifferent and good news."""

    principles: tuple[Principle, ...]
    verbs: Words
    effects: Words


@dataclass(frozen=True)
class Talk:
    """What everyday chats are composed from; ``kinds`` are of things, each with its words."""

    kinds: dict[str, Words]
    others: Words
    opposites: tuple[tuple[str, str], ...]
    requests: dict[str, str]
    definitions: dict[str, str]

    @property
    def colours(self) -> Words:
        """The words for colours, the only kind that does not name things."""
        return self.kinds["a colour"]

    @property
    def things(self) -> Words:
        """All words except the colours."""
        named = [words for kind, words in self.kinds.items() if kind != "a colour"]
        return (*(word for words in named for word in words), *self.others)


@cache
def finance() -> Finance:
    """The words of ``finance.toml``."""
    found = _read("finance")
    return Finance(**{**found, "sectors": tuple(Sector(**row) for row in found["sectors"])})


@cache
def medicine() -> Medicine:
    """The facts and words of ``medicine.toml``."""
    found = _read("medicine")
    specialties = tuple(
        Specialty(row["name"], tuple(_condition(*fields) for fields in row["conditions"]))
        for row in found["specialties"]
    )
    return Medicine(**{**found, "specialties": specialties})


@cache
def notes() -> Notes:
    """The wordings of ``notes.toml``."""
    found = _read("notes")
    return Notes(**{**found, "principles": tuple(Principle(**row) for row in found["principles"])})


@cache
def talk() -> Talk:
    """The words of ``talk.toml``."""
    return Talk(**_read("talk"))


def _condition(name: str, first: str, second: str, *facts: str) -> Condition:
    return Condition(name, (first, second), *facts)


def _read(name: str) -> dict[str, Any]:
    text = files("silotune.data.embedded").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return {key: _frozen(value) for key, value in tomllib.loads(text).items()}


def _frozen(value: Any) -> Any:
    """The same, with tuples for lists."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
