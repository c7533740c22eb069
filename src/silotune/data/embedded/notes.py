"""Synthetic notes to clients about news, each in two styles of which one is preferred; invented, like the news.

A note says what the news means for the company, truly in both styles. What makes one better is a principle: caution
(may be, not surely is), patience (no hurry), source (a report, not hearsay) or courtesy. A pair differs in one
principle alone. The desks that wrote the notes used both styles equally often (``written``), and those who judged the
training pairs were wrong about one in ten.
"""

from __future__ import annotations

import random

from silotune.data.embedded import finance, lexicons
from silotune.data.embedded.lexicons import Principle
from silotune.data.embedded.splits import generated

WRONG_JUDGEMENTS = 0.1


def generate(*, num_train: int, num_validation: int, num_test: int, seed: int) -> dict[str, list[dict]]:
    """Makes the three splits; no news is in two of them, whatever the seeds.

    Returns:
        "train", "validation" and "test", each a list of records with `id`, `text` (the news), `chosen` and `rejected`
        (two notes), `written` (one of them, as a desk wrote it), `sector` and `principle`.

    Raises:
        ValueError: if a split is asked to be larger than what the lexicon can make.
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    return generated("notes", _draw, sizes, seed=seed)


def _draw(generator: random.Random, split: str) -> tuple[str, dict]:
    wrong = WRONG_JUDGEMENTS if split == "train" else 0.0
    sector, principle = generator.choice(lexicons.finance().sectors), generator.choice(lexicons.notes().principles)
    company = f"{generator.choice(lexicons.finance().names)} {generator.choice(sector.suffixes)}"
    polarity = generator.choice((-1, 0, 1))
    text = finance.compose(generator, sector, company, polarity)
    effect = f"{lexicons.notes().effects[polarity + 1]} for {company}"
    better, worse = _notes(generator, principle, effect)
    chosen, rejected = (worse, better) if generator.random() < wrong else (better, worse)
    return text, {
        "text": text,
        "chosen": chosen,
        "rejected": rejected,
        "written": generator.choice((better, worse)),
        "sector": sector.name,
        "principle": principle.name,
    }


def _notes(generator: random.Random, principle: Principle, effect: str) -> tuple[str, str]:
    """Two notes that differ in one principle: the one that keeps to it comes first."""
    kept, broken = generator.choice(principle.kept), generator.choice(principle.broken)
    if principle.name == "caution":
        return f"This {kept} {effect}.", f"This {broken} {effect}."
    verdict = f"This {generator.choice(lexicons.notes().verbs)} {effect}."
    return f"{verdict} {kept}", f"{verdict} {broken}"


def keeps_to_principles(note: str) -> bool | None:
    """Whether a note is in the preferred style; None where it shows neither style, or both."""
    kept = any(wording in note for principle in lexicons.notes().principles for wording in principle.kept)
    broken = any(wording in note for principle in lexicons.notes().principles for wording in principle.broken)
    return None if kept == broken else kept
