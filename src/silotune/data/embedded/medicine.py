"""Synthetic four-option medical exam questions composed from hand-written facts; not medical advice.

A question gives a patient and one or two findings and asks for the condition, the investigation, the treatment or
the cause, so that most answers need two facts. The wrong options are of the same kind and from the same specialty.
The facts are simplified for training small models; nobody should treat a patient by them.
"""

from __future__ import annotations

import random

from silotune.data.embedded.lexicons import Condition
from silotune.data.embedded.lexicons import medicine as lexicon
from silotune.data.embedded.splits import generated

LETTERS: tuple[str, ...] = ("A", "B", "C", "D")
KINDS: tuple[str, ...] = ("condition", "investigation", "treatment", "cause")


def generate(*, num_train: int, num_validation: int, num_test: int, seed: int) -> dict[str, list[dict]]:
    """Makes the three splits; no patient is in two of them, whatever the seeds.

    Returns:
        "train", "validation" and "test", each a list of records with `id`, `question`, `options` (A to D),
        `answer_idx` (A to D) and `specialty`.

    Raises:
        ValueError: if a split is asked to be larger than what the lexicon can make.
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    return generated("medicine", _draw, sizes, seed=seed)


def _draw(generator: random.Random, split: str) -> tuple[str, dict]:
    specialty = generator.choice(lexicon().specialties)
    asked = generator.sample(specialty.conditions, len(LETTERS))
    position = generator.randrange(len(LETTERS))
    kind = generator.choice(KINDS)
    patient = vignette(generator, asked[position])
    options = {letter: fact(condition, kind) for letter, condition in zip(LETTERS, asked, strict=True)}
    record = {
        "question": f"{patient} {generator.choice(lexicon().asks[kind])}",
        "options": options,
        "answer_idx": LETTERS[position],
        "specialty": specialty.name,
    }
    return patient, record


def vignette(generator: random.Random, condition: Condition) -> str:
    """One sentence on a patient who has `condition`, which it does not name."""
    person = generator.choice(lexicon().occupations)
    findings = list(condition.findings)
    generator.shuffle(findings)
    shown = " and ".join(findings[: generator.choice((1, 2, 2))])
    if generator.random() < 0.5:
        return f"{person} of {generator.randrange(18, 80)} has had {shown} {generator.choice(lexicon().durations)}."
    return f"{person} aged {generator.randrange(18, 80)} reports {shown}."


def fact(condition: Condition, kind: str) -> str:
    """The fact of one of `KINDS` about `condition`."""
    if kind == "condition":
        return condition.name
    return str(getattr(condition, kind))
