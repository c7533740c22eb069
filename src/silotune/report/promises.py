"""Accuracy of the runs of a grid against the epsilon that their promise cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from silotune.evaluation.comparison import Row, scale
from silotune.report.figures import Picture, axis_title, by_task, mean_text, slug
from silotune.report.pictures import INK, PALETTE, canvas
from silotune.report.runs import KINDS

SECTION = "privacy"


def epsilon_pictures(rows: Sequence[Row]) -> Iterator[Picture]:
    """One picture a task and model that has federated rows under differential privacy: quality against epsilon."""
    for (task, model), own in by_task([row for row in rows if row.mode == "federated"]).items():
        private = [row for row in own if row.costs.get("epsilon")]
        if private:
            yield _picture(task, model, private, [row for row in own if row.costs.get("delta") is None])


def _picture(task: str, model: str, private: Sequence[Row], plain: Sequence[Row]) -> Picture:
    metric = private[0].metric
    figure, axes = canvas(7.2, 4.3)
    for number, row in enumerate(private):
        assert row.main is not None
        unit = scale(metric)
        height = unit * row.main.mean
        ends = [[height - unit * row.main.low], [unit * row.main.high - height]]
        axes.errorbar(
            [row.costs["epsilon"] or 0.0], [height], yerr=ends, marker="o", capsize=3, linestyle="",
            color=PALETTE[number % len(PALETTE)], label=_name(row),
        )  # fmt: skip
    for row in plain:
        assert row.main is not None
        axes.axhline(scale(metric) * row.main.mean, color=INK, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("epsilon spent (log scale; smaller protects more)")
    axes.set_ylabel(axis_title(metric))
    axes.set_title(f"{task}, {model}", loc="left", fontweight="bold", pad=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    numbers = "; ".join(f"{_name(row)}: epsilon {row.costs['epsilon']:.3g}, {mean_text(row)}" for row in private)
    beside = " Dashed: without differential privacy." if plain else ""
    what = f"{KINDS[metric].title} of the federated model against the epsilon that it cost"
    return Picture(
        slug("epsilon", task, model), SECTION, f"{task} with {model}: {what}.{beside}",
        f"{what} on {task} with {model}. {numbers}.", figure,
    )  # fmt: skip


def _name(row: Row) -> str:
    return ", ".join((row.adapter, row.algorithm, row.partition))
