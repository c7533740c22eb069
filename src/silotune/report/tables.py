"""The tables of a grid's report, as text cells that every form of the report shares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.evaluation.comparison import POINTS, Claim, Comparison, Row, scale
from silotune.evaluation.observations import Observation
from silotune.evaluation.statistics import Sample
from silotune.record.grids import Cell, GridFolder
from silotune.report.figures import MODE_TITLES
from silotune.report.runs import KINDS, Kind, bytes_text, kinds_of, seconds_text

UNAVAILABLE = "unavailable"
NO_CLAIM = "no claim: fewer than 3 seeds"


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table: its anchor, its heading, a note on how to read it, column headings and rows.

    Attributes:
        words: How many columns at the left hold words; the others hold numbers and stand to the right.
    """

    name: str
    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int


def tables(folder: GridFolder, comparison: Comparison) -> list[TextTable]:
    """All tables of the report that have a row."""
    made = [
        _study(comparison.rows),
        _claims("summary-claims", "The two claims, over all adapters", comparison.summaries),
        _claims("claims", "The two claims, row by row", comparison.claims),
        _privacy(comparison.rows),
        _quality(comparison.rows),
        _classes(comparison.rows),
        _costs(comparison.rows),
        _efficiency(comparison),
        _tuning(folder.tuning()),
        _missing(folder),
    ]
    return [table for table in made if table.rows]


def _percent(sample: Sample | None, metric: str) -> str:
    """Mean and deviation in the figure's unit."""
    if sample is None:
        return UNAVAILABLE
    unit = scale(metric)
    deviation = "" if sample.deviation is None else f" ± {unit * sample.deviation:.1f}"
    return f"{unit * sample.mean:.1f}{deviation}"


def _study(rows: Sequence[Row]) -> TextTable:
    """One line a model, partition, adapter and mode; two columns a data set."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    shown = {
        row.task: [kind for kind in kinds_of(row.metric) if kind.is_share or kind.key == row.metric] for row in rows
    }
    private = {row.task for row in rows if row.costs.get("delta") is not None}
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row.model, row.partition, row.adapter, MODE_TITLES[row.mode], row.algorithm)
        lines.setdefault(key, {})[row.task] = row
    heads = ["model", "partition", "adapter", "trained", "algorithm"]
    for task in tasks:
        heads += [f"{task}: {kind.title}" for kind in shown[task]]
        heads += [f"{task}: epsilon"] if task in private else []
    orders = [list(dict.fromkeys(key[place] for key in lines)) for place in range(3)]
    titles = list(MODE_TITLES.values())

    def rank(key: tuple[str, ...]) -> tuple[int, ...]:
        return (*(order.index(name) for order, name in zip(orders, key, strict=False)), titles.index(key[3]))

    body: list[tuple[str, ...]] = []
    for place in sorted(lines, key=rank):
        cells: list[str] = list(place)
        for task in tasks:
            found = lines[place].get(task)
            texts = ["-" if found is None else _percent(found.figures[kind.key], kind.key) for kind in shown[task]]
            cells += [f"{texts[0]}{_one_class(found)}", *texts[1:]]
            cells += [_epsilon(found)] if task in private else []
        body.append(tuple(cells))
    body += _majority(rows, shown, private)
    note = (
        "Per cent (perplexity as it is): mean ± standard deviation over seeds, on the common test set. The majority "
        "class is what always giving the most frequent answer would reach in the task's own metric."
    )
    return TextTable("results", "Results by data set", note, tuple(heads), tuple(body), 5)


def _one_class(row: Row | None) -> str:
    """What is said beside the figure of models that give one answer to all; empty where none does."""
    found = None if row is None else row.figures["one_class"]
    if found is None or not found.mean:
        return ""
    return " (one class only)" if found.mean == 1 else f" ({POINTS * found.mean:.0f} % answer one class only)"


def _majority(
    rows: Sequence[Row], shown: Mapping[str, Sequence[Kind]], private: Iterable[str]
) -> list[tuple[str, ...]]:
    """The line of the answer that is always the same; none where no task has classes."""
    known = {row.task: row for row in rows if row.figures["majority"] is not None}
    cells = ["all", "all", "none", "majority class", ""]
    for task, kinds in shown.items():
        row = known.get(task)
        own = None if row is None else row.figures["majority"]
        cells += ["-" if row is None or kind.key != row.metric else _percent(own, kind.key) for kind in kinds]
        cells += ["-"] if task in private else []
    return [tuple(cells)] if known else []


def _epsilon(row: Row | None) -> str:
    """What was spent; ``?`` where only the sites know."""
    if row is None or row.costs.get("delta") is None:
        return "-"
    value = row.costs.get("epsilon")
    return "?" if value is None else f"{value:.3g}"


def _privacy(rows: Sequence[Row]) -> TextTable:
    """Rows under differential privacy, with what they cost and what they reached."""
    note = (
        "Epsilon spent (mean over seeds) at this delta, and the figure that ranks models on the common test set: mean "
        "± standard deviation over seeds. Smaller epsilon protects more; what it protects is said above."
    )
    body = (
        (
            *_where(row),
            KINDS[row.metric].title,
            _epsilon(row),
            f"{row.costs.get('delta'):g}",
            _percent(row.main, row.metric),
        )
        for row in rows
        if row.costs.get("delta") is not None
    )
    heads = (*_WHERE, "metric", "epsilon", "delta", "reached")
    return TextTable("privacy", "Epsilon and what was reached", note, heads, tuple(body), 7)


def _claims(name: str, title: str, claims: Sequence[Claim]) -> TextTable:
    heads = (
        "difference", "task", "model", "adapter", "algorithm", "partition", "reading", "mean", "Student 95 %",
        "p", "p (Holm)", "bootstrap 95 %", "sd", "seeds",
    )  # fmt: skip
    note = (
        "Paired differences, seed by seed, in percentage points of the task's own metric (of perplexity as it is). "
        "p is of Student's paired t test, Holm-corrected over all rows of this table; the reading goes by the "
        "corrected p, below 0.05. With three seeds the bootstrap interval is merely the range of the seeds and too "
        "narrow."
    )
    return TextTable(name, title, note, heads, tuple(_claim(claim) for claim in claims), 7)


_READINGS = {"better": "first is better", "worse": "first is worse", "open": "not decided",
             "constant": "the better one answers one class", "none": NO_CLAIM}  # fmt: skip


def _claim(claim: Claim) -> tuple[str, ...]:
    where = (claim.name, claim.task, claim.model, claim.adapter, claim.algorithm, claim.partition)
    found = claim.difference
    if found is None:
        return (*where, NO_CLAIM, *("-",) * 6, str(len(claim.seeds)))
    sample = found.sample
    return (
        *where,
        _READINGS[claim.verdict],
        f"{sample.mean:+.1f}",
        "-" if found.low is None or found.high is None else f"{found.low:+.1f} to {found.high:+.1f}",
        _p(found.p),
        _p(claim.p_holm),
        f"{sample.low:+.1f} to {sample.high:+.1f}",
        _number(sample.deviation, ".1f"),
        str(sample.count),
    )


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None, form: str) -> str:
    return UNAVAILABLE if value is None else format(value, form)


def _where(row: Row) -> tuple[str, ...]:
    return (row.task, row.model, row.partition, row.adapter, MODE_TITLES[row.mode], row.algorithm)


_WHERE = ("task", "model", "partition", "adapter", "trained", "algorithm")


def _quality(rows: Sequence[Row]) -> TextTable:
    heads = (
        *_WHERE, "metric", "mean", "bootstrap 95 %", "own sets", "worst institution", "unparsed", "calibration error",
        "general text before", "after", "own models", "aggregation error",
    )  # fmt: skip
    note = (
        "Own sets and worst institution: the metric on the institutions' own examples, mean and worst; alone, each "
        "model is measured on examples like its own, so that even the worst may exceed the mean on the common set. "
        "Calibration error: expected calibration error, 0 is best. General text: perplexity before and after training; "
        "higher after is what was forgotten. Own models: the metric of the institutions' own models over their own "
        "sets together. Aggregation error: share of the clients' mean product that averaging LoRA's factors loses."
    )
    return TextTable("quality", "All figures of quality", note, heads, tuple(_quality_row(row) for row in rows), 7)


def _quality_row(row: Row) -> tuple[str, ...]:
    unit, main, figures = scale(row.metric), row.main, row.figures
    interval = UNAVAILABLE if main is None else f"{unit * main.low:.1f} to {unit * main.high:.1f}"
    means = {name: None if sample is None else sample.mean for name, sample in figures.items()}
    return (
        *_where(row), KINDS[row.metric].title, _percent(main, row.metric), interval,
        _scaled(means["own"], unit), _scaled(means["worst"], unit), _scaled(means["unparsed"], 100),
        _number(means["ece"], ".3f"), _number(means["forgetting_base"], ".2f"),
        _number(means["forgetting_tuned"], ".2f"), _scaled(means["personal"], unit),
        _number(means["aggregation_error"], ".2g"),
    )  # fmt: skip


def _scaled(value: float | None, unit: float) -> str:
    return UNAVAILABLE if value is None else f"{unit * value:.1f}"


def _classes(rows: Sequence[Row]) -> TextTable:
    heads = (*_WHERE, "F1 by class")
    note = "Per cent, mean over seeds (and over institutions where each is alone)."
    body = (
        (*_where(row), ", ".join(f"{name} {100 * value:.1f}" for name, value in row.per_class.items()))
        for row in rows
        if row.per_class
    )
    return TextTable("classes", "Classes", note, heads, tuple(body), 7)


def _costs(rows: Sequence[Row]) -> TextTable:
    heads = (
        *_WHERE, "wall time", "steps", "passes", "core time", "slowest institution", "peak memory",
        "GPU memory", "sent up", "sent down", "trained parameters", "tokens", "energy", "CO2e",
    )  # fmt: skip
    note = (
        "Mean over seeds of one run of this mode, all institutions together (memory and slowest: the most of any; "
        "passes over the examples: on average). Slowest: the training time of the slowest institution, of each round "
        "where they train together. Bytes are of encoded messages; of the centralised mode, of the pooled text. "
        "Energy has its bootstrap 95 % interval over "
        "seeds, and says how it was come by; what could not be measured is unavailable."
    )
    return TextTable("costs", "What it cost", note, heads, tuple(_cost_row(row) for row in rows), 6)


def _cost_row(row: Row) -> tuple[str, ...]:
    costs = row.costs
    return (
        *_where(row),
        _known(seconds_text, costs.get("seconds")),
        _number(costs.get("steps"), ",.0f"),
        _number(costs.get("passes"), ".1f"),
        _known(seconds_text, costs.get("core_seconds")),
        _known(seconds_text, costs.get("slowest_seconds")),
        _known(bytes_text, costs.get("peak_memory_bytes")),
        _known(bytes_text, costs.get("gpu_peak_memory_bytes")),
        _known(bytes_text, costs.get("bytes_up")),
        _known(bytes_text, costs.get("bytes_down")),
        _number(costs.get("trainable_parameters"), ",.0f"),
        _number(costs.get("tokens"), ",.0f"),
        _energy(row, "joules", "J"),
        _energy(row, "co2_kg", "kg"),
    )


def _known(text: Any, value: float | None) -> str:
    return UNAVAILABLE if value is None else str(text(value))


def _energy(row: Row, cost: str, unit: str) -> str:
    value, sample = row.costs.get(cost), row.figures.get(cost)
    if value is None:
        return UNAVAILABLE
    spread = "" if sample is None or sample.count < 2 else f", {sample.low:,.4g} to {sample.high:,.4g}"
    return f"{value:,.4g} {unit}{spread} ({row.energy_source})"


def _efficiency(comparison: Comparison) -> TextTable:
    heads = (
        "task", "model", "partition", "adapter", "algorithm", "gain", "per kJ", "per MB", "per 1,000 parameters",
        "energy front", "bytes front",
    )  # fmt: skip
    note = (
        "Of the federated models. Gain: points over the untrained model (a share of what the untrained model knows "
        "would reward doing nothing). Front: no other adapter or algorithm is as cheap and as good on this task, model "
        "and partition."
    )
    body = (
        (
            each.row.task, each.row.model, each.row.partition, each.row.adapter, each.row.algorithm,
            _number(each.gain, "+.1f"), _number(each.per_kilojoule, ".3g"), _number(each.per_megabyte, ".3g"),
            _number(each.per_thousand_parameters, ".3g"),
            _front(each.on_front["joules"], each.row.costs.get("joules")),
            _front(each.on_front["bytes"], each.row.costs.get("bytes")),
        )
        for each in comparison.efficiency
    )  # fmt: skip
    return TextTable("efficiency", "Efficiency", note, heads, tuple(body), 5)


def _front(is_on: bool, cost: float | None) -> str:
    return UNAVAILABLE if cost is None else "yes" if is_on else "no"


def _tuning(tuning: Mapping[str, Any] | None) -> TextTable:
    heads = ("task", "model", "adapter", "tried", "figure", "chosen")
    if tuning is None:
        return TextTable("tuning", "Hyper-parameters", "", heads, (), 4)
    note = (
        f"Chosen on the {tuning['split']} split of seed {tuning['seed']}, which is none of the seeds reported, with "
        f"partition {tuning['partition']}: the best mean over the modes ({', '.join(tuning['modes'])}). No test "
        "example was looked at."
    )
    body = (
        (
            trial["task"], trial["model"], trial["adapter"],
            ", ".join(f"{key} = {value}" for key, value in trial["setting"].items()),
            trial["failure"] or _number(trial["figure"], ".4f"), "chosen" if trial["is_chosen"] else "",
        )
        for trial in tuning["trials"]
    )  # fmt: skip
    return TextTable("tuning", "Hyper-parameters", note, heads, tuple(body), 4)


def _missing(folder: GridFolder) -> TextTable:
    failures = folder.failures()
    body = ((cell.title, failures.get(cell.folder, "not run yet")) for cell in folder.undone())
    note = "The same command tries them again."
    return TextTable("missing", "Cells without a result", note, ("cell", "why"), tuple(body), 2)


CELL_HEADS = (
    "task", "model", "adapter", "algorithm", "partition", "seed", "mode", "status", "reason", "metric",
    "accuracy", "macro_f1", "perplexity", "loss", "unparsed", "ece", "own", "worst", "base", "majority", "one_class",
    "forgetting_base", "forgetting_tuned", "personal", "aggregation_error", "best_alone", "worst_alone", "seconds",
    "evaluate_seconds", "steps", "passes", "slowest_seconds",
    "core_seconds", "peak_memory_bytes", "gpu_peak_memory_bytes", "bytes_up", "bytes_down",
    "trainable_parameters", "tokens", "joules", "co2_kg", "energy_source", "energy_method", "epsilon", "delta",
    "per_class", "by_client", "folder", "key",
)  # fmt: skip


def cell_rows(folder: GridFolder, observations: Iterable[Observation]) -> list[dict[str, Any]]:
    """One row a cell and mode, those without a result as well; an empty field was not measured."""
    known: dict[Cell, list[Observation]] = {}
    for seen in observations:
        known.setdefault(seen.cell, []).append(seen)
    failures = folder.failures()
    rows: list[dict[str, Any]] = []
    for cell in folder.cells():
        names = {name: getattr(cell, name) for name in CELL_HEADS[:6]} | {"folder": cell.folder, "key": cell.portable}
        for seen in known.get(cell, ()):
            alone = {f"{name}_alone": value for name, value in seen.spread.items()}
            source = {"energy_source": seen.energy_source, "energy_method": seen.energy_method}
            state = {"mode": seen.mode, "status": "done", "metric": seen.metric}
            parts = {"per_class": seen.per_class, "by_client": seen.by_client}
            parted = {name: json.dumps(values, ensure_ascii=False) for name, values in parts.items() if values}
            rows.append({**names, **state, **seen.quality, **alone, **seen.cost, **source, **parted})
        if cell not in known:
            status = "failed" if cell.folder in failures else "missing"
            reason = failures.get(cell.folder, "")
            rows += [{**names, "mode": mode, "status": status, "reason": reason} for mode in cell.modes]
    return [{name: row.get(name) for name in CELL_HEADS} for row in rows]
