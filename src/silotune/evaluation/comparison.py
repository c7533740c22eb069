"""Compares the modes of a grid over seeds: rows of figures, the two claims with their intervals, efficiency, fronts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from silotune.evaluation.metrics import lower_is_better, signed
from silotune.evaluation.observations import QUALITIES, Observation, mean_of_all
from silotune.evaluation.statistics import LEAST_SEEDS, Difference, Sample, describe, holm, paired, pareto_front
from silotune.record.energy import EnergySource, weakest
from silotune.record.grids import Cell

EXTRA = (
    "own", "worst", "base", "majority", "one_class", "forgetting_base", "forgetting_tuned", "personal",
    "aggregation_error",
)  # fmt: skip
CLAIMS: Mapping[str, tuple[str, str]] = {
    "federated − isolated": ("federated", "isolated"),
    "centralised − federated": ("centralized", "federated"),
}
"""A claim's name -> the mode that stands first and the one that is taken from it."""
ALL = "all"
POINTS = 100.0
"""Shares are compared in percentage points."""
LEVEL = 0.05
"""A claim is decided where its corrected p is below."""
MOSTLY = 0.5
"""From this share of models that answer one class only on, what they are better by is no gain of learning."""


@dataclass(frozen=True, slots=True)
class Row:
    """One mode of one combination, over its seeds.

    Attributes:
        task: And ``model``, ``adapter``, ``partition``: names of the grid.
        algorithm: Of the federated mode; empty for a baseline, which has none.
        mode: ``isolated``, ``federated`` or ``centralized``.
        metric: What ranks models of the task.
        seeds: Which were run to the end.
        figures: Figure -> its sample over the seeds; None where a seed lacks it. ``joules`` is among them.
        costs: Cost -> its mean over the seeds; None where a seed lacks it.
        energy_source: The worst of the seeds'.
        per_class: Class -> mean F1 over the seeds.
    """

    task: str
    model: str
    adapter: str
    partition: str
    algorithm: str
    mode: str
    metric: str
    seeds: tuple[int, ...]
    figures: Mapping[str, Sample | None]
    costs: Mapping[str, float | None]
    energy_source: EnergySource
    per_class: Mapping[str, float]

    @property
    def main(self) -> Sample | None:
        """The figure that ranks models of the task."""
        return self.figures[self.metric]


@dataclass(frozen=True, slots=True)
class Claim:
    """One paired comparison of two modes over the seeds that both have.

    Attributes:
        name: A key of ``CLAIMS``.
        task: And ``model``, ``adapter``, ``algorithm``, ``partition``: names of the grid, or ``ALL``, the mean.
        metric: Shares are in percentage points; ``ALL`` where tasks of several metrics are averaged.
        seeds: Those that both modes have.
        difference: None with fewer than ``LEAST_SEEDS`` seeds: then nothing is claimed.
        one_class: Of both modes, the share of models that answer one class only.
        p_holm: p after Holm's correction over all claims of the same level.
    """

    name: str
    task: str
    model: str
    adapter: str
    algorithm: str
    partition: str
    metric: str
    seeds: tuple[int, ...]
    difference: Difference | None
    one_class: tuple[float, float] = (0.0, 0.0)
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``open`` for the mode that stands first, by the corrected p; ``none`` without one.

        ``constant`` where most models of the better mode answer one class only.
        """
        if self.difference is None or self.p_holm is None:
            return "none"
        if self.p_holm >= LEVEL:
            return "open"
        is_better = (self.difference.sample.mean > 0) != lower_is_better(self.metric)
        if self.one_class[0 if is_better else 1] >= MOSTLY:
            return "constant"
        return "better" if is_better else "worse"


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a federated row gained over the untrained model for what it spent; None where a part is unavailable.

    ``gain`` is in points (of perplexity: how much lower it is); ``on_front`` says for a cost whether no other adapter
    or algorithm is as cheap and as good on the same task, model and partition.
    """

    row: Row
    gain: float | None
    per_kilojoule: float | None
    per_megabyte: float | None
    per_thousand_parameters: float | None
    on_front: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that a report of a grid says in numbers."""

    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    summaries: tuple[Claim, ...]
    efficiency: tuple[Efficiency, ...]
    observations: tuple[Observation, ...] = field(repr=False)


def compare(observations: Sequence[Observation]) -> Comparison:
    """The comparison of all modes that were observed."""
    rows = [_row(group) for group in _groups(observations, _row_key).values()]
    return Comparison(
        rows=tuple(rows),
        claims=_corrected(_claims(observations)),
        summaries=_corrected(_summaries(observations)),
        efficiency=_efficiency(rows),
        observations=tuple(observations),
    )


def scale(metric: str) -> float:
    """The factor that turns a figure into the unit in which it is compared."""
    return 1.0 if lower_is_better(metric) else POINTS


def _groups(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _row_key(seen: Observation) -> tuple[str, ...]:
    cell = seen.cell
    return (cell.task, cell.model, cell.adapter, cell.partition, _algorithm(cell, seen.mode), seen.mode)


def _algorithm(cell: Cell, mode: str) -> str:
    """The algorithm of the federated mode; a baseline has none and serves every algorithm."""
    return cell.algorithm if mode == "federated" else ""


def _place(cell: Cell, mode: str) -> tuple[str | int, ...]:
    return (mode, cell.task, cell.model, cell.adapter, _algorithm(cell, mode), cell.partition, cell.seed)


def _row(group: Sequence[Observation]) -> Row:
    task, model, adapter, partition, algorithm, mode = _row_key(group[0])
    return Row(
        task, model, adapter, partition, algorithm, mode,
        metric=group[0].metric,
        seeds=tuple(seen.cell.seed for seen in group),
        figures={name: _sample([seen.quality.get(name) for seen in group]) for name in (*QUALITIES, *EXTRA)}
        | {"joules": _sample([seen.cost.get("joules") for seen in group])},
        costs={name: mean_of_all([seen.cost.get(name) for seen in group]) for name in group[0].cost},
        energy_source=weakest(seen.energy_source for seen in group),
        per_class={
            name: statistics.fmean(seen.per_class[name] for seen in group)
            for name in group[0].per_class
            if all(name in seen.per_class for seen in group)
        },
    )  # fmt: skip


def _sample(values: Sequence[float | None]) -> Sample | None:
    known = [value for value in values if value is not None]
    return describe(known) if known and len(known) == len(values) else None


# --- claims ----------------------------------------------------------------------------------------------------------

_Key = tuple[str, str, str, str, str]
_Values = dict[int, tuple[float, ...]]
"""Seed -> the figures of the mode that stands first and of the other, in the unit of comparison, and of each the share
of models that answer one class only."""


def _pairs(observations: Sequence[Observation], name: str) -> dict[_Key, tuple[str, _Values]]:
    """(task, model, adapter, algorithm, partition) -> metric and figures by seed; baselines serve every algorithm."""
    first, second = CLAIMS[name]
    known: dict[tuple[str | int, ...], tuple[float, float]] = {}
    for seen in observations:
        cell, value = seen.cell, seen.quality.get(seen.metric)
        if value is not None:
            known[_place(cell, seen.mode)] = (scale(seen.metric) * value, seen.quality.get("one_class") or 0.0)
    pairs: dict[_Key, tuple[str, _Values]] = {}
    for seen in observations:
        if seen.mode != "federated":
            continue
        cell = seen.cell
        if _place(cell, first) in known and _place(cell, second) in known:
            key = (cell.task, cell.model, cell.adapter, cell.algorithm, cell.partition)
            values = pairs.setdefault(key, (seen.metric, {}))[1]
            both = zip(known[_place(cell, first)], known[_place(cell, second)], strict=True)
            values[cell.seed] = tuple(itertools.chain.from_iterable(both))
    return pairs


def _claims(observations: Sequence[Observation]) -> list[Claim]:
    return [
        _claim(name, key, metric, values)
        for name in CLAIMS
        for key, (metric, values) in _pairs(observations, name).items()
    ]


def _summaries(observations: Sequence[Observation]) -> list[Claim]:
    """Means over adapters for each task, model, algorithm and partition, then over everything for each algorithm.

    Figures of one seed hang together (the same data and partition), so they are averaged first: a seed counts once.
    """
    found = []
    for name in CLAIMS:
        pairs = _pairs(observations, name)
        groups = _groups(pairs.items(), lambda item: (item[0][0], item[0][1], item[0][3], item[0][4], item[1][0]))
        for (task, model, algorithm, partition, metric), group in groups.items():
            values = _averaged([values for _, (_, values) in group])
            found.append(_claim(name, (task, model, ALL, algorithm, partition), metric, values))
        for algorithm in dict.fromkeys(key[3] for key in pairs):
            own = [pair for key, pair in pairs.items() if key[3] == algorithm and not lower_is_better(pair[0])]
            if own and len([key for key in groups if key[2] == algorithm]) > 1:
                metrics = {metric for metric, _ in own}
                metric = metrics.pop() if len(metrics) == 1 else ALL
                averaged = _averaged([values for _, values in own])
                found.append(_claim(name, (ALL, ALL, ALL, algorithm, ALL), metric, averaged))
    return found


def _averaged(parts: Sequence[_Values]) -> _Values:
    """Means by seed, over the seeds that every part has."""
    seeds = set.intersection(*(set(part) for part in parts))
    return {
        seed: tuple(statistics.fmean(column) for column in zip(*(part[seed] for part in parts), strict=True))
        for seed in sorted(seeds)
    }


def _claim(name: str, key: _Key, metric: str, values: _Values) -> Claim:
    task, model, adapter, algorithm, partition = key
    enough = len(values) >= LEAST_SEEDS
    left, right = [pair[0] for pair in values.values()], [pair[1] for pair in values.values()]
    return Claim(
        name, task, model, adapter, algorithm, partition,
        metric=metric, seeds=tuple(values), difference=paired(left, right) if enough else None,
        one_class=(_mean(values, 2), _mean(values, 3)),
    )  # fmt: skip


def _mean(values: _Values, place: int) -> float:
    return statistics.fmean(own[place] for own in values.values()) if values else 0.0


def _corrected(claims: Sequence[Claim]) -> tuple[Claim, ...]:
    """The claims, with Holm's correction over all of them that have a p."""
    tested = [place for place, claim in enumerate(claims) if claim.difference and claim.difference.p is not None]
    adjusted = holm([claims[place].difference.p for place in tested])  # type: ignore[union-attr,misc]
    known = dict(zip(tested, adjusted, strict=True))
    return tuple(replace(claim, p_holm=known.get(place)) for place, claim in enumerate(claims))


# --- efficiency ------------------------------------------------------------------------------------------------------

FRONT_COSTS = ("joules", "bytes")


def _efficiency(rows: Sequence[Row]) -> tuple[Efficiency, ...]:
    federated = [row for row in rows if row.mode == "federated"]
    fronts: dict[tuple[int, str], bool] = {}
    for group in _groups(federated, lambda row: (row.task, row.model, row.partition)).values():
        for cost in FRONT_COSTS:
            for row, is_on in zip(*_front(group, cost), strict=True):
                fronts[id(row), cost] = is_on
    return tuple(
        _efficiency_of(row, {cost: fronts.get((id(row), cost), False) for cost in FRONT_COSTS}) for row in federated
    )


def _front(rows: Sequence[Row], cost: str) -> tuple[list[Row], list[bool]]:
    """The rows whose cost and figure are known, and which of them stand on the front."""
    known = [row for row in rows if row.costs.get(cost) is not None and row.main is not None]
    points = [(row.costs[cost] or 0.0, _higher_is_better(row)) for row in known]
    return known, pareto_front(points)


def _higher_is_better(row: Row) -> float:
    assert row.main is not None
    return signed(row.metric, row.main.mean)


def _efficiency_of(row: Row, on_front: Mapping[str, bool]) -> Efficiency:
    base, main = row.figures["base"], row.main
    gain = None
    if base is not None and main is not None:
        gain = signed(row.metric, scale(row.metric) * (main.mean - base.mean))

    def per(cost: str, unit: float) -> float | None:
        spent = row.costs.get(cost)
        return gain / (spent / unit) if gain is not None and spent else None

    return Efficiency(row, gain, per("joules", 1e3), per("bytes", 1e6), per("trainable_parameters", 1e3), on_front)
