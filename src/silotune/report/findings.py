"""Says in plain sentences what the numbers of a grid show, whichever way they point."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.evaluation.comparison import ALL, CLAIMS, POINTS, Claim, Comparison, Row, scale
from silotune.evaluation.metrics import lower_is_better
from silotune.evaluation.observations import Observation
from silotune.evaluation.statistics import LEAST_SEEDS, paired

GAIN, PRICE = CLAIMS
_CHANCE_POINTS = 3.0
_SENTENCES: Mapping[tuple[str, str], str] = {
    (GAIN, "better"): "{where}: learning together beats learning alone by {size} ({interval}).",
    (GAIN, "worse"): "{where}: learning together is worse than learning alone by {size} ({interval}).",
    (GAIN, "open"): "{where}: learning together in place of alone changes the figure by {signed}, which the seeds do "
    "not decide ({interval}).",
    (GAIN, "constant"): "{where}: learning together and alone differ by {size}, but most models of the better mode "
    "answer one class only: that is no gain of learning ({interval}).",
    (
        PRICE,
        "better",
    ): "{where}: pooling everybody's text would still be better than federation by {size} ({interval}).",
    (PRICE, "worse"): "{where}: federation beats even the pooled text, by {size} ({interval}).",
    (PRICE, "open"): "{where}: pooling the text in place of federation changes the figure by {signed}, which the seeds "
    "do not decide ({interval}).",
    (PRICE, "constant"): "{where}: pooling the text and federation differ by {size}, but most models of the better "
    "mode answer one class only: that is no gain of learning ({interval}).",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What else is known of a grid: how many cells it has, how many failed, its budget, cells run side by side."""

    cells: int
    failed: int
    missing: int
    budget_bytes: float | None
    most_jobs: int


def findings(comparison: Comparison, facts: Facts) -> list[str]:
    """The findings, the most general first."""
    return [
        *_completeness(facts),
        *_claims(comparison),
        *_corrected(comparison),
        *_chance(comparison.rows),
        *_adapters(comparison),
        *_budget(comparison.rows, facts),
        *_energy(comparison.rows, facts),
    ]


def points(value: float, metric: str, *, sign: str = "") -> str:
    """A difference in the unit of its metric; ``sign`` "+" shows that of a gain, too."""
    unit = "of perplexity" if lower_is_better(metric) else f"points of {_METRICS.get(metric, metric)}"
    return f"{value:{sign}.1f} {unit}"


_METRICS: Mapping[str, str] = {
    "macro_f1": "macro-F1",
    "preference_accuracy": "preference accuracy",
    ALL: "the tasks' own metrics",
}


def _completeness(facts: Facts) -> Iterator[str]:
    if facts.failed or facts.missing:
        yield (
            f"{facts.failed + facts.missing} of {facts.cells} cells have no result ({facts.failed} failed, "
            f"{facts.missing} not run yet): the figures below are of the others."
        )


def _claims(comparison: Comparison) -> Iterator[str]:
    claims = sorted(comparison.summaries, key=lambda claim: claim.task != ALL)
    if not claims:
        yield "No combination has both a federated model and a baseline: nothing is compared."
        return
    silent = [claim for claim in claims if claim.verdict == "none"]
    if silent:
        fewest = min(len(claim.seeds) for claim in silent)
        yield (
            f"{len(silent)} of {len(claims)} comparisons have fewer than {LEAST_SEEDS} seeds (the fewest {fewest}): "
            "nothing is claimed about them."
        )
    for name in CLAIMS:
        for claim in claims:
            if claim.name == name and claim.verdict != "none":
                yield _sentence(claim)


def _sentence(claim: Claim) -> str:
    assert claim.difference is not None and claim.p_holm is not None
    mean = claim.difference.sample.mean
    p = "p below 0.001" if claim.p_holm < 0.001 else f"p = {claim.p_holm:.3f}"
    interval = (
        f"95 % interval {claim.difference.low:+.1f} to {claim.difference.high:+.1f}, {p} after Holm's correction, "
        f"{len(claim.seeds)} seeds"
    )
    signed = points(mean, claim.metric, sign="+")
    words = _SENTENCES[claim.name, claim.verdict]
    return words.format(where=_where(claim), size=points(abs(mean), claim.metric), signed=signed, interval=interval)


def _where(claim: Claim) -> str:
    if claim.task == ALL:
        return f"On average over all tasks, partitions and adapters, with {claim.algorithm}"
    return f"On {claim.task} with {claim.model}, {claim.partition}, {claim.algorithm}"


def _corrected(comparison: Comparison) -> Iterator[str]:
    tested = [claim for claim in comparison.claims if claim.p_holm is not None]
    if not tested:
        return
    for name in CLAIMS:
        own = [claim for claim in tested if claim.name == name]
        small = sum((claim.p_holm or 0.0) < 0.05 for claim in own)
        yield (
            f'Of the {len(own)} single rows "{name}", {small} {"has" if small == 1 else "have"} p below 0.05 after '
            f"Holm's correction over all {len(tested)} tests of the table."
        )


def _chance(rows: Sequence[Row]) -> Iterator[str]:
    """Tasks that even the pooled text taught no adapter: there, differences between modes say nothing."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.mode == "centralized" and row.metric == "accuracy" and row.per_class and row.main is not None:
            place = (row.task, row.model, row.partition)
            known = best.get(place)
            if known is None or known.main is None or row.main.mean > known.main.mean:
                best[place] = row
    for (task, model, partition), row in best.items():
        majority = row.figures["majority"]
        chance = 1 / len(row.per_class) if majority is None else majority.mean
        how = "guessing" if majority is None else "always giving the most frequent answer"
        if row.main is not None and POINTS * (row.main.mean - chance) < _CHANCE_POINTS:
            yield (
                f"On {task} with {model}, {partition}, even the best pooled training ({row.adapter}) answers "
                f"{POINTS * row.main.mean:.1f} % right, where {how} gives {POINTS * chance:.1f} %: this model "
                "cannot do the task, and differences between the modes mean nothing there."
            )


def _adapters(comparison: Comparison) -> Iterator[str]:
    """Each adapter against the grid's first one, averaged over what both were run on."""
    rows = comparison.rows
    federated = {(row.task, row.model, row.partition, row.algorithm, row.adapter): row for row in rows
                 if row.mode == "federated" and row.main is not None}  # fmt: skip
    adapters = list(dict.fromkeys(key[-1] for key in federated))
    for other in adapters[1:]:
        pairs = [
            (row, federated[*key[:-1], adapters[0]])
            for key, row in federated.items()
            if key[-1] == other and (*key[:-1], adapters[0]) in federated
        ]
        pairs = [pair for pair in pairs if not lower_is_better(pair[0].metric)]
        if pairs:
            yield _adapter_sentence(other, adapters[0], pairs, comparison.observations)


def _adapter_sentence(
    other: str, first: str, pairs: Sequence[tuple[Row, Row]], observations: Sequence[Observation]
) -> str:
    change = statistics.fmean(
        scale(a.metric) * (a.main.mean - b.main.mean) for a, b in pairs if a.main is not None and b.main is not None
    )
    ratios = [text for cost, noun in _ADAPTER_COSTS if (text := _ratio(noun, _by_seed(cost, pairs, observations)))]
    metrics = {a.metric for a, _ in pairs}
    size = points(abs(change), metrics.pop() if len(metrics) == 1 else ALL)
    direction = "as good as" if abs(change) < 0.05 else f"{size} {'better' if change > 0 else 'worse'} than"
    costs = f"; it takes {', '.join(ratios)}" if ratios else ""
    algorithms = ", ".join(dict.fromkeys(a.algorithm for a, _ in pairs))
    return f"{other} is {direction} {first} on average of the federated models ({algorithms}){costs}."


_ADAPTER_COSTS = (
    ("bytes", "the bytes"),
    ("joules", "the energy"),
    ("seconds", "the time"),
    ("peak_memory_bytes", "the peak memory"),
)


_Costs = tuple[float | None, float | None]


def _by_seed(
    cost: str, pairs: Sequence[tuple[Row, Row]], observations: Sequence[Observation]
) -> dict[int, list[_Costs]]:
    """Seed -> what the runs of both adapters took, for each pair of rows that has the seed."""
    taken = {
        (seen.cell.task, seen.cell.model, seen.cell.adapter, seen.cell.partition, seen.cell.algorithm, seen.cell.seed):
        seen.cost.get(cost) for seen in observations if seen.mode == "federated"
    }  # fmt: skip
    found: dict[int, list[_Costs]] = {}
    for pair in pairs:
        left, right = ((row.task, row.model, row.adapter, row.partition, row.algorithm) for row in pair)
        for seed in set(pair[0].seeds) & set(pair[1].seeds):
            found.setdefault(seed, []).append((taken[*left, seed], taken[*right, seed]))
    return found


def _ratio(noun: str, taken: Mapping[int, Sequence[_Costs]]) -> str:
    """The mean over the seeds, with Student's interval where they differ; empty where a run's cost is not known."""
    ratios = []
    for own in taken.values():
        known = [a / b for a, b in own if a is not None and b]
        if len(known) < len(own):
            return ""
        ratios.append(statistics.fmean(known))
    if not ratios:
        return ""
    found = paired(ratios, [0.0] * len(ratios))
    text = f"{found.sample.mean:.2f} times {noun}"
    ends = "" if found.low is None or found.high is None else f"{found.low:.2f} to {found.high:.2f}"
    if len(ratios) < LEAST_SEEDS or len({f"{ratio:.2f}" for ratio in ratios}) == 1:
        return text
    return f"{text} (95 % interval {ends})"


def _budget(rows: Sequence[Row], facts: Facts) -> Iterator[str]:
    if facts.budget_bytes is None:
        return
    megabytes = facts.budget_bytes / 2**20
    sent = [(row, row.costs.get("bytes") or 0.0) for row in rows if row.mode == "federated"]
    over = [row for row, number in sent if number > facts.budget_bytes]
    if over:
        names = "; ".join(f"{row.task}, {row.model}, {row.adapter}, {row.partition}" for row in over)
        yield f"{len(over)} of {len(sent)} federated rows send more than the budget of {megabytes:,.0f} MB: {names}."
    elif sent:
        most = max(number for _, number in sent) / 2**20
        yield f"All federated rows keep to the budget of {megabytes:,.0f} MB; the most sent is {most:,.1f} MB."


def _energy(rows: Sequence[Row], facts: Facts) -> Iterator[str]:
    sources: Mapping[str, Any] = {row.energy_source: None for row in rows}
    if "unavailable" in sources:
        yield 'Energy was not measured in every run: where it says "unavailable", no figure is put in its place.'
    elif "estimated" in sources:
        yield 'Energy is estimated from a model of the machine, not measured, wherever it says "estimated".'
    if facts.most_jobs > 1:
        yield (
            f"Up to {facts.most_jobs} cells ran side by side: seconds and energy of a cell include what its neighbours "
            "took from the machine."
        )
