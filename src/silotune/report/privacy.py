"""Tables and pictures of privacy: noise by site, epsilon by round, what was spent, and accuracy against epsilon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from silotune.evaluation.comparison import Row, scale
from silotune.report.figures import Picture, axis_title, by_task, mean_text, slug
from silotune.report.pictures import INK, PALETTE, canvas, save_picture
from silotune.report.runs import KINDS

MOST_LINES = len(PALETTE)
"""Sites that a picture shows: those that spend most."""


def plan_table(plan: Mapping[str, Any]) -> Table:
    """One line a site: what it draws and releases in a round, its noise, its epsilon after the last round.

    Args:
        plan: As ``silotune privacy plan --json`` prints it.
    """
    title = f"privacy.dp = {plan['dp']!r}, {plan['rounds']} rounds, delta {plan['delta']:g}, {plan['accountant']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("site", no_wrap=True)
    for heading in ("examples", "sampling rate", "releases a round", "noise multiplier", "epsilon"):
        table.add_column(heading, justify="right")
    for name, site in plan["sites"].items():
        size = "-" if site["num_examples"] is None else f"{site['num_examples']:,}"
        table.add_row(
            name,
            size,
            f"{site['sampling_rate']:.4g}",
            str(site["steps_per_round"]),
            f"{site['noise_multiplier']:.4g}",
            f"{site['epsilon']:.4g}",
        )
    return table


def curve_table(plan: Mapping[str, Any]) -> Table:
    """Epsilon after each of the plan's rounds, of the site that spends most."""
    table = Table(title="epsilon by round, of the site that spends most", title_justify="left", box=SIMPLE_HEAD)
    largest = max(plan["sites"].values(), key=_last)
    table.add_column("after round", justify="right")
    table.add_column("epsilon", justify="right")
    for number, value in zip(plan["points"], largest["curve"], strict=True):
        table.add_row(str(number), f"{value:.4g}")
    return table


def spent_table(sites: Mapping[str, Any], *, delta: float) -> Table:
    """What each site's ledger adds up to.

    Args:
        sites: As ``silotune privacy spent --json`` prints them.
        delta: At which epsilon was counted.
    """
    table = Table(title=f"spent, at delta {delta:g}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("site", no_wrap=True)
    for heading in ("runs", "releases", "epsilon of the costliest run", "epsilon of all together"):
        table.add_column(heading, justify="right")
    for name, site in sites.items():
        dearest = max(run["epsilon"] for run in site["runs"].values())
        numbers = str(len(site["runs"])), str(site["releases"])
        table.add_row(name, *numbers, f"{dearest:.4g}", f"{site['epsilon']:.4g}")
    return table


def draw_epsilon(plan: Mapping[str, Any], out: Path) -> Path:
    """Draws epsilon by round for the sites that spend most (PNG)."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(7.2, 4.3)
    shown = sorted(plan["sites"].items(), key=lambda item: -_last(item[1]))[:MOST_LINES]
    for (name, site), colour in zip(shown, PALETTE, strict=False):
        axes.plot(
            plan["points"],
            site["curve"],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=2,
            label=f"{name}: noise {site['noise_multiplier']:.3g}",
        )
    axes.set_title(f"What rounds cost in privacy (delta {plan['delta']:g})", loc="left", fontweight="bold", pad=10)
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon spent so far")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
    return save_picture(figure, out)


def _last(site: Mapping[str, Any]) -> float:
    return float(site["epsilon"])


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
