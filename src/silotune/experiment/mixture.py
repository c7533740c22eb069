"""Scores a mixture of tasks: each on its own examples, and all of them in one figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from silotune.structs import Tensors


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
        """The same on each client's own share; ``num_examples`` 0 alone where no task in it has the metric."""
        found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in shares}
        for task, scorer in self.parts.items():
            local = {place: index for index, place in enumerate(self.places[task])}
            own = {name: [local[place] for place in share if place in local] for name, share in shares.items()}
            for name, figures in scorer.by_client(weights, own).items():
                if figures["num_examples"]:
                    found[name][task] = figures
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
