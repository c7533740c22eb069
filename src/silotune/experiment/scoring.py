"""Scores adapters on a set of examples: one task, a mixture of tasks, each client's share, and a general text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from silotune.config import Config
from silotune.data.load import Dataset, read_whole
from silotune.data.rows import SPLITS, Task
from silotune.errors import DataError
from silotune.evaluation.evaluate import Answers, answers, figures
from silotune.evaluation.forgetting import EMBEDDED, general_text, perplexity, windows
from silotune.experiment.examples import Places, encoded_apart, notes_of, spread
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.load import Base
from silotune.settings.sections import EvaluationSection
from silotune.structs import Example, Tensors
from silotune.tensors import digest
from silotune.training.encode import Encoded
from silotune.training.objectives import Encode, encoder_of

FORGETTING_WINDOW = 512
"""Tokens of general text that are read together at most."""


FORGETTING_TOKENS_A_PASS = 2048
"""Every one of them has a row of logits over the vocabulary: they are what bounds memory."""


@dataclass
class Scorer:
    """Scores adapter tensors on one set of examples, and remembers what it has scored.

    Attributes:
        adapted: The resident model.
        examples: The set.
        split: Its name, as it stands in results.
        labels: The options' names; empty for open answers.
        settings: The ``[evaluation]`` section.
        known: Metrics by digest of the scored tensors.
        answers: What the model said to each example, by the same.
    """

    adapted: Adapted
    examples: Sequence[Encoded]
    split: str
    labels: Sequence[str]
    settings: EvaluationSection
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)

    def __call__(self, weights: Tensors) -> dict[str, Any]:
        """Metrics of the model with these adapter tensors."""
        key = digest(weights)
        if key not in self.known:
            adapters.write(self.adapted, weights)
            self.answers[key] = answers(
                self.adapted,
                self.examples,
                labels=self.labels,
                batch_size=self.settings.batch_size,
                scoring=self.settings.scoring,
                max_new_tokens=self.settings.max_new_tokens,
                start_margins=next((known.start_margins for known in self.answers.values()), ()),
            )
            made = figures(self.answers[key], bootstrap_samples=self.settings.bootstrap_samples)
            self.known[key] = {"split": self.split, **made}
        return dict(self.known[key])

    def by_client(self, weights: Tensors, shares: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        """Figures on each client's own share of the set, from the same answers: nothing is scored again.

        Without intervals and bins: a share can be small. A client whose share is empty has only ``num_examples`` 0.
        """
        self(weights)
        answered = self.answers[digest(weights)]
        left_out = ("scoring", "reliability")
        made = {name: figures(answered.of(share)) if share else {"num_examples": 0} for name, share in shares.items()}
        return {name: {key: own[key] for key in own if key not in left_out} for name, own in made.items()}


@dataclass
class Forgetting:
    """Perplexity of adapter tensors on a general text, against that of the base; remembers what it has scored.

    Attributes:
        adapted: The resident model.
        source: The text, as it stands in results.
        text: Its windows.
        initial: Adapter tensors that leave the base as it is.
        batch_size: Windows a forward pass.
        known: Perplexity by digest of the scored tensors.
    """

    adapted: Adapted
    source: str
    text: Sequence[Encoded]
    initial: Tensors
    batch_size: int
    known: dict[str, float] = field(default_factory=dict)

    def __call__(self, weights: Tensors) -> dict[str, Any]:
        """Both perplexities, and by what factor the tuned model's is higher."""
        base, tuned = self._perplexity(self.initial), self._perplexity(weights)
        return {
            "text": self.source,
            "num_tokens": sum(len(window.answer) for window in self.text),
            "base_perplexity": base,
            "tuned_perplexity": tuned,
            "ratio": tuned / base,
        }

    def _perplexity(self, weights: Tensors) -> float:
        key = digest(weights)
        if key not in self.known:
            adapters.write(self.adapted, weights)
            self.known[key] = perplexity(self.adapted, self.text, batch_size=self.batch_size)
        return self.known[key]


def scorer_of(
    config: Config, adapted: Adapted, dataset: Dataset, examples: Sequence[Example], *, name: str
) -> tuple[SetScorer, Places, str | None]:
    """Scores on the examples of a set; for a mixture, one scorer a task.

    Returns:
        The scorer, the places of each example among the encoded ones, and a note on those that were cut, were left out
        or spell control marks.
    """
    encoded, places = encoded_apart(encoder_for(config, adapted.base), examples)
    note = "; ".join(notes_of(encoded, places, name, truncate=config.data.truncate)) or None
    alone = Scorer(adapted, encoded, name, closed_labels(dataset.task), config.evaluation)
    if not dataset.tasks:
        return alone, places, note
    parts, own_places = {}, {}
    for task in dataset.tasks:
        share = [number for number, example in enumerate(examples) if example.fields["task"] == task.name]
        if share:
            own_places[task.name] = spread(share, places)
            chosen = [encoded[place] for place in own_places[task.name]]
            parts[task.name] = replace(alone, examples=chosen, labels=closed_labels(task), known={}, answers={})
    return MixtureScorer(parts, own_places, dataset.task.metric, name), places, note


def encoder_for(config: Config, base: Base) -> Encode:
    """The encoder that turns a run's examples into ids for its model."""
    training = config.training
    return encoder_of(base, training.objective, max_length=config.model.max_length, truncate=config.data.truncate)


def forgetting_of(config: Config, adapted: Adapted, initial: Tensors) -> Forgetting | None:
    """The scorer of a general text before and after training; None where the configuration names no text."""
    settings = config.evaluation
    if not settings.forgetting:
        return None
    length = min(config.model.max_length, FORGETTING_WINDOW)
    source = general_text(settings.forgetting)
    text = windows(adapted, source, max_tokens=settings.forgetting_tokens, max_length=length)
    name = settings.forgetting if settings.forgetting == EMBEDDED else Path(settings.forgetting).name
    batch_size = max(1, min(settings.batch_size, FORGETTING_TOKENS_A_PASS // length))
    return Forgetting(adapted, name, text, initial, batch_size)


def closed_labels(task: Task) -> tuple[str, ...]:
    """Names of the classes that a task's examples are scored over; empty for open answers."""
    return tuple(task.options)


def scored_examples(config: Config, dataset: Dataset, name: str) -> tuple[Sequence[Example], list[str]]:
    """The examples that ``evaluation.gold`` or ``evaluation.selection`` names: a split, or a file; and notes on a file.

    Raises:
        DataError: It is neither, or holds nothing.
    """
    if name in dataset.splits:
        examples: Sequence[Example] = dataset.splits[name]
        notes: list[str] = []
    elif Path(name).suffix:
        examples, notes = read_whole(name, dataset.task, config.data)
    else:
        remedy = f": set data.{name} to a file of them" if name in SPLITS else ""
        if name == "validation":
            remedy += "; without evaluation.keep = 'best', patience and target, no validation examples are needed"
        raise DataError(f"{name!r} is neither a split that is there ({', '.join(dataset.splits)}) nor a file{remedy}")
    if not examples:
        raise DataError(f"{name!r} holds no examples to evaluate on")
    most = min(config.evaluation.max_examples or len(examples), len(examples))
    picked = [examples[place * len(examples) // most] for place in range(most)]  # from all: it may be sorted
    return picked, [*notes, *_absent(dataset.task, picked, name)]


def _absent(task: Task, examples: Sequence[Example], name: str) -> list[str]:
    """A note on classes that no scored example is of: whoever never gives them loses nothing by it."""
    there = {example.answer for example in examples}
    absent = [option for option in task.options if option not in there] if task.answer == "label" else []
    if not absent:
        return []
    shown = ", ".join(map(repr, absent[:_LISTED_CLASSES])) + (", ..." if len(absent) > _LISTED_CLASSES else "")
    return [
        f"{name}: no example is {shown} ({len(absent)} of {len(task.options)} classes): figures of this set do not say "
        "how well they are told apart"
    ]


_LISTED_CLASSES: Final = 5


class SetScorer(Protocol):
    """Scores adapter tensors on one set of examples."""

    @property
    def labels(self) -> Sequence[str]:
        """The options' names; empty for open answers and for several tasks."""

    def __call__(self, weights: Tensors) -> dict[str, Any]:
        """Metrics of the model with these adapter tensors."""

    def by_client(self, weights: Tensors, shares: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        """Figures on each client's own share of the set."""


@dataclass(frozen=True)
class MixtureScorer:
    """One scorer a task, and the places of its examples among those of all.

    Attributes:
        parts: Task -> its scorer.
        places: Task -> places of its examples.
        metric: The headline's.
        split: Name of the set.
    """

    parts: Mapping[str, SetScorer]
    places: Mapping[str, Sequence[int]]
    metric: str
    split: str

    @property
    def labels(self) -> Sequence[str]:
        """The tasks have their own."""
        return ()

    def __call__(self, weights: Tensors) -> dict[str, Any]:
        """``by_task``, and over the tasks that have the headline's metric the plain mean of each figure."""
        figures = {name: scorer(weights) for name, scorer in self.parts.items()}
        by_task = {name: {key: own[key] for key in own if key != "split"} for name, own in figures.items()}
        return {"split": self.split, **together(by_task, self.metric), "by_task": by_task}

    def by_client(self, weights: Tensors, shares: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        """The same on each client's own share; only ``num_examples`` 0 where no task in it has the metric."""
        found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in shares}
        for task, scorer in self.parts.items():
            local = {place: index for index, place in enumerate(self.places[task])}
            own = {name: [local[place] for place in share if place in local] for name, share in shares.items()}
            for name, scored in scorer.by_client(weights, own).items():
                if scored["num_examples"]:
                    found[name][task] = scored
        return {name: together(by_task, self.metric) for name, by_task in found.items()}


def together(by_task: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Examples of all tasks, and the plain mean of each figure over the tasks that have the metric."""
    scored = [figures for figures in by_task.values() if metric in figures]
    if not scored:
        return {"num_examples": 0}
    names = [
        key
        for key, value in scored[0].items()
        if isinstance(value, float) and all(isinstance(figures.get(key), float) for figures in scored)
    ]
    means = {key: statistics.fmean(figures[key] for figures in scored) for key in names}
    return {"num_examples": sum(figures["num_examples"] for figures in by_task.values()), **means}
