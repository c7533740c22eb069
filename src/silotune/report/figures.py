"""Pictures of a grid: modes with intervals, figures by round, who holds what, and what quality costs."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from silotune.evaluation.comparison import Comparison, Row, scale
from silotune.evaluation.metrics import lower_is_better, signed
from silotune.evaluation.statistics import pareto_front
from silotune.record.grids import Cell, GridFolder
from silotune.report.pictures import CENTRALIZED, FEDERATED, INK, MEAN_ALONE, PALETTE, panels, skew_figure, twins
from silotune.report.runs import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODE_TITLES = {"isolated": "each alone", "federated": "federated", "centralized": "centralised"}
_MODE_COLOURS = {"isolated": MEAN_ALONE, "federated": FEDERATED, "centralized": CENTRALIZED}
_HATCHES = ("", "//", "..", "xx", "\\\\", "++")  # a second algorithm is told apart without colour, too
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LONGEST_NAME = 120
"""The most characters of a picture's file name: a model may be named by a long path."""
_COSTS = {"bytes": ("bytes sent in a run", 1e6, "MB"), "joules": ("energy of a run", 1e3, "kJ")}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with the words for those who do not see it.

    Attributes:
        name: Of its files, without ending.
        section: ``modes``, ``privacy``, ``rounds``, ``skew``, ``bytes`` or ``energy``.
        caption: What it shows.
        alternative: The same as text, with the main numbers.
        figure: The drawing.
    """

    name: str
    section: str
    caption: str
    alternative: str
    figure: Figure

    def encoded(self, form: str) -> bytes:
        """The drawing as ``svg`` or ``png``; the same bytes for the same numbers."""
        import matplotlib as mpl

        content = io.BytesIO()
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None} if form == "svg" else {"Software": None}
        with mpl.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(content, format=form, bbox_inches="tight", facecolor="white", metadata=empty)
        return content.getvalue()


def pictures(folder: GridFolder, comparison: Comparison) -> Iterator[Picture]:
    """All pictures of a grid, in the order of the report; none where there is nothing to draw."""
    groups = by_task(comparison.rows)
    for (task, model), rows in groups.items():
        yield _modes(task, model, rows)
    cells = [cell for cell in folder.cells() if folder.is_done(cell) and "federated" in cell.modes]
    for task, model in groups:
        own = [cell for cell in cells if (cell.task, cell.model) == (task, model)]
        yield from _rounds(folder, own, task, model)
    yield from _skews(folder)
    for cost, section in (("bytes", "bytes"), ("joules", "energy")):
        for (task, model), rows in groups.items():
            yield from _costs(task, model, rows, cost=cost, section=section)


def by_task(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that have a figure, by task and model."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.main is not None:
            groups.setdefault((row.task, row.model), []).append(row)
    return groups


def slug(*names: str) -> str:
    """A file's name from words; others may give the same one."""
    words = "-".join("".join(char if char.isascii() and char.isalnum() else "-" for char in name) for name in names)
    return words[:LONGEST_NAME]


def apart(pictures: Iterable[Picture]) -> list[Picture]:
    """The same pictures, each under a name of its own: later ones of one name are numbered."""
    met: Counter[str] = Counter()
    made = []
    for picture in pictures:
        met[picture.name] += 1
        number = met[picture.name]
        made.append(picture if number == 1 else replace(picture, name=f"{picture.name}--{number}"))
    return made


def axis_title(metric: str) -> str:
    """The label of a metric's axis."""
    return f"{KINDS[metric].title}{' (%)' if not lower_is_better(metric) else ' (lower is better)'}"


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _titled(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK)


def _share_legend(figure: Figure) -> None:
    """One legend for all panels, whichever of them has a series."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=min(4, len(unique)), frameon=False, fontsize=9
    )


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure, axes = panels(min(3.6 * count + 0.6, 14), height, count)
    figure.set_layout_engine("constrained")
    return figure, axes


def _modes(task: str, model: str, rows: Sequence[Row]) -> Picture:
    partitions, adapters = _distinct([row.partition for row in rows]), _distinct([row.adapter for row in rows])
    series = sorted(
        dict.fromkeys((row.mode, row.algorithm) for row in rows), key=lambda each: list(MODE_TITLES).index(each[0])
    )
    metric = rows[0].metric
    figure, every = _panels(len(partitions), 3.8)
    width = 0.8 / len(series)
    for axes, partition in zip(every, partitions, strict=True):
        for place, (mode, algorithm) in enumerate(series):
            own = [row for row in rows if (row.partition, row.mode, row.algorithm) == (partition, mode, algorithm)]
            _bars(axes, own, adapters, place * width, width, hatch=_hatch(series, algorithm))
        majority = [row.figures["majority"] for row in rows if row.partition == partition and row.figures["majority"]]
        if majority:
            level = scale(metric) * majority[0].mean
            axes.axhline(level, color=INK, linestyle=":", linewidth=1.2, label="always the most frequent answer")
        axes.set_xticks([number + 0.4 - width / 2 for number in range(len(adapters))], adapters)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
        _titled(axes, partition)
    every[0].set_ylabel(axis_title(metric))
    _share_legend(figure)
    figure.suptitle(f"{task}, {model}", x=0.01, ha="left", fontweight="bold", color=INK)
    numbers = "; ".join(f"{row.partition}, {row.adapter}, {_series_title(row)}: {mean_text(row)}" for row in rows)
    return Picture(
        slug("modes", task, model),
        "modes",
        f"{task} with {model}: {KINDS[metric].title} on the common test set by mode and adapter. Bars are means over "
        "seeds, whiskers bootstrap 95 % intervals over seeds.",
        f"Bar chart of {KINDS[metric].title} on {task} with {model}. {numbers}.",
        figure,
    )


def _hatch(series: Sequence[tuple[str, str]], algorithm: str) -> str:
    algorithms = _distinct([name for _, name in series if name])
    return _HATCHES[algorithms.index(algorithm) % len(_HATCHES)] if algorithm else ""


def _series_title(row: Row) -> str:
    return MODE_TITLES[row.mode] + (f" ({row.algorithm})" if row.algorithm else "")


def _bars(axes: Axes, rows: Sequence[Row], adapters: Sequence[str], offset: float, width: float, *, hatch: str) -> None:
    for row in rows:
        assert row.main is not None
        unit, place = scale(row.metric), adapters.index(row.adapter) + offset
        height = unit * row.main.mean
        axes.bar(
            place, height, width * 0.94, color=_MODE_COLOURS[row.mode], hatch=hatch, edgecolor="white",
            label=_series_title(row),
        )  # fmt: skip
        if row.main.count > 1:
            ends = [[height - unit * row.main.low], [unit * row.main.high - height]]
            axes.errorbar(place, height, yerr=ends, color=INK, capsize=3, linewidth=1.2)


def mean_text(row: Row) -> str:
    """A row's main figure for people."""
    return KINDS[row.metric].text(row.main.mean if row.main else None)


def _rounds(folder: GridFolder, cells: Sequence[Cell], task: str, model: str) -> Iterator[Picture]:
    from matplotlib.ticker import MaxNLocator

    lines: dict[tuple[str, str], dict[int, list[float]]] = {}
    metric = ""
    for cell in cells:
        metric = str(folder.run(cell).read_json("summary")["metric"])
        name = f"{cell.adapter}, {cell.algorithm}"
        for row in folder.run(cell).part("federated").read_rows("metrics"):
            if row.get(metric) is not None:
                lines.setdefault((cell.partition, name), {}).setdefault(row["round"], []).append(row[metric])
    if not lines:
        return
    partitions, names = (_distinct([key[place] for key in lines]) for place in (0, 1))
    figure, every = _panels(len(partitions), 3.6)
    for axes, partition in zip(every, partitions, strict=True):
        drawn = [lines.get((partition, name), {}) for name in names]
        for number, name in enumerate(names):
            _line(axes, drawn[number], name, number, unit=scale(metric), twins=twins(drawn, number))
        axes.set_xlabel("federated round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _titled(axes, partition)
    every[0].set_ylabel(axis_title(metric))
    _share_legend(figure)
    figure.suptitle(f"{task}, {model}", x=0.01, ha="left", fontweight="bold", color=INK)
    ends = "; ".join(
        f"{partition}, {name}: from {KINDS[metric].text(statistics.fmean(points[min(points)]))} to "
        f"{KINDS[metric].text(statistics.fmean(points[max(points)]))}"
        for (partition, name), points in lines.items()
    )
    yield Picture(
        slug("rounds", task, model),
        "rounds",
        f"{task} with {model}: {KINDS[metric].title} of the federated model after each round that was scored. Lines "
        "are means over seeds, bands reach from the lowest to the highest seed.",
        f"Line chart of {KINDS[metric].title} by federated round on {task} with {model}. {ends}.",
        figure,
    )


def _line(
    axes: Axes, points: Mapping[int, Sequence[float]], name: str, number: int, *, unit: float, twins: int
) -> None:
    """One line; ``twins`` others lie exactly on it and are drawn over it, so that it is as much wider."""
    rounds = sorted(points)
    if not rounds:
        return
    colour = PALETTE[number % len(PALETTE)]
    means = [unit * statistics.fmean(points[each]) for each in rounds]
    axes.plot(
        rounds, means, color=colour, marker=_MARKERS[number % len(_MARKERS)], markersize=4 + 4 * twins,
        linewidth=1.8 + 3 * twins, label=name,
    )  # fmt: skip
    low, high = [unit * min(points[each]) for each in rounds], [unit * max(points[each]) for each in rounds]
    axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)


def _skews(folder: GridFolder) -> Iterator[Picture]:
    """One picture a task and partition, of its first finished seed: the partition does not depend on the rest."""
    seen = set()
    for cell in folder.cells():
        if (cell.task, cell.partition) in seen or not folder.is_done(cell):
            continue
        seen.add((cell.task, cell.partition))
        skew: Mapping[str, Any] = folder.run(cell).read_json("partition")
        title = f"{cell.task}, {cell.partition}, seed {cell.seed}"
        distance = skew.get("mean_distance")
        apart = "" if distance is None else f" Mean distance from the whole: {distance:.2f} (0 alike, 1 apart)."
        counts = "; ".join(f"{name}: {client['num_examples']}" for name, client in skew["clients"].items())
        yield Picture(
            slug("skew", cell.task, cell.partition),
            "skew",
            f"{title}: training examples of each institution by {skew.get('field', 'label')}.{apart}",
            f"Stacked bars of training examples by institution, {title}. {counts}.",
            skew_figure(skew, title=title),
        )


def _costs(task: str, model: str, rows: Sequence[Row], *, cost: str, section: str) -> Iterator[Picture]:
    title, unit, name = _COSTS[cost]
    known = [row for row in rows if row.mode == "federated" and row.costs.get(cost)]
    if not known:
        return
    partitions = _distinct([row.partition for row in known])
    figure, every = _panels(len(partitions), 3.6)
    adapters = _distinct([row.adapter for row in known])
    for axes, partition in zip(every, partitions, strict=True):
        own = [row for row in known if row.partition == partition]
        _points(axes, own, adapters, cost, unit)
        _front_line(axes, own, cost, unit)
        axes.set_xlabel(f"{title} ({name})")
        axes.margins(y=0.15)
        axes.set_xlim(0, 1.12 * max((row.costs[cost] or 0) / unit for row in known))
        _titled(axes, partition)
    every[0].set_ylabel(axis_title(known[0].metric))
    _share_legend(figure)
    figure.suptitle(f"{task}, {model}", x=0.01, ha="left", fontweight="bold", color=INK)
    doubt = " Energy is estimated, not measured." if cost == "joules" and _is_estimated(known) else ""
    numbers = "; ".join(
        f"{row.partition}, {row.adapter}, {row.algorithm}: {(row.costs[cost] or 0) / unit:.3g} {name}, {mean_text(row)}"
        for row in known
    )
    yield Picture(
        slug(section, task, model),
        section,
        f"{task} with {model}: {title} (federated) against {KINDS[known[0].metric].title}; the line joins those that "
        f"no other beats in both.{doubt}",
        f"Scatter plot of {title} against {KINDS[known[0].metric].title} on {task} with {model}.{doubt} {numbers}.",
        figure,
    )


def _is_estimated(rows: Sequence[Row]) -> bool:
    return any(row.energy_source != "measured" for row in rows)


def _points(axes: Axes, rows: Sequence[Row], adapters: Sequence[str], cost: str, unit: float) -> None:
    algorithms = _distinct([row.algorithm for row in rows])
    for row in rows:
        assert row.main is not None
        place = adapters.index(row.adapter)
        label = row.adapter if len(algorithms) == 1 else f"{row.adapter}, {row.algorithm}"
        filled = algorithms.index(row.algorithm) == 0
        axes.plot(
            [(row.costs[cost] or 0) / unit], [scale(row.metric) * row.main.mean], linestyle="", markersize=9, zorder=3,
            marker=_MARKERS[place % len(_MARKERS)], color=PALETTE[place % len(PALETTE)], label=label,
            fillstyle="full" if filled else "none",
        )  # fmt: skip


def _front_line(axes: Axes, rows: Sequence[Row], cost: str, unit: float) -> None:
    known = [((row.costs[cost] or 0) / unit, row.metric, row.main.mean) for row in rows if row.main]
    is_on = pareto_front([(x, signed(metric, mean)) for x, metric, mean in known])
    points = sorted((x, scale(metric) * mean) for (x, metric, mean), keep in zip(known, is_on, strict=True) if keep)
    if len(points) > 1:
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color="#777777", linestyle="--", linewidth=1.2,
            label="not beaten",
        )  # fmt: skip
