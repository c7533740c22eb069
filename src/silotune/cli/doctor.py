"""``silotune doctor``: what this machine offers, and whether a configuration fits it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.cli.output import AsJson, Settings, print_json, reserved_stdout, say, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from silotune.config import Config

_REMEDIES = (
    ("--set model.gradient_checkpointing=true", lambda config: not config.model.gradient_checkpointing),
    ("a smaller training.batch_size with more training.gradient_accumulation", lambda c: c.training.batch_size > 1),
    ("a smaller model.max_length", lambda config: config.model.max_length > 128),
    ("--set model.precision=bfloat16", lambda config: config.model.precision == "float32"),
    ("--set adapter.type=qlora", lambda config: config.model.precision != "int4"),
)
"""What lowers the memory of a run, and when there is something left to lower."""


def doctor(
    config: Annotated[str | None, typer.Argument(help="A TOML file or a shipped name, to be estimated too.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, cores, memory, GPU and disk; for a configuration also memory, time and bytes before it starts.

    Ends with exit code 1 when something is missing or does not fit.
    """
    with reserved_stdout(as_json):
        found = _look(config, settings or [])
    if as_json:
        print_json(found)
    else:
        console = stdout()
        for part in ("machine", "packages", "extras", "estimate"):
            if found.get(part):
                console.print(_table(part, {name: value for name, value in found[part].items() if name != "notes"}))
        for note in found.get("estimate", {}).get("notes", ()):
            say(f"note: {note}")
        for problem in found["problems"]:
            say(f"problem: {problem}")
        if not found["problems"]:
            say("no problems found")
    if found["problems"]:
        raise typer.Exit(1)


def _look(name: str | None, settings: list[str]) -> dict[str, Any]:
    from silotune.config import load_config
    from silotune.record import environment
    from silotune.shipped import find

    config = load_config(find(name), settings) if name else None
    folder = config.record.folder if config else Path("runs")
    versions = environment.versions()
    packages = {"python": versions["python"], **versions["packages"]}
    found: dict[str, Any] = {
        "machine": {
            "platform": versions["platform"],
            "cores": versions["cores"],
            **{f"memory_{name}_bytes": size for name, size in environment.memory().items()},
            "gpus": environment.gpus(),
            "disk_free_bytes": environment.disk_free_bytes(folder),
        },
        "packages": packages,
        "extras": environment.extras(),
        "problems": [
            f"{package} is not installed: pip install 'silotune'"
            for package in environment.PACKAGES
            if packages[package] is None and package != "silotune"
        ],
    }
    if config:
        _examine(config, found)
    return found


def _examine(config: Config, found: dict[str, Any]) -> None:
    """Adds what a run would need: packages, memory for the base's weights, a few real steps; a problem ends it."""
    from silotune.experiment.needs import missing_packages

    found["problems"] += missing_packages(config)
    if found["problems"]:
        return
    from silotune.experiment.estimate import estimate, least_memory

    for look in (least_memory, estimate):
        if not found["problems"]:
            found["estimate"] = look(config)
            found["problems"] += _misfits(config, found)


def _misfits(config: Config, found: Mapping[str, Any]) -> list[str]:
    """Where a configuration needs more than nine tenths of what this machine has, each with what to do."""
    from silotune.report.runs import bytes_text

    estimate, machine = found["estimate"], found["machine"]
    gpu_memory = max((gpu["memory_bytes"] or 0 for gpu in machine["gpus"]), default=0)
    pairs = (
        ("main memory", estimate.get("memory_bytes"), machine["memory_available_bytes"]),
        ("GPU memory", estimate.get("gpu_memory_bytes"), gpu_memory),
    )
    remedies = [text for text, applies in _REMEDIES if applies(config)] or ["a smaller model"]
    return [
        f"{kind}: {bytes_text(needed)} needed, {bytes_text(room)} there; try one of: {'; '.join(remedies)}"
        for kind, needed, room in pairs
        if needed and room and needed > 0.9 * room
    ]


def _table(title: str, values: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _text(name, value))
    return table


def _text(name: str, value: Any) -> str:
    """A value for people, in the unit that its name says."""
    from silotune.report.runs import bytes_text, seconds_text

    if value is None:
        return "not found"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_text(name, item) for item in value) or "none"
    if isinstance(value, (int, float)) and "bytes" in name:
        return bytes_text(value)
    if isinstance(value, (int, float)) and "seconds" in name:
        return seconds_text(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
