"""``silotune tasks``: list the tasks that are known by name."""

from __future__ import annotations

from silotune.cli.output import AsJson, print_json, stdout


def tasks(as_json: AsJson = False) -> None:
    """List the tasks."""
    from rich.table import Table

    from silotune.data.tasks import TASKS

    if as_json:
        print_json(
            [
                {
                    "name": task.name,
                    "summary": task.summary,
                    "metric": task.metric,
                    "options": task.options,
                    "fields": task.partition_fields,
                    "hub_id": task.hub.id if task.hub else None,
                    "embedded": task.embedded,
                }
                for task in TASKS.values()
            ]
        )
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "metric", "partition fields", ""):
        table.add_column(heading)
    for task in TASKS.values():
        table.add_row(task.name, task.metric, ", ".join(task.partition_fields) or "-", task.summary)
    table.add_row("custom", "", "", "a task of your own, from [data.definition] of the configuration")
    stdout().print(table)
