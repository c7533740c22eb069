"""Pictures of finished runs, made from their run folders and from nothing else."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from silotune.errors import RunFolderError
from silotune.record.files import write_bytes
from silotune.record.runs import RunFolder
from silotune.report.runs import Kind, headline, kinds_of, read_summary

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
        label=f"federated, after each round ({_kept_text(summary, kind, points)})",
    )  # fmt: skip
    number, reached = _kept(summary, kind, points)
    axes.plot([number], [scale * reached], color=FEDERATED, marker="*", markersize=14, linestyle="", zorder=4)
    baselines = (
        ("centralized", "centralised: all data in one place", CENTRALIZED, "--"),
        ("best", "each institution alone: the best", BEST_ALONE, "-."),
        ("mean", "each institution alone: the mean", MEAN_ALONE, ":"),
    )
    values = [headline(summary, which, kind.key) for which, *_ in baselines]
    for place, (_, title, colour, style) in enumerate(baselines):
        value = values[place]
        if value is not None:
            label, width = f"{title} ({kind.text(value)})", 2 + 3 * twins(values, place)
            axes.axhline(scale * value, color=colour, linestyle=style, linewidth=width, label=label)
    axes.set_title(f"{summary['task']}: what learning together is worth", **_TITLE)
    axes.set_xlabel("federated round (0 = before training)")
    axes.set_ylabel(f"{kind.title} on the {summary['split']} split ({'%' if kind.is_share else 'lower is better'})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    return save_picture(figure, out)


def twins(lines: Sequence[Any], place: int) -> int:
    """How many later lines lie exactly on this one: drawn so much wider, it is seen below them."""
    return sum(line == lines[place] for line in lines[place + 1 :])


_Points = Sequence[tuple[int, float]]


def _kept(summary: Mapping[str, Any], kind: Kind, points: _Points) -> tuple[int, float]:
    """The round whose model was kept, and its figure, which is that of the table."""
    part = summary["federated"]
    last = points[-1][0]
    return int(part.get("round", last)), float(part.get(kind.key, points[-1][1]))


def _kept_text(summary: Mapping[str, Any], kind: Kind, points: _Points) -> str:
    number, value = _kept(summary, kind, points)
    return f"{kind.text(value)} in round {number}, which was kept"


def draw_skew(folder: RunFolder, out: Path) -> Path:
    """Draws how many examples of each label every client holds, as stacked bars (PNG).

    Args:
        folder: A run folder with ``partition.json``.
        out: The picture's path.

    Raises:
        RunFolderError: There is no ``partition.json``, or the training examples are at sites.
    """
    if folder.is_of_sites():
        raise RunFolderError(f"{str(folder.path)!r} is of a run over sites: how many examples each holds is not in it")
    skew = folder.read_json("partition")
    return save_picture(
        skew_figure(skew, title=f"Who holds what: training examples by {skew.get('field', 'label')}"), out
    )


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


def save_picture(figure: Figure, out: Path) -> Path:
    """Writes a picture as PNG, whole."""
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", facecolor="white")
    write_bytes(out, content.getvalue())
    return out
