"""Tables of finished runs, made from their run folders and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from silotune.errors import RunFolderError
from silotune.evaluation.metrics import best_and_worst
from silotune.record.runs import RunFolder


@dataclass(frozen=True, slots=True)
class Kind:
    """The title of one figure of quality, and how it is shown."""

    key: str
    title: str
    is_share: bool

    def text(self, value: float | None) -> str:
        """The value for people: shares in percent, others with two decimals."""
        if value is None:
            return "-"
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.2f}"


KINDS = {
    "accuracy": Kind("accuracy", "accuracy", is_share=True),
    "macro_f1": Kind("macro_f1", "macro-F1", is_share=True),
    "perplexity": Kind("perplexity", "perplexity", is_share=False),
    "preference_accuracy": Kind("preference_accuracy", "preferred", is_share=True),
    "gain": Kind("gain", "gain", is_share=True),
    "win_rate": Kind("win_rate", "win rate", is_share=True),
    "margin": Kind("margin", "margin", is_share=False),
}
_SHOWN = {
    "perplexity": ("perplexity",),
    "preference_accuracy": ("preference_accuracy", "win_rate", "margin"),
}


def kinds_of(metric: str) -> tuple[Kind, ...]:
    """The figures that go with a task's metric: for most tasks accuracy and macro-F1."""
    return tuple(KINDS[name] for name in _SHOWN.get(metric, ("accuracy", "macro_f1")))


def bytes_text(number: float | None) -> str:
    """A number of bytes for people, in units of 1000."""
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def seconds_text(seconds: float | None) -> str:
    """A time span for people."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the summary: who was trained, with what figures, at what cost."""

    title: str
    figures: Mapping[str, Any]
    seconds: float | None
    bytes_sent: float | None


def _rows(summary: Mapping[str, Any]) -> list[_Row]:
    rows = []
    if summary.get("majority"):
        rows.append(_Row(f"always {summary['majority']['answer']}", summary["majority"], None, None))
    if summary.get("base"):
        title = "start, untrained" if summary.get("start") else "base, untrained"
        rows.append(_Row(title, summary["base"], None, None))
    alone = summary.get("isolated")
    if alone:
        for key, title in (("mean", "each alone: mean"), ("best", "each alone: best")):
            figures = {name: alone[name].get(key) for name in KINDS if name in alone}
            figures |= {"privacy": alone["privacy"]} if "privacy" in alone else {}
            figures["constant"] = _constant_alone(alone) if key == "mean" else ""
            rows.append(_Row(title, figures, *(_cost(alone) if key == "mean" else (None, None))))
    for mode, title in (("federated", "federated"), ("centralized", "centralised")):
        if summary.get(mode):
            constant = ONE_CLASS if summary[mode].get("answers_one_class") else ""
            rows.append(_Row(title, {**summary[mode], "constant": constant}, *_cost(summary[mode])))
            if "personal" in summary[mode]:
                rows.append(_Row("federated, own models", summary[mode]["personal"], None, None))
    return rows


ONE_CLASS = "answers one class only"


def _constant_alone(alone: Mapping[str, Any]) -> str:
    """How many of the institutions' own models give one answer to all."""
    models = list(alone.get("clients", {}).values())
    constant = sum(bool(model.get("answers_one_class")) for model in models)
    return f"{constant} of {len(models)} answer one class only" if constant else ""


def _cost(part: Mapping[str, Any]) -> tuple[float | None, float]:
    return part.get("seconds"), (part.get("bytes_up") or 0) + (part.get("bytes_down") or 0)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """One run's modes side by side: figures on the test split, seconds, bytes sent.

    Args:
        summary: The contents of ``summary.json``.
    """
    title = f"{summary['task']} with {summary['model']} and {summary['adapter']}: {summary['split']} split"
    said = [*filter(None, [summary.get("budget"), summary.get("kept")]), *summary.get("stopped", ())]
    table = Table(title=title, caption="\n".join(said) or None, title_justify="left", caption_justify="left")
    kinds = kinds_of(summary["metric"])
    table.add_column("trained", no_wrap=True)
    is_private = any("privacy" in row.figures for row in _rows(summary))
    headings = (*(kind.title for kind in kinds), *(("epsilon",) if is_private else ()), "seconds", "bytes sent")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in _rows(summary):
        cells = [_with_interval(kinds[0], row.figures), *(kind.text(row.figures.get(kind.key)) for kind in kinds[1:])]
        if is_private:
            cells.append(epsilon_text(row.figures.get("privacy")))
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        table.add_row(
            row.title, *cells, seconds, bytes_text(row.bytes_sent), style="bold" if row.title == "federated" else None
        )
    return table


def _with_interval(kind: Kind, figures: Mapping[str, Any]) -> str:
    value = kind.text(figures.get(kind.key))
    interval = figures.get(f"{kind.key}_interval")
    if interval:
        low, high = (f"{100 * bound:.1f}" if kind.is_share else kind.text(bound) for bound in interval)
        value = f"{value} ({low}–{high})"
    return "\n".join(filter(None, (value, figures.get("constant", ""))))


_PARTS = (("isolated", "each alone"), ("federated", "federated"), ("centralized", "centralised"))


def _costed(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Mode, title and figures of each mode that a run had; a run of an older version knows no costs."""
    for mode, title in _PARTS:
        part = summary.get(mode) or {}
        if part.get("cost"):
            yield mode, title, part


def served_table(summary: Mapping[str, Any]) -> Table:
    """Calibration of each mode, and the figure of the institution served worst.

    Args:
        summary: The contents of ``summary.json``.
    """
    kind = KINDS[summary["metric"]]
    better, worse = best_and_worst(kind.key)
    table = Table(title="calibration, and the institution served worst", title_justify="left", caption_justify="left")
    table.add_column("trained", no_wrap=True)
    for heading in ("ECE", f"worst own {kind.title}"):
        table.add_column(heading, justify="right")
    for mode, title, part in _costed(summary):
        error = part.get("ece")
        error = error.get("mean") if isinstance(error, Mapping) else error
        own = [value for value in part.get("own", {}).values() if value is not None]
        worst = worse(own) if own else None
        table.add_row(title, "-" if error is None else f"{error:.3f}", kind.text(worst))
        mean = headline(summary, "mean", kind.key)
        if mode == "isolated" and worst is not None and mean is not None and worst == better((worst, mean)):
            table.caption = (
                f"each alone: the worst own {kind.title} may exceed the mean above, which is on the common "
                f"{summary['split']} split: own examples are like those that an institution's model was trained on"
            )
    return table


def cost_table(summary: Mapping[str, Any]) -> Table:
    """What each mode did and what that took; below it stands whose energy was estimated.

    Args:
        summary: The contents of ``summary.json``.
    """
    parts = list(_costed(summary))
    matched = f", at equal {summary.get('budget_match', 'compute')}" if len(parts) > 1 else ""
    table = Table(title=f"what it took{matched}", title_justify="left", caption_justify="left", pad_edge=False)
    table.add_column("trained", no_wrap=True)
    for heading in ("steps", "passes", "CPU", "slowest", "energy", "CO2e", "memory"):
        table.add_column(heading, justify="right")
    for _, title, part in parts:
        cost = part["cost"]
        energy, carbon = scaled_text(cost["joules"], "J"), scaled_text(_thousandfold(cost["co2_kg"]), "g")
        steps, passes = cost.get("steps"), cost.get("passes")
        table.add_row(
            title,
            "-" if steps is None else f"{steps:,}",
            "-" if passes is None else f"{passes:.1f}",
            seconds_text(cost.get("core_seconds")),
            seconds_text(cost.get("slowest_seconds")),
            energy,
            carbon,
            bytes_text(cost["peak_memory_bytes"]),
        )
    said = [_COST_NOTE]
    guessed = [title for _, title, part in parts if part["cost"]["energy_source"] == "estimated"]
    if guessed:
        said.append(f"energy, and so CO2e, is estimated and not measured: {', '.join(guessed)}")
    product = (summary.get("federated") or {}).get("aggregation_error")
    if product is not None:
        said.append(
            f"LoRA aggregation error {product:.2g}, mean over the rounds: how far averaging ({summary['lora']}) is "
            "from the mean of what the clients learnt"
        )
    table.caption = "\n".join(said)
    return table


_COST_NOTE = (
    "steps of the optimiser, CPU time of all cores and energy: all institutions together; passes over their examples: "
    "on average; slowest: the training time of the slowest institution, of each round where they train together"
)


def tables_of(summary: Mapping[str, Any]) -> list[Table]:
    """All that is shown of one run, in order.

    Args:
        summary: The contents of ``summary.json``.
    """
    is_mixture = any("by_task" in part for part in summary.values() if isinstance(part, Mapping))
    mixture = [tasks_table(summary)] if is_mixture else []
    return [summary_table(summary), served_table(summary), cost_table(summary), *mixture]


def _thousandfold(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def scaled_text(value: float | None, unit: str) -> str:
    """A measured quantity for people, three digits: ``1.23 kJ``, ``45.6 mg``; ``-`` where there is none."""
    if value is None:
        return "-"
    if value == 0:
        return f"0 {unit}"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value / 1e-6:.3g} µ{unit}"


def promise_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the run promised: what the server saw, what is protected, who is trusted; empty for older runs."""
    return [f"privacy: {line}" for line in (summary.get("privacy") or {}).get("statement", ())]


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """A finished run's ``summary.json``.

    Raises:
        RunFolderError: The run is not finished, or the file is not the summary of a run.
    """
    if not folder.has("summary"):
        raise RunFolderError(f"{str(folder.path)!r} is not finished: go on with 'silotune resume {folder.path}'")
    summary: dict[str, Any] = folder.read_json("summary")
    if not isinstance(summary, dict) or not {"task", "metric", "budget"} <= summary.keys():
        raise RunFolderError(f"{str(folder.path)!r}: summary.json is damaged: it is not that of a run")
    return summary


def runs_json(folders: Iterable[RunFolder]) -> list[dict[str, Any]]:
    """The summaries of several runs, each with its ``folder`` and ``seed``."""
    return [
        {"folder": str(folder.path), "seed": folder.read_json("config").get("seed"), **read_summary(folder)}
        for folder in folders
    ]


def runs_table(folders: Sequence[RunFolder]) -> Table:
    """Several runs below each other: what was trained, and each mode's figure in the task's own metric."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("task, model, adapter, algorithm, metric")
    for heading in (
        "always\none",
        "alone:\nmean",
        "alone:\nbest",
        "feder-\nated",
        "cen-\ntralised",
        "time",
        "bytes\nsent",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for folder in folders:
        summary = read_summary(folder)
        kind = KINDS[summary["metric"]]
        seconds, sent = _cost(summary)
        modes = ("majority", "mean", "best", "federated", "centralized")
        values = [(headline(summary, mode, kind.key), _doubt(summary, mode)) for mode in modes]
        table.add_row(
            folder.path.name,
            ", ".join((*(str(summary[key]) for key in ("task", "model", "adapter", "algorithm")), kind.title)),
            *("\n".join(filter(None, (kind.text(value), doubt))) for value, doubt in values),
            seconds_text(seconds),
            bytes_text(sent),
        )
    return table


def _doubt(summary: Mapping[str, Any], mode: str) -> str:
    """Why a mode's figure is no result of training; empty where it is one."""
    part = summary.get(mode) or {}
    if part.get("round") == 0:
        return "untrained"
    return "one class" if part.get("answers_one_class") else ""


def headline(summary: Mapping[str, Any], which: str, key: str) -> float | None:
    """A mode's figure; ``mean`` and ``best`` are those of the isolated clients."""
    if which in ("mean", "best"):
        return ((summary.get("isolated") or {}).get(key) or {}).get(which)
    return (summary.get(which) or {}).get(key)


def epsilon_text(spent: Mapping[str, Any] | None) -> str:
    """The privacy cost of a model, for people; ``-`` where nothing is promised, ``?`` where only the sites know it."""
    if not spent:
        return "-"
    known = "?" if spent.get("epsilon") is None else f"{spent['epsilon']:.3g}"
    return f"{known} (delta {spent['delta']:g})"


def main_text(figures: Mapping[str, Any]) -> str:
    """The main one of a task's figures: ``accuracy 71.2 %``."""
    kind = next((KINDS[key] for key in ("accuracy", "perplexity", "preference_accuracy") if key in figures), None)
    return f"{kind.title} {kind.text(figures[kind.key])}" if kind else "-"


def tasks_table(summary: Mapping[str, Any]) -> Table:
    """Each task's main figure by mode, for a mixture; isolated institutions have a column each.

    Args:
        summary: The contents of ``summary.json``.
    """
    parts = {
        title: summary[mode]
        for mode, title in (("federated", "federated"), ("centralized", "centralised"))
        if summary.get(mode)
    }
    alone = (summary.get("isolated") or {}).get("clients", {})
    parts = {**{f"{name} alone": own for name, own in alone.items()}, **parts}
    table = Table(title="each task of the mixture", title_justify="left")
    table.add_column("task", no_wrap=True)
    for title in parts:
        table.add_column(title, justify="right")
    for task in next(iter(parts.values()))["by_task"]:
        table.add_row(task, *(main_text(part["by_task"][task]) for part in parts.values()))
    return table
