"""A leakage audit for people: a page (HTML), a text (Markdown) and the signed JSON, from one report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.errors import RunFolderError
from silotune.record.files import new_folder, read_json, write_bytes
from silotune.record.plain_json import canonical
from silotune.record.printable import one_line, printable
from silotune.record.signatures import verify

FOLDER = "leakage"
"""Where in a run folder its report is."""
JSON_FILE, PAGE_FILE, TEXT_FILE = "leakage.json", "leakage.html", "leakage.md"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Leakage audit of {{ run }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
th, td { text-align: left; padding: .3rem .6rem; vertical-align: top; border-top: 1px solid #ddd }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.verdict { padding: .75rem 1rem; border-left: 4px solid #767676; background: #f5f5f5 }
.bar { display: inline-block; height: .7rem; background: #35618f } .base { background: #b9b9b9 }
code { font-size: 12px; word-break: break-all } h2 { margin-top: 2rem }
@media print { body { margin: 0; max-width: none } }
</style></head><body>
<h1>Leakage audit of {{ run }}</h1>
<p>Protection: {{ protection }}. Made {{ moment }} in {{ seconds }} s.</p>
<div class="verdict">{% for line in verdict %}<p>{{ line }}</p>{% endfor %}</div>
<h2>Who sees what</h2>
<table>{% for name, sees in adversaries.items() %}<tr><th>{{ name }}</th><td>{{ sees }}</td></tr>{% endfor %}</table>
<h2>What came out</h2>
<table><thead><tr><th>adversary</th><th>attack</th><th>about</th><th>figure</th><th>95 % interval</th><th>baseline</th>
<th>lift</th><th></th></tr></thead><tbody>
{% for row in rows %}<tr><td>{{ row.adversary }}</td><td>{{ row.attack }}<br><small>{{ row.metric }}</small></td>
<td>{{ row.about }}</td><td class="number">{{ row.value }}</td>
<td class="number">{{ row.interval }}</td>
<td class="number">{{ row.baseline }}<br><small>{{ row.baseline_is }}</small></td><td class="number">{{ row.lift }}</td>
<td>{% if row.bar is not none %}<span class="bar" style="width:{{ row.bar }}px"></span><br>
<span class="bar base" style="width:{{ row.base_bar }}px"></span>{% endif %}</td></tr>
{% endfor %}</tbody></table>
<h2>In words</h2><ul>{% for row in rows %}<li>{{ row.says }}</li>{% endfor %}</ul>
{% if worst %}<h2>Worst record</h2><p>{{ worst }}</p>{% endif %}
<h2>What was not tried</h2>
<table>{% for item in not_tried %}<tr><th>{{ item.attack }}</th><td>{{ item.adversary }}</td>
<td>{{ item.why }}</td></tr>
{% endfor %}</table>
<h2>Forecast for this configuration</h2><ul>{% for line in forecast %}<li>{{ line }}</li>{% endfor %}</ul>
<h2>Identity</h2>
<table>{% for name, value in identity %}
<tr><th>{{ name }}</th><td><code>{{ value }}</code></td></tr>{% endfor %}</table>
</body></html>
"""


def verdict_of(report: Mapping[str, Any]) -> list[str]:
    """Three sentences: the largest lift over its baseline, the claim, and what the report does not show."""
    lifts = [
        (figure["value"] - figure["baseline"], figure)
        for figure in report["figures"]
        if figure["baseline"] is not None and figure["attack"] not in _NO_LIFT
    ]
    lines = []
    if lifts:
        lines.append(f"What came out furthest above its baseline: {max(lifts, key=lambda pair: pair[0])[1]['says']}")
    else:
        lines.append("No attack of this audit could be made on this run.")
    bound = next(
        (each for each in report["figures"] if (each["attack"], each["about"]) == ("canaries", "epsilon")), None
    )
    if bound is not None:
        lines.append(bound["says"])
    lines.append(
        f"{len(report['not_tried'])} attacks were not tried (below); what an attack did not find here, a better one "
        "may: this report bounds leakage from below, never from above."
    )
    return lines


_NO_LIFT = ("canaries", "members differ from the reserve")


def rows_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures as cells of a table."""
    return [_row(figure) for figure in report["figures"]]


def _row(figure: Mapping[str, Any]) -> dict[str, Any]:
    value, base, interval = figure["value"], figure["baseline"], figure["interval"]
    is_share = base is not None and 0 <= value <= 1 and 0 <= base <= 1
    texts = {
        name: printable(str(figure[name])) for name in ("adversary", "attack", "about", "metric", "baseline_is", "says")
    }
    return {
        **texts,
        "value": f"{value:.3f}",
        "interval": "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        "baseline": "" if base is None else f"{base:.3f}",
        "lift": "" if base is None or figure["attack"] in _NO_LIFT else f"{value - base:+.3f}",
        "bar": round(120 * value) if is_share else None,
        "base_bar": round(120 * base) if is_share else None,
    }


def worst_line(report: Mapping[str, Any]) -> str:
    """The worst record, by client and row; empty without one."""
    worst = report.get("worst")
    if not worst:
        return ""
    return (
        f"Example {worst['row']} of {worst['client']} is what the final model gives away most, of {worst['of']} that "
        f"were attacked: {worst['share_of_reserve_above']:.1%} of the reserve look as much like it."
    )


def _identity(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    signed = "signed" if report.get("signature") else "not signed: give --key"
    return [
        ("run", str(report["run"])),
        ("seed", str(report["seed"])),
        *((f"SHA-256 of {name}", str(value)) for name, value in report["hashes"].items()),
        *((f"{name}", json.dumps(value)) for name, value in report["versions"].items()),
        ("key", str(report.get("key") or "")),
        ("signature", str(report.get("signature") or signed)),
    ]


def page(report: Mapping[str, Any]) -> bytes:
    """The report as a page that needs nothing else and prints."""
    from jinja2 import Environment

    made = Environment(autoescape=True).from_string(_PAGE)
    return made.render(
        run=printable(str(report["run"])),
        protection=report["protection"],
        moment=_moment(report),
        seconds=f"{report['seconds']:.0f}",
        verdict=verdict_of(report),
        adversaries=report["adversaries"],
        rows=rows_of(report),
        worst=printable(worst_line(report)),
        not_tried=report["not_tried"],
        forecast=report["forecast"],
        identity=_identity(report),
    ).encode()


def text(report: Mapping[str, Any]) -> bytes:
    """The report as Markdown."""
    columns = ("adversary", "attack", "about", "metric", "value", "interval", "baseline", "baseline_is", "lift")
    lines = [
        f"# Leakage audit of {_cell(report['run'])}",
        "",
        f"Protection: {report['protection']}. Made {_moment(report)} in {report['seconds']:.0f} s.",
        "",
        *(f"> {_cell(line)}\n>" for line in verdict_of(report)),
        "",
        "## Who sees what",
        "",
        *(f"- **{name}**: {sees}" for name, sees in report["adversaries"].items()),
        "",
        "## What came out",
        "",
        f"| {' | '.join(name.replace('_', ' ') for name in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cell(row[name]) for name in columns)} |" for row in rows_of(report)),
        "",
        *(f"- {_cell(row['says'])}" for row in rows_of(report)),
        "",
        *([f"## Worst record\n\n{_cell(worst_line(report))}\n"] if worst_line(report) else []),
        "## What was not tried",
        "",
        *(f"- {item['attack']} ({item['adversary']}): {item['why']}" for item in report["not_tried"]),
        "",
        "## Forecast for this configuration",
        "",
        *(f"- {line}" for line in report["forecast"]),
        "",
        "## Identity",
        "",
        *(f"- {name}: `{_cell(value)}`" for name, value in _identity(report)),
    ]
    return ("\n".join(lines) + "\n").encode()


def _cell(value: Any) -> str:
    """A text that ends no cell of a table, and acts on nothing."""
    return one_line(str(value)).replace("|", "\\|").replace("<", "&lt;")


def _moment(report: Mapping[str, Any]) -> str:
    return datetime.fromtimestamp(report["time"], UTC).isoformat(timespec="seconds")


def document(report: Mapping[str, Any]) -> bytes:
    """The report as it was signed."""
    return canonical(report) + b"\n"


FILES: Mapping[str, Callable[[Mapping[str, Any]], bytes]] = {JSON_FILE: document, PAGE_FILE: page, TEXT_FILE: text}
"""Name of a file -> how its content is made of a report."""


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Writes all forms of a report into a new folder.

    Raises:
        RunFolderError: The folder is there, or the disk is full.
    """
    with new_folder(folder) as building:
        for name, make in FILES.items():
            write_bytes(building / name, make(report))
    return folder


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in a folder; None where there is none.

    Raises:
        RunFolderError: It is broken.
    """
    place = folder / JSON_FILE
    if not place.is_file():
        return None
    read = read_json(place)
    if not isinstance(read, dict) or not isinstance(read.get("figures"), list):
        raise RunFolderError(f"{str(place)!r} is not a report of a leakage audit")
    return read


def signer_of(report: Mapping[str, Any]) -> str:
    """The public key that signed a report; empty where nobody did, or its signature does not fit."""
    said = {name: value for name, value in report.items() if name != "signature"}
    key = str(said.get("key", ""))
    return key if key and verify(key, "leakage", canonical(said), str(report.get("signature", ""))) else ""


def lines_of(report: Mapping[str, Any]) -> Sequence[str]:
    """What the command prints: the verdict, every figure as a sentence, and what was not tried."""
    return [
        *(row["says"] for row in rows_of(report)),
        *filter(None, [worst_line(report)]),
        *(f"not tried: {item['attack']}: {item['why']}" for item in report["not_tried"]),
        *report["forecast"],
    ]
