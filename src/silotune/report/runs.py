"""Tables and pictures of finished runs, made from their run folders and from nothing else."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from silotune.errors import RunFolderError
from silotune.evaluation.metrics import best_and_worst
from silotune.record.files import write_bytes
from silotune.record.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by all kinds of colour vision; yellow last, it is faint on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
REST = "#999999"
FEDERATED, CENTRALIZED, BEST_ALONE, MEAN_ALONE = "#0072B2", "#009E73", "#E69F00", "#D55E00"
INK = "#333333"
_TITLE: Mapping[str, Any] = MappingProxyType({"loc": "left", "fontweight": "bold", "color": INK, "pad": 10})
MOST_LABELS = len(PALETTE)


@dataclass(frozen=True, slots=True)
class Kind:
    """How one figure of quality is called and shown."""

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
}


def kinds_of(metric: str) -> tuple[Kind, ...]:
    """The figures that go with a task's metric: perplexity alone, or accuracy and macro-F1."""
    return (KINDS["perplexity"],) if metric == "perplexity" else (KINDS["accuracy"], KINDS["macro_f1"])


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
    if summary.get("base"):
        rows.append(_Row("base, untrained", summary["base"], None, None))
    alone = summary.get("isolated")
    if alone:
        for key, title in (("mean", "each alone: mean"), ("best", "each alone: best")):
            figures = {name: alone[name].get(key) for name in KINDS if name in alone}
            rows.append(_Row(title, figures, *(_cost(alone) if key == "mean" else (None, None))))
    for mode, title in (("federated", "federated"), ("centralized", "centralised")):
        if summary.get(mode):
            rows.append(_Row(title, summary[mode], *_cost(summary[mode])))
    return rows


def _cost(part: Mapping[str, Any]) -> tuple[float | None, float]:
    return part.get("seconds"), (part.get("bytes_up") or 0) + (part.get("bytes_down") or 0)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """One run's modes side by side: figures on the test split, seconds, bytes sent.

    Args:
        summary: The contents of ``summary.json``.
    """
    title = f"{summary['task']} with {summary['model']} and {summary['adapter']}: {summary['split']} split"
    table = Table(title=title, caption=summary.get("budget"), title_justify="left", caption_justify="left")
    kinds = kinds_of(summary["metric"])
    table.add_column("trained", no_wrap=True)
    for heading in (*(kind.title for kind in kinds), "seconds", "bytes sent"):
        table.add_column(heading, justify="right")
    for row in _rows(summary):
        cells = [_with_interval(kinds[0], row.figures), *(kind.text(row.figures.get(kind.key)) for kind in kinds[1:])]
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        table.add_row(
            row.title, *cells, seconds, bytes_text(row.bytes_sent), style="bold" if row.title == "federated" else None
        )
    return table


def _with_interval(kind: Kind, figures: Mapping[str, Any]) -> str:
    value = kind.text(figures.get(kind.key))
    interval = figures.get(f"{kind.key}_interval")
    if not interval or not kind.is_share:
        return value
    return f"{value} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"


def cost_table(summary: Mapping[str, Any]) -> Table:
    """Calibration, the worst served institution and what each mode cost; estimates are marked ``est.``.

    Args:
        summary: The contents of ``summary.json``.
    """
    kind = KINDS[summary["metric"]]
    table = Table(title="calibration, the institution served worst, and cost", title_justify="left")
    table.add_column("trained", no_wrap=True)
    for heading in ("ECE", f"worst own {kind.title}", "energy", "CO2e", "memory"):
        table.add_column(heading, justify="right")
    for mode, title in (("isolated", "each alone"), ("federated", "federated"), ("centralized", "centralised")):
        part = summary.get(mode) or {}
        if not part.get("cost"):
            continue
        cost, error = part["cost"], part.get("ece")
        error = error.get("mean") if isinstance(error, Mapping) else error
        own = [value for value in part.get("own", {}).values() if value is not None]
        worst = best_and_worst(kind.key)[1](own) if own else None
        mark = " est." if cost["energy_source"] == "estimated" else ""
        energy, carbon = scaled_text(cost["joules"], "J"), scaled_text(_thousandfold(cost["co2_kg"]), "g")
        table.add_row(
            title,
            "-" if error is None else f"{error:.3f}",
            kind.text(worst),
            energy + (mark if cost["joules"] is not None else ""),
            carbon + (mark if cost["co2_kg"] is not None else ""),
            bytes_text(cost["peak_memory_bytes"]),
        )
    return table


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


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """A finished run's ``summary.json``.

    Raises:
        RunFolderError: The run is not finished.
    """
    if not folder.has("summary"):
        raise RunFolderError(f"{str(folder.path)!r} is not finished: go on with 'silotune resume {folder.path}'")
    summary: dict[str, Any] = folder.read_json("summary")
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
    for heading in ("alone:\nmean", "alone:\nbest", "feder-\nated", "cen-\ntralised", "time", "bytes\nsent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for folder in folders:
        summary = read_summary(folder)
        kind = KINDS[summary["metric"]]
        seconds, sent = _cost(summary)
        values = [_headline(summary, mode, kind.key) for mode in ("mean", "best", "federated", "centralized")]
        table.add_row(
            folder.path.name,
            ", ".join((*(str(summary[key]) for key in ("task", "model", "adapter", "algorithm")), kind.title)),
            *(kind.text(value) for value in values),
            seconds_text(seconds),
            bytes_text(sent),
        )
    return table


def _headline(summary: Mapping[str, Any], which: str, key: str) -> float | None:
    """A mode's figure; ``mean`` and ``best`` are those of the isolated clients."""
    if which in ("mean", "best"):
        return ((summary.get("isolated") or {}).get(key) or {}).get(which)
    return (summary.get(which) or {}).get(key)


def draw_rounds(folder: RunFolder, out: Path) -> Path:
    """Draws the federated model's figure by round against the isolated and centralised baselines (PNG).

    Args:
        folder: A finished run.
        out: The picture's path.

    Raises:
        RunFolderError: The run is not finished, or had no federated mode.
    """
    from matplotlib.ticker import MaxNLocator

    summary = read_summary(folder)
    kind = kinds_of(summary["metric"])[0]
    rows = folder.part("federated").read_rows("metrics")
    points = [(row["round"], row[kind.key]) for row in rows if row.get(kind.key) is not None]
    if not points:
        raise RunFolderError(f"{str(folder.path)!r} has no federated rounds to draw: its modes lack 'federated'")
    figure, axes = canvas(7.2, 4.3)
    scale = 100 if kind.is_share else 1
    axes.plot(
        [number for number, _ in points],
        [scale * value for _, value in points],
        color=FEDERATED, marker="o", markersize=5, linewidth=2.4, zorder=3,
        label=f"federated, after each round ({kind.text(points[-1][1])} at the end)",
    )  # fmt: skip
    baselines = (
        ("centralized", "centralised: all data in one place", CENTRALIZED, "--"),
        ("best", "each institution alone: the best", BEST_ALONE, "-."),
        ("mean", "each institution alone: the mean", MEAN_ALONE, ":"),
    )
    for which, title, colour, style in baselines:
        value = _headline(summary, which, kind.key)
        if value is not None:
            label = f"{title} ({kind.text(value)})"
            axes.axhline(scale * value, color=colour, linestyle=style, linewidth=2, label=label)
    axes.set_title(f"{summary['task']}: what learning together is worth", **_TITLE)
    axes.set_xlabel("federated round (0 = before training)")
    axes.set_ylabel(f"{kind.title} on the {summary['split']} split ({'%' if kind.is_share else 'lower is better'})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    return _save(figure, out)


def draw_skew(folder: RunFolder, out: Path) -> Path:
    """Draws how many examples of each label every client holds, as stacked bars (PNG).

    Args:
        folder: A run folder with ``partition.json``.
        out: The picture's path.

    Raises:
        RunFolderError: There is no ``partition.json``.
    """
    skew = folder.read_json("partition")
    return _save(skew_figure(skew, title=f"Who holds what: training examples by {skew.get('field', 'label')}"), out)


def skew_figure(skew: Mapping[str, Any], *, title: str) -> Figure:
    """How many examples of each label every client holds, as stacked bars; ``skew`` is ``partition.json``."""
    clients: Mapping[str, Mapping[str, Any]] = skew["clients"]
    counts = {name: _counts(client) for name, client in clients.items()}
    labels = _shown_labels(counts.values())
    figure, axes = canvas(7.2, max(2.6, min(0.42 * len(counts) + 1.9, 14)))
    starts = [0] * len(counts)
    places = range(len(counts))
    for index, label in enumerate(labels):
        widths = [_width(held, label, labels) for held in counts.values()]
        colour = REST if label == _OTHER else PALETTE[index % len(PALETTE)]
        axes.barh(places, widths, left=starts, color=colour, label=label, edgecolor="white", linewidth=0.8)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    if len(counts) <= 40:
        for place, total in zip(places, starts, strict=True):
            axes.annotate(f"{total:,}", (total, place), (4, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks(places, list(counts))
    else:
        axes.set_ylabel("clients")
    axes.set_ylim(len(counts) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.set_title(title, **_TITLE)
    axes.set_xlabel("training examples")
    if len(labels) > 1:
        # The distance below the axes is in inches, whatever the height of the picture.
        height = figure.get_figheight()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / (height - 1)), ncols=4, frameon=False, fontsize=9)
    return figure


_OTHER = "all others"


def _counts(client: Mapping[str, Any]) -> dict[str, int]:
    """Label -> examples; open answers have no labels and count as one kind."""
    return client.get("labels") or {"": client["num_examples"]}


def _shown_labels(counts: Iterable[Mapping[str, int]]) -> list[str]:
    """The labels that get a colour: all, or the most frequent ones and one for the rest."""
    total: Counter[str] = Counter()
    for held in counts:
        total.update(held)
    if len(total) <= MOST_LABELS:
        return sorted(total)
    return [*sorted(label for label, _ in total.most_common(MOST_LABELS - 1)), _OTHER]


def _width(held: Mapping[str, int], label: str, labels: Sequence[str]) -> int:
    if label != _OTHER:
        return held.get(label, 0)
    return sum(number for name, number in held.items() if name not in labels)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture in the house style, in inches."""
    figure, (axes,) = panels(width, height, 1)
    return figure, axes


def panels(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    """An empty picture of several panels side by side with one scale; made without pyplot, whose state is global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained" if columns > 1 else None)
    FigureCanvasAgg(figure)
    found: list[Axes] = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    for axes in found:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#999999")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=3)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    return figure, found


def _save(figure: Figure, out: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", facecolor="white")
    write_bytes(out, content.getvalue())
    return out
