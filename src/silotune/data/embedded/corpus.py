"""Unlabelled text for pre-training a tiny model: news with its market echo, textbook prose, and chats in turns.

The corpus teaches what the words of the embedded tasks mean and how a chat is laid out. It never holds a task's
label or prompt: market reactions are told in words of their own, and medical knowledge comes as prose and short
answers. Sentences that belong to a train, validation or test split are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from silotune.data.embedded import finance, lexicons, medicine
from silotune.data.embedded.lexicons import Condition, Sector, Specialty
from silotune.data.embedded.splits import split_of

Turn = dict[str, str]
Document = list[Turn]


def documents(*, seed: int) -> Iterator[Document]:
    """An endless stream of documents.

    Yields:
        Turns of `role` and `content`. Prose is one turn whose role is "text"; a chat alternates "user" and "assistant",
        and may begin with "system".
    """
    generator = random.Random(f"corpus/{seed}")
    while True:
        maker = generator.choices(_MAKERS, weights=_WEIGHTS)[0]
        yield maker(generator)


def talk(*, seed: int) -> Iterator[Document]:
    """An endless stream of everyday chats: words, opposites, requests, days; nothing of the tasks' two worlds."""
    generator = random.Random(f"talk/{seed}")
    makers = (_odd_kind, _opposite, _number_sign, _request, _weekday, _definition)
    while True:
        yield generator.choice(makers)(generator)


def _prose(content: str) -> Document:
    return [{"role": "text", "content": content}]


def _chat(question: str, answer: str) -> Document:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _company(generator: random.Random, sector: Sector) -> str:
    return f"{generator.choice(lexicons.finance().names)} {generator.choice(sector.suffixes)}"


def _news_sentence(generator: random.Random, sector: Sector, polarity: int) -> str:
    while True:
        sentence = finance.compose(generator, sector, _company(generator, sector), polarity)
        if split_of(sentence) == "corpus":
            return sentence


def _echo(generator: random.Random, sector: Sector, polarity: int) -> str:
    return generator.choice((sector.shrugs, sector.cheers, sector.sighs)[polarity])


def _news(generator: random.Random) -> Document:
    sector = generator.choice(lexicons.finance().sectors)
    parts: list[str] = []
    for _ in range(generator.randint(1, 3)):
        polarity = generator.choice((-1, 0, 1))
        parts += [_news_sentence(generator, sector, polarity), _echo(generator, sector, polarity)]
    return _prose(" ".join(parts))


def _headline(generator: random.Random, sector: Sector) -> tuple[str, int]:
    """A few words of news and their polarity.

    Strengths, and rises, are told more often than burdens and falls. With all four kinds equally often, neither half
    of a clause would say anything on its own, and small models are very slow to learn such a product.
    """
    is_good, is_up = generator.random() < 0.7, generator.random() < 0.7
    polarity = 1 if is_good == is_up else -1
    if generator.random() < 0.3:
        verb = generator.choice(lexicons.finance().gains if is_up else lexicons.finance().losses)
        return (
            f"{_company(generator, sector)} {verb} {generator.choice(sector.prizes if is_good else sector.blows)}",
            polarity,
        )
    verbs = (lexicons.finance().rises, sector.rises) if is_up else (lexicons.finance().falls, sector.falls)
    measure = generator.choice(sector.strengths if is_good else sector.burdens)
    return f"{measure} {generator.choice(verbs[generator.random() < 0.4])}", polarity


def _ticker(generator: random.Random) -> Document:
    sector = generator.choice(lexicons.finance().sectors)
    parts: list[str] = []
    for _ in range(generator.randint(2, 6)):
        headline, polarity = _headline(generator, sector)
        parts += [_upper(headline) + ".", _echo(generator, sector, polarity)]
    return _prose(" ".join(parts))


def _explained_news(generator: random.Random) -> Document:
    sector = generator.choice(lexicons.finance().sectors)
    headline, polarity = _headline(generator, sector)
    return _prose(f"{_echo(generator, sector, polarity)} The reason is that {headline}.")


def _glossary(generator: random.Random) -> Document:
    sector = generator.choice(lexicons.finance().sectors)
    good, bad = generator.choice(sector.strengths), generator.choice(sector.burdens)
    sentences = [
        f"In {sector.name}, {good} should be high.",
        f"In {sector.name}, {bad} should be low.",
        f"A company in {sector.name} hopes for {generator.choice(sector.prizes)}.",
        f"A company in {sector.name} dreads {generator.choice(sector.blows)}.",
        f"When {good} {generator.choice(sector.falls)}, {_lower(_echo(generator, sector, -1))}",
        f"When {bad} {generator.choice(sector.falls)}, {_lower(_echo(generator, sector, 1))}",
    ]
    return _prose(" ".join(generator.sample(sentences, 3)))


def _news_chat(generator: random.Random) -> Document:
    sector = generator.choice(lexicons.finance().sectors)
    polarity = generator.choice((-1, 0, 1))
    question = generator.choice(("What happened next?", "How was this taken?", "What followed?"))
    return _chat(f"{_news_sentence(generator, sector, polarity)} {question}", _echo(generator, sector, polarity))


def _textbook(generator: random.Random) -> Document:
    specialty = generator.choice(lexicons.medicine().specialties)
    condition = generator.choice(specialty.conditions)
    sentences = [*_facts(condition), f"{_upper(condition.name)} belongs to {specialty.name}."]
    return _prose(" ".join(generator.sample(sentences, 4)))


def _facts(condition: Condition) -> list[str]:
    first, second = condition.findings
    return [
        f"{_upper(condition.name)} shows itself by {first} and {second}.",
        f"{_upper(condition.name)} is found by {condition.investigation}.",
        f"{_upper(condition.name)} is treated with {condition.treatment}.",
        f"{_upper(condition.name)} is due to {condition.cause}.",
        f"{_upper(first)} points to {condition.name}.",
        f"{_upper(second)} points to {condition.name}.",
        f"In someone with {second}, consider {condition.investigation} for {condition.name}.",
        f"In someone with {first}, think of {condition.cause} and {condition.treatment}.",
    ]


def _patient(generator: random.Random, condition: Condition) -> str:
    while True:
        sentence = medicine.vignette(generator, condition)
        if split_of(sentence) == "corpus":
            return sentence


def _case_note(generator: random.Random) -> Document:
    specialty = generator.choice(lexicons.medicine().specialties)
    condition = generator.choice(specialty.conditions)
    sentence = _patient(generator, condition)
    facts = [
        f"It was {condition.name}.",
        f"The cause was {condition.cause}.",
        f"The test was {condition.investigation}.",
    ]
    facts.append(f"The treatment was {condition.treatment}.")
    return _prose(" ".join([sentence, *generator.sample(facts, 3)]))


def _medical_chat(generator: random.Random) -> Document:
    specialty = generator.choice(lexicons.medicine().specialties)
    condition = generator.choice(specialty.conditions)
    kind = generator.choice(("investigation", "treatment", "cause"))
    answer = medicine.fact(condition, kind)
    subject = generator.choice((condition.name, f"someone with {generator.choice(condition.findings)}"))
    return _chat(f"Name the {kind} for {subject}.", answer)


def _medical_choice(generator: random.Random) -> Document:
    specialty: Specialty = generator.choice(lexicons.medicine().specialties)
    conditions = generator.sample(specialty.conditions, 4)
    right = generator.randrange(4)
    kind = generator.choice(("investigation", "treatment", "cause"))
    if generator.random() < 0.5:
        lead = f"Which {kind} goes with {conditions[right].name}?"
        return _lettered(lead, [medicine.fact(condition, kind) for condition in conditions], right)
    lead = f"Which condition goes with {generator.choice(conditions[right].findings)}?"
    return _lettered(lead, [condition.name for condition in conditions], right)


def _lettered(lead: str, options: list[str], right: int) -> Document:
    lines = [f"{letter}. {option}" for letter, option in zip(medicine.LETTERS, options, strict=True)]
    return _chat("\n".join([lead, *lines]), medicine.LETTERS[right])


def _find_letter(generator: random.Random) -> Document:
    options = generator.sample(_all_terms(generator), 4)
    right = generator.randrange(4)
    return _lettered(
        generator.choice(("Find {}.", "Where is {}?", "Which line says {}?")).format(options[right]), options, right
    )


def _all_terms(generator: random.Random) -> list[str]:
    kind = generator.choice((*medicine.KINDS, "word"))
    if kind == "word":
        return [*lexicons.talk().things, *lexicons.talk().colours]
    conditions = generator.choice(lexicons.medicine().specialties).conditions
    return [medicine.fact(condition, kind) for condition in conditions]


def _odd_kind(generator: random.Random) -> Document:
    kind, other = generator.sample(tuple(lexicons.talk().kinds.items()), 2)
    options = [generator.choice(kind[1]), *generator.sample(other[1], 3)]
    word = options[0]
    generator.shuffle(options)
    return _lettered(f"Which of these is {kind[0]}?", options, options.index(word))


def _opposite(generator: random.Random) -> Document:
    pair = list(generator.choice(lexicons.talk().opposites))
    generator.shuffle(pair)
    return _chat(f"What is the opposite of {pair[0]}?", pair[1])


def _number_sign(generator: random.Random) -> Document:
    number = generator.choice((generator.randint(-99, 99), 0, generator.randint(-9, 9)))
    answer = "neutral" if number == 0 else "positive" if number > 0 else "negative"
    question = generator.choice(("The charge is {}. Of what kind is it?", "Is {} below, at or above zero in sign?"))
    return _chat(question.format(number), answer)


def _definition(generator: random.Random) -> Document:
    word, meaning = generator.choice(tuple(lexicons.talk().definitions.items()))
    question = generator.choice(("What does {} mean?", "Define {}.", "Explain {} in one sentence."))
    return _chat(question.format(word), meaning)


def _request(generator: random.Random) -> Document:
    words = generator.sample(lexicons.talk().things, generator.randint(2, 4))
    instruction, change = generator.choice(tuple(lexicons.talk().requests.items()))
    return _chat(f"{instruction}: {', '.join(words)}", ", ".join(_CHANGES[change](words)))


def _weekday(generator: random.Random) -> Document:
    index = generator.randrange(len(lexicons.finance().days) - 1)
    turns = _chat(f"Which day comes after {lexicons.finance().days[index]}?", lexicons.finance().days[index + 1])
    return [{"role": "system", "content": "Answer with one word."}, *turns]


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


_CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "repeat": lambda words: words,
    "reverse": lambda words: words[::-1],
    "sort": sorted,
    "first": lambda words: words[:1],
    "last": lambda words: words[-1:],
}
_WEIGHTED: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
    (_news, 20), (_ticker, 26), (_explained_news, 4), (_glossary, 8), (_news_chat, 14), (_textbook, 4), (_case_note, 4),
    (_medical_chat, 4), (_medical_choice, 6), (_find_letter, 6), (_odd_kind, 2), (_opposite, 1), (_number_sign, 1),
    (_request, 2), (_weekday, 1), (_definition, 1),
)  # fmt: skip
_MAKERS: tuple[Callable[[random.Random], Document], ...] = tuple(maker for maker, _ in _WEIGHTED)
_WEIGHTS: tuple[int, ...] = tuple(weight for _, weight in _WEIGHTED)
