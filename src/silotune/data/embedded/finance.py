"""Synthetic financial news with a sentiment label, composed so that no single word gives the label away.

The label of a sentence is what it means for the company: the polarity of the measure (deposits, bad loans) times
the direction of the verb (rose, melted), turned round by words such as "halted" or "was spared". A main clause
counts more than its "although" clause. Open questions, steady measures and news that cancels out are neutral.
Companies are invented.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from silotune.data.embedded.lexicons import Sector
from silotune.data.embedded.lexicons import finance as lexicon
from silotune.data.embedded.splits import generated

LABELS: tuple[str, ...] = ("negative", "neutral", "positive")


def generate(*, num_train: int, num_validation: int, num_test: int, seed: int) -> dict[str, list[dict]]:
    """Makes the three splits; no sentence is in two of them, whatever the seeds.

    Returns:
        "train", "validation" and "test", each a list of records with `id`, `text`, `label` (negative, neutral or
        positive) and `sector`.

    Raises:
        ValueError: if a split is asked to be larger than what the lexicon can make.
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    return generated("finance", _draw, sizes, seed=seed)


def _draw(generator: random.Random, split: str) -> tuple[str, dict]:
    sector = generator.choice(lexicon().sectors)
    label = generator.choice(LABELS)
    polarity = LABELS.index(label) - 1
    company = f"{generator.choice(lexicon().names)} {generator.choice(sector.suffixes)}"
    text = compose(generator, sector, company, polarity)
    return text, {"text": text, "label": label, "sector": sector.name}


def compose(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    """A sentence about `company` whose meaning is `polarity`: -1, 0 or 1."""
    measures = sector.strengths + sector.burdens
    while True:
        if polarity:
            text = generator.choice(_POLAR)(generator, sector, company, polarity)
        else:
            text = generator.choice(_NEUTRAL)(generator, sector, company, generator.choice((-1, 1)))
        if all(text.count(measure) < 2 for measure in measures):
            return text[0].upper() + text[1:] + "."


def clause(generator: random.Random, sector: Sector, polarity: int) -> str:
    """A clause such as "bad loans melted" whose meaning is `polarity`: -1 or 1."""
    direction = generator.choice((-1, 1))
    measures = sector.strengths if polarity == direction else sector.burdens
    common, own = (lexicon().rises, sector.rises) if direction > 0 else (lexicon().falls, sector.falls)
    return f"{generator.choice(measures)} {generator.choice(common if generator.random() < 0.6 else own)}"


def _noun(generator: random.Random, sector: Sector, polarity: int) -> str:
    direction = generator.choice((-1, 1))
    measures = sector.strengths if polarity == direction else sector.burdens
    nouns = lexicon().rise_nouns if direction > 0 else lexicon().fall_nouns
    return f"{generator.choice(nouns)} {generator.choice(measures)}"


def _level(generator: random.Random, sector: Sector) -> str:
    return f"{generator.choice(sector.strengths + sector.burdens)} {generator.choice(lexicon().holds)}"


def _plain(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    return f"{company} said {clause(generator, sector, polarity)} {generator.choice(lexicon().times)}"


def _although(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    against, main = clause(generator, sector, -polarity), clause(generator, sector, polarity)
    if generator.random() < 0.5:
        return f"although {against}, {main} at {company}"
    return f"{main} at {company}, although {against}"


def _steady_aside(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    level, main = _level(generator, sector), clause(generator, sector, polarity)
    if generator.random() < 0.5:
        return f"{level} at {company} while {main}"
    return f"{company} said {main} while {level}"


def _outweigh(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    for_it, against = _noun(generator, sector, polarity), _noun(generator, sector, -polarity)
    if generator.random() < 0.5:
        return f"at {company} {for_it} more than offset {against}"
    return f"at {company} {against} was more than offset by {for_it}"


def _halted(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    if generator.random() < 0.5:
        return f"{company} halted {_noun(generator, sector, -polarity)} {generator.choice(lexicon().times)}"
    return f"{company} did not halt {_noun(generator, sector, polarity)} {generator.choice(lexicon().times)}"


def _event(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    gained = generator.choice((-1, 1))
    things = sector.prizes if polarity == gained else sector.blows
    when = generator.choice((*lexicon().times[:8], *(f"on {day}" for day in lexicon().days)))
    verb = generator.choice(lexicon().gains if gained > 0 else lexicon().losses)
    return f"{company} {verb} {generator.choice(things)} {when}"


def _open_aside(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    question, main = clause(generator, sector, generator.choice((-1, 1))), clause(generator, sector, polarity)
    return f"{company} will say on {generator.choice(lexicon().days)} whether {question}, but {main}"


def _level_news(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    if generator.random() < 0.5:
        return f"{company} said {_level(generator, sector)} {generator.choice(lexicon().times)}"
    return f"{_level(generator, sector)} at {company} while {_level(generator, sector)}"


def _open_question(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    news = clause(generator, sector, polarity)
    if generator.random() < 0.5:
        return f"{company} will say on {generator.choice(lexicon().days)} whether {news}"
    return f"{company} did not say whether {news} {generator.choice(lexicon().times)}"


def _balanced(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    first, second = _noun(generator, sector, polarity), _noun(generator, sector, -polarity)
    if generator.random() < 0.5:
        return f"at {company} {first} just offset {second}"
    return f"at {company} {first} was just offset by {second}"


def _undecided_event(generator: random.Random, sector: Sector, company: str, polarity: int) -> str:
    thing = generator.choice(sector.prizes if polarity > 0 else sector.blows)
    verb = generator.choice(lexicon().gains + lexicon().losses)
    return f"{company} will say on {generator.choice(lexicon().days)} whether it {verb} {thing}"


Template = Callable[[random.Random, Sector, str, int], str]
_POLAR: tuple[Template, ...] = (
    _plain,
    _plain,
    _although,
    _steady_aside,
    _steady_aside,
    _outweigh,
    _halted,
    _event,
    _event,
    _open_aside,
    _open_aside,
)
_NEUTRAL: tuple[Template, ...] = (_level_news, _open_question, _balanced, _undecided_event)
