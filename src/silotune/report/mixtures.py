"""The tasks of a mixture side by side, made from a run's summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from silotune.report.runs import KINDS


def main_text(figures: Mapping[str, Any]) -> str:
    """The main one of a task's figures: ``accuracy 71.2 %``."""
    kind = next((KINDS[key] for key in ("accuracy", "perplexity", "preference_accuracy") if key in figures), None)
    return f"{kind.title} {kind.text(figures[kind.key])}" if kind else "-"


def tasks_table(summary: Mapping[str, Any]) -> Table:
    """Of a mixture, each task's main figure by mode; of isolated institutions, those of each.

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
