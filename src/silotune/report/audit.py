"""An audit trail for people and auditors: one line an entry, and JSON, CSV, HTML and PDF files.

Names and reasons in a trail come from other parties: none of their characters may act on a terminal, and none of their
cells may be run as a formula.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.errors import AuditError, SilotuneError
from silotune.experiment.audit import Checked, trail_of, verify_run
from silotune.record.chain import Entry, read_chain
from silotune.record.files import write_bytes
from silotune.record.printable import one_line, printable

_SHOWN = ("round", "client", "kind", "rule", "reason", "num_examples", "weights", "tensors", "adapter", "request")
_COLUMNS = ("index", "time", "actor", "event", "round", "client", "details", "key", "signature", "previous", "hash")
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""How a formula begins, in letters of full width too, which some spreadsheets take."""
_DIGEST = 64
_LINES_A_PAGE = 62
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Audit trail</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .25rem .5rem; vertical-align: top }
td { border-top: 1px solid #ddd; font-variant-numeric: tabular-nums } code { font-size: 12px; word-break: break-all }
.verdict { padding: .75rem 1rem; border-left: 4px solid #767676; background: #f5f5f5 }
</style></head><body>
<h1>Audit trail</h1>
<p class="verdict">{{ verdict }}</p>
<table><thead><tr><th>entry</th><th>time (UTC)</th><th>by</th><th>event</th><th>round</th><th>client</th>
<th>details</th><th>hash</th></tr></thead><tbody>
{% for row in rows %}<tr><td>{{ row.index }}</td><td>{{ row.time }}</td><td>{{ row.actor }}</td><td>{{ row.event }}</td>
<td>{{ row.round }}</td><td>{{ row.client }}</td><td><code>{{ row.details }}</code></td>
<td><code>{{ row.hash }}</code></td></tr>
{% endfor %}</tbody></table></body></html>
"""


def row_of(entry: Entry) -> dict[str, Any]:
    """An entry as flat values."""
    details = {name: value for name, value in entry.fields.items() if name not in ("round", "client")}
    return {
        "index": entry.index,
        "time": _moment(entry.time, timespec="milliseconds"),
        "actor": entry.actor,
        "event": entry.event,
        "round": entry.fields.get("round", ""),
        "client": entry.fields.get("client", ""),
        "details": json.dumps(details, ensure_ascii=False, sort_keys=True),
        "key": entry.key,
        "signature": entry.signature,
        "previous": entry.previous,
        "hash": entry.hash,
    }


def _shown(entry: Entry) -> dict[str, Any]:
    """The same for people: each text as ``one_line`` makes it."""
    return {name: one_line(value) if isinstance(value, str) else value for name, value in row_of(entry).items()}


def line_of(entry: Entry) -> str:
    """An entry in one line, as ``one_line`` makes it; digests are cut to their first 12 characters."""
    when = _moment(entry.time, timespec="seconds").removesuffix("+00:00").replace("T", " ")
    shown = ", ".join(f"{name} {_short(entry.fields[name])}" for name in _SHOWN if entry.fields.get(name) is not None)
    return one_line(f"{entry.index:5}  {when}  {entry.actor:14} {entry.event:12} {shown}")


def _moment(seconds: float, *, timespec: str) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=timespec)


def write_audit(folder: Path, out: Path) -> str:
    """Writes a trail into a file; its ending says the format.

    Returns:
        What verifying the trail said, which stands in the file as well (but for CSV, which is the bare rows).

    Raises:
        AuditError: There is no trail, or a line of it is no entry; or it does not verify, which the file says too.
    """
    entries = read_chain(trail_of(folder))
    try:
        verdict = verdict_of(folder)
    except SilotuneError as error:
        fault = one_line(f"DOES NOT VERIFY: {error}")
        write_bytes(out, FORMATS[out.suffix](entries, fault))
        raise AuditError(f"{out} was written; its trail {fault}") from None
    write_bytes(out, FORMATS[out.suffix](entries, verdict))
    return verdict


def verdict_of(folder: Path) -> str:
    """What verifying the trail of a folder says.

    Raises:
        AuditError: It does not verify.
    """
    return _verdict(verify_run(folder, is_open_allowed=True, is_uncountersigned_allowed=True))


def _verdict(found: Checked) -> str:
    chain = found.chain
    signers = "; ".join(f"{who}: {', '.join(own)}" for who, own in chain.keys.items())
    is_open = f"never closed: it is that of site {found.site}" if found.site else "not closed: the run had not ended"
    closed = "closed" if chain.is_closed else is_open
    again = f"; the updates of {found.rounds} rounds aggregate to its weights" if found.rounds else ""
    missing = f"; NOT countersigned by {', '.join(found.uncountersigned)}" if found.uncountersigned else ""
    covered = f"; {len(found.coverage.covered)} files of the run are covered"
    beside = f", not covered: {', '.join(map(ascii, found.coverage.uncovered))}" if found.coverage.uncovered else ""
    return one_line(
        f"Verified: {len(chain.entries)} entries in order, {closed}{again}{missing}{covered}{beside}. "
        f"Head {chain.head}. Keys: {signers}"
    )


def _json(entries: Sequence[Entry], verdict: str) -> bytes:
    document = {"verdict": verdict, "entries": [{**row_of(entry), "fields": entry.fields} for entry in entries]}
    return printable(json.dumps(document, indent=2, ensure_ascii=False)).encode() + b"\n"


def _csv(entries: Sequence[Entry], verdict: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow({name: _harmless(value) for name, value in _shown(entry).items()})
    return text.getvalue().encode()


def _html(entries: Sequence[Entry], verdict: str) -> bytes:
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(verdict=verdict, rows=[_shown(entry) for entry in entries]).encode()


def _pdf(entries: Sequence[Entry], verdict: str) -> bytes:
    import textwrap

    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    lines = ["Audit trail", "", *textwrap.wrap(verdict, 128), ""]
    for entry in entries:
        lines += textwrap.wrap(line_of(entry), 128, subsequent_indent=" " * 28)
    buffer = io.BytesIO()
    with PdfPages(buffer) as pages:
        for start in range(0, len(lines), _LINES_A_PAGE):
            sheet = Figure(figsize=(11.69, 8.27))  # A4, landscape, in inches
            text = "\n".join(lines[start : start + _LINES_A_PAGE])
            sheet.text(0.04, 0.96, text, family="monospace", fontsize=7, va="top", parse_math=False)
            pages.savefig(sheet)
    return buffer.getvalue()


FORMATS: Mapping[str, Callable[[Sequence[Entry], str], bytes]] = {
    ".json": _json,
    ".csv": _csv,
    ".html": _html,
    ".pdf": _pdf,
}
"""Ending -> how the file's content is made."""


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == _DIGEST else value


def _harmless(value: Any) -> Any:
    """A spreadsheet would run a text that begins like a formula; a client's name or a signature could be one."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value
