"""``silotune tasks`` and ``silotune plugins``: list the names that a configuration may use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from silotune.cli.output import AsJson, print_json, say, stdout

if TYPE_CHECKING:
    from silotune.settings.plugins import Plugin


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


def plugins(as_json: AsJson = False) -> None:
    """List the plug-ins that are installed, and whether each can be used."""
    from rich.table import Table

    from silotune.errors import unknown_choice
    from silotune.settings.plugins import GROUPS, installed, strangers

    found = [_row(plugin) for group in installed().values() for plugin in group]
    if as_json:
        print_json(found)
        return
    for group, package in strangers():
        known = (f"silotune.{each}" for each in GROUPS.values())
        say(f"{package}: {unknown_choice('group of entry points', group, known)}", is_error=True)
    if not found:
        say("no plug-ins are installed; docs/plugins.md shows how a package adds one")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("kind", "name", "package", "version", "place", "state"):
        table.add_column(heading)
    for row in found:
        table.add_row(*(str(row[key]) for key in ("kind", "name", "package", "version", "place")), row["fault"] or "ok")
    stdout().print(table)


def _row(plugin: Plugin) -> dict[str, Any]:
    """What is said of one plug-in; ``fault`` is empty where a configuration can name it."""
    from silotune.errors import PluginError

    fault = ""
    try:
        _looked_up(plugin.group, plugin.name)
    except PluginError as error:
        fault = str(error)
    return {
        "kind": plugin.group.removesuffix("s"),
        "name": plugin.name,
        "package": plugin.package,
        "version": plugin.version,
        "place": plugin.place,
        "fault": fault,
    }


def _looked_up(group: str, name: str) -> None:
    """Gets all that a configuration that names it would get; what does the work of it, too."""
    from silotune.data.tasks import task_named
    from silotune.settings.adapters import ADAPTERS
    from silotune.settings.aggregation import AGGREGATIONS
    from silotune.settings.algorithms import ALGORITHMS
    from silotune.settings.objectives import OBJECTIVES
    from silotune.settings.registry import implementation_of

    tables = {table.group: table for table in (ADAPTERS, AGGREGATIONS, ALGORITHMS, OBJECTIVES)}
    if group in tables:
        implementation_of(tables[group][name])
    else:
        task_named(name)
