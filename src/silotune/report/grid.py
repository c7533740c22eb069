"""Writes the report of a grid: one HTML page that needs nothing else, the same as Markdown, CSV, and all figures."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from silotune.evaluation.comparison import Comparison, compare
from silotune.evaluation.observations import observe
from silotune.record.environment import version_of
from silotune.record.files import write_bytes
from silotune.record.grids import GridFolder
from silotune.record.runs import RunFolder
from silotune.report.figures import Picture, apart, pictures
from silotune.report.findings import Facts, findings
from silotune.report.privacy import epsilon_pictures
from silotune.report.rendering import rendered
from silotune.report.runs import seconds_text
from silotune.report.tables import CELL_HEADS, TextTable, cell_rows, tables

PAGE, TEXT, CELLS, FIGURES = "index.html", "report.md", "cells.csv", "figures"
_SECTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "modes": ("Alone, together, pooled", ("results", "summary-claims", "claims")),
    "privacy": ("What is promised", ("privacy",)),
    "rounds": ("By round", ()),
    "skew": ("Who holds what", ()),
    "quality": ("Quality in full", ("quality", "classes")),
    "bytes": ("Bytes", ()),
    "energy": ("Energy and other costs", ("costs", "efficiency")),
    "methods": ("How it was done", ("tuning", "missing")),
}
"""Sections of the report in order: heading, and the tables in it; pictures name their section themselves."""


@dataclass(frozen=True, slots=True)
class GridReport:
    """What a grid has come to, and where its report lies."""

    comparison: Comparison
    findings: tuple[str, ...]
    files: tuple[Path, ...]


def write_report(folder: GridFolder, out: Path | None = None) -> GridReport:
    """Writes the whole report.

    Args:
        folder: A grid folder; cells without a result are named in the report.
        out: Where to; ``report/`` of the grid folder when None.

    Raises:
        RunFolderError: A run folder is damaged, or ``out`` may not be written.
    """
    place = out or folder.path / "report"
    comparison = compare(observe(folder))
    facts = facts_of(folder)
    said = findings(comparison, facts)
    found = apart([*pictures(folder, comparison), *epsilon_pictures(comparison.rows)])
    made = tables(folder, comparison)
    drawn = {picture.name: {form: picture.encoded(form) for form in ("svg", "png")} for picture in found}
    embedded = [(picture.section, _embedded(picture, drawn[picture.name]["svg"])) for picture in found]
    view = _view(folder, said, made, embedded)
    files = {
        PAGE: rendered("grid.html.jinja", view).encode(),
        TEXT: rendered("grid.md.jinja", view).encode(),
        CELLS: _csv(cell_rows(folder, comparison.observations)),
    }
    files |= {f"{FIGURES}/{name}.{form}": content for name, forms in drawn.items() for form, content in forms.items()}
    for name, content in files.items():
        write_bytes(place / name, content)
    return GridReport(comparison, tuple(said), tuple(place / name for name in files))


def facts_of(folder: GridFolder) -> Facts:
    """What the findings need to know of a grid beside its figures."""
    cells, undone, failures = folder.cells(), folder.undone(), folder.failures()
    failed = sum(cell.folder in failures for cell in undone)
    return Facts(
        cells=len(cells),
        failed=failed,
        missing=len(undone) - failed,
        budget_bytes=folder.description().get("budget_bytes"),
        most_jobs=max((int(session["jobs"]) for session in folder.sessions()), default=1),
    )


def _view(
    folder: GridFolder, said: list[str], made: list[TextTable], found: list[tuple[str, dict[str, str]]]
) -> dict[str, Any]:
    by_name = {table.name: table for table in made}
    sections = [
        {
            "name": name,
            "title": title,
            "tables": [by_name[own] for own in names if own in by_name],
            "pictures": [picture for section, picture in found if section == name],
        }
        for name, (title, names) in _SECTIONS.items()
    ]
    description = folder.description()
    return {
        "grid": description,
        "findings": said,
        "sections": sections,
        "budgets": _budgets(folder),
        "notes": _said(folder, _notes),
        "promises": _said(folder, _promise),
        "sizes": [(axis, ", ".join(str(name) for name in description[axis])) for axis in _LISTS],
        "is_energy_drawn": any(section == "energy" for section, _ in found),
        "version": version_of("silotune") or "source tree",
        "figures": FIGURES,
        "cells_file": CELLS,
        "sessions": _sessions(folder),
    }


_LISTS = ("tasks", "models", "adapters", "algorithms", "partitions", "modes", "seeds")


def _embedded(picture: Picture, drawing: bytes) -> dict[str, str]:
    data = base64.b64encode(drawing).decode()
    return {
        "name": picture.name,
        "caption": picture.caption,
        "alternative": picture.alternative,
        "address": f"data:image/svg+xml;base64,{data}",
    }


def _budgets(folder: GridFolder) -> list[tuple[str, str]]:
    """What "same budget" means for each task and partition, as its first finished cell of several modes says it."""
    found: dict[tuple[str, str], str] = {}
    for cell in folder.cells():
        if folder.is_done(cell) and len(cell.modes) > 1:
            found.setdefault((cell.task, cell.partition), str(folder.run(cell).read_json("summary")["budget"]))
    return [(f"{task}, {partition}", text) for (task, partition), text in found.items()]


def _said(folder: GridFolder, lines: Callable[[Mapping[str, Any]], Iterable[str]]) -> list[tuple[str, str]]:
    """What the runs themselves say, in the lines of their summaries, each with how many of them said it."""
    counts: dict[str, int] = {}
    for cell in folder.cells():
        if folder.is_done(cell):
            for line in dict.fromkeys(lines(folder.run(cell).read_json("summary"))):
                counts[line] = counts.get(line, 0) + 1
    return [(line, f"{count} run{'' if count == 1 else 's'}") for line, count in counts.items()]


def _notes(summary: Mapping[str, Any]) -> Iterable[str]:
    """What a reader should know."""
    return summary.get("notes", ())


def _promise(summary: Mapping[str, Any]) -> Iterable[str]:
    """What the server sees, what is protected and who is trusted, in one line."""
    statement = (summary.get("privacy") or {}).get("statement")
    return ["; ".join(statement)] if statement else ()


def _sessions(folder: GridFolder) -> str:
    """How long it took, and how much of that was neither training nor scoring."""
    sessions = folder.sessions()
    seconds = sum(session["seconds"] for session in sessions)
    if not sessions:
        return "It has not been worked on to the end of a session yet."
    text = f"{len(sessions)} session{'' if len(sessions) == 1 else 's'}, {seconds_text(seconds)} in all"
    runs, computed = folder.finished(), sum(session["computed"] for session in sessions)
    if not computed:
        return f"{text}."
    spent = sum(session["jobs"] * session["seconds"] for session in sessions if session["computed"])
    inside = _inside_seconds(runs)
    if inside is None or computed != len(runs) or inside > spent:
        return f"{text}; some cells were computed in sessions that were killed, so the overhead is not known."
    return (
        f"{text}; {100 * (1 - inside / spent):.1f} % of the processes' time went to neither training nor scoring "
        "(imports, loading data and models, writing summaries, waiting)."
    )


def _inside_seconds(runs: Sequence[RunFolder]) -> float | None:
    """Seconds between the beginnings and ends of all parts of runs; None where one was continued."""
    total = 0.0
    for run in runs:
        began = None
        for row in run.read_rows("events"):
            if row["event"] == "mode_started":
                if began is not None:
                    return None
                began = row["time"]
            elif row["event"] == "mode_finished" and began is not None:
                total, began = total + row["time"] - began, None
    return total


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CELL_HEADS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_mapping(report: GridReport) -> dict[str, Any]:
    """The report's numbers, for scripts."""
    comparison = report.comparison
    return {
        "findings": list(report.findings),
        "rows": [asdict(row) for row in comparison.rows],
        "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in comparison.claims],
        "summaries": [{**asdict(claim), "verdict": claim.verdict} for claim in comparison.summaries],
        "efficiency": [
            {name: value for name, value in asdict(each).items() if name != "row"}
            | {name: getattr(each.row, name) for name in ("task", "model", "adapter", "partition", "algorithm")}
            for each in comparison.efficiency
        ],
        "files": [str(path) for path in report.files],
    }
