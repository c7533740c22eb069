"""The page of one run, in sections: the same for a run that goes on and for one that has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from silotune.record.environment import version_of
from silotune.record.files import write_bytes
from silotune.report.lines import Line, Point, chart
from silotune.report.rendering import TEMPLATES, environment, rendered
from silotune.report.runs import bytes_text, scaled_text, seconds_text, tables_of
from silotune.report.watched import Client, Part, WatchedRun, inner, kind_text, kind_title, number, whole, word, words

if TYPE_CHECKING:
    from rich.table import Table

PAGE = "report.html"
MOST_LINES, NEWEST_ROUNDS, NEWEST_FAILURES, NEWEST_ENTRIES = 8, 20, 40, 25
_MODE_TITLES = {"federated": "federated", "isolated": "each alone", "centralized": "centralised"}
_STATES = {
    "finished": "finished",
    "running": "running",
    "stopped": "stopped",
    "unknown": "state unknown",
}


def write_run_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of one run as an HTML file that needs nothing else: no script, no network.

    Args:
        folder: The run folder, finished or not.
        out: The file; ``report.html`` in the run folder when None.

    Raises:
        RunFolderError: The file may not be written.
    """
    run = WatchedRun(folder)
    run.refresh()
    place = out or folder / PAGE
    write_bytes(place, whole_page(word(folder.name), sections(run)).encode())
    return place


def whole_page(title: str, parts: Mapping[str, Markup]) -> str:
    """Sections as one file, with their style in it."""
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    view = {
        "title": title,
        "sections": parts,
        "style": Markup(style),  # a file of ours, which holds no "<"
        "policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        "version": version_of("silotune") or "source tree",
        "written": clock_text(time.time()),
    }
    return rendered("saved.html.jinja", view)


def sections(run: WatchedRun) -> dict[str, Markup]:
    """Section -> its HTML, in order; a section that has nothing to say is empty."""
    macros = environment().get_template("run.html.jinja").module
    return {name: getattr(macros, name)(**make(run)) for name, make in _SECTIONS.items()}


def clock_text(seconds: float | None) -> str:
    """A time for people, in UTC; ``-`` where it is not known."""
    if seconds is None or not 0 <= seconds < 253402300800:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def facts(run: WatchedRun) -> dict[str, Any]:
    """What a line of a list of runs says of one."""
    part, config = run.shown, run.document("config")
    rounds = None if part is None else run.rounds_of(part)
    last = None if part is None or part.last is None else part.last.number
    left = run.seconds_left()
    task, model = word(inner(config, "data").get("task")), word(inner(config, "model").get("name"))
    figure = part.scored[-1][1] if part is not None and part.scored else None
    kept = _kept(run)
    kept_figure = number(inner(run.federated.result.value, "metrics"), part.kind) if part and run.federated else None
    return {
        "state": run.state,
        "state_text": _STATES[run.state],
        "round": "-" if last is None else f"{last} of {rounds}" if rounds else str(last),
        "part": "" if part is None else _title(part),
        "left": "-" if left is None else seconds_text(left),
        "figure": "-" if part is None else kind_text(part, kept_figure if kept_figure is not None else figure),
        "figure_title": "" if part is None else kind_title(part),
        "task": task,
        "model": model,
        "adapter": word(inner(config, "adapter").get("type")),
        "algorithm": word(inner(config, "federation", "algorithm").get("type")),
        "seconds": seconds_text(run.total("seconds")),
        "bytes_up": bytes_text(run.total("bytes_up")),
        "bytes_down": bytes_text(run.total("bytes_down")),
        "energy": scaled_text(run.total("joules"), "J"),
        "heard": clock_text(run.heard),
        "kept": kept,
        "failed": 0 if run.federated is None else len(run.federated.failures),
    }


def _kept(run: WatchedRun) -> str:
    part = run.federated
    kept = None if part is None else whole(part.result.value, "round")
    return "-" if kept is None else f"round {kept}"


def _title(part: Part) -> str:
    title = _MODE_TITLES.get(part.mode, part.mode)
    return f"{part.client} alone" if part.client else title


def _head(run: WatchedRun) -> dict[str, Any]:
    return {
        "name": word(run.path.name),
        "folder": word(str(run.path)),
        "facts": facts(run),
        "started": clock_text(run.started),
        "resumed": max(0, run.sessions - 1),
        "faults": run.faults,
    }


def _now(run: WatchedRun) -> dict[str, Any]:
    """Who was asked in the round that goes on, and who has answered."""
    place, kind, asked, done = run.trail.present()
    waiting = [name for name in asked if name not in done]
    least = whole(inner(run.document("config"), "federation"), "min_replies")
    return {
        "is_shown": run.state != "finished" and place is not None,
        "is_running": run.state == "running",
        "round": place,
        "kind": kind,
        "asked": len(asked),
        "answered": done,
        "waiting": waiting,
        "least": least,
    }


def _results(run: WatchedRun) -> dict[str, Any]:
    """The tables of a finished run; before that, the figure that each part has reached."""
    summary = run.document("summary")
    if summary:
        try:
            return {"tables": [_plain(table) for table in tables_of(summary)], "fault": ""}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration):
            return {"tables": [], "fault": "summary.json is damaged: it is not that of a run"}
    parts = [part for part in run.parts.values() if part.rounds]
    if not parts:
        return {"tables": [], "fault": ""}
    rows = [
        (
            _title(part),
            f"{part.last.number if part.last else 0} of {run.rounds_of(part) or '?'}",
            kind_text(part, part.scored[-1][1]) if part.scored else "-",
            "-" if not part.losses else f"{part.losses[-1][1]:.3f}",
            "done" if part.is_done else "",
        )
        for part in parts[:MOST_ROWS]
    ]
    heads = ("trained", "round", kind_title(parts[0]), "training loss", "")
    table = {"title": "so far", "heads": heads, "rows": rows, "notes": _more(len(parts)), "words": 1}
    return {"tables": [table], "fault": ""}


MOST_ROWS = 100


def _more(rows: int) -> list[str]:
    return [f"the first {MOST_ROWS} of {rows}"] if rows > MOST_ROWS else []


def _plain(table: Table) -> dict[str, Any]:
    """A table made for terminals, as rows of texts."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    caption = "" if table.caption is None else str(table.caption)
    return {
        "title": "" if table.title is None else str(table.title),
        "heads": [str(column.header).replace("\n", " ") for column in table.columns],
        "rows": list(zip(*columns, strict=True)),
        "notes": caption.splitlines(),
        "words": 1,
    }


def _curves(run: WatchedRun) -> dict[str, Any]:
    part = run.federated or run.shown
    if part is None or not part.rounds:
        return {"charts": [], "rounds": [], "heads": (), "number": 0}
    rounds = run.rounds_of(part)
    charts = [
        _titled(f"{kind_title(part)} by round", _figures(run, part), lambda value: kind_text(part, value), rounds),
        _titled("Training loss by round and institution", _losses(part), lambda value: f"{value:.3g}", rounds),
    ]
    newest = sorted(part.rounds)[-NEWEST_ROUNDS:]
    rows = [_round_row(part, place) for place in reversed(newest)]
    heads = ("round", kind_title(part), "training loss", "seconds", "sent up", "sent down", "answered")
    return {
        "charts": [each for each in charts if each["drawing"]],
        "rounds": rows,
        "heads": heads,
        "number": len(part.rounds),
    }


def _titled(title: str, lines: Sequence[Line], shown: Callable[[float], str], rounds: int | None) -> dict[str, Any]:
    return {"title": title, "drawing": chart(lines, label=title, shown=shown, most_x=rounds)}


def _figures(run: WatchedRun, part: Part) -> list[Line]:
    """The figure by round; what the others came to, as levels."""
    points = _floats(part.scored)
    kept = whole(part.result.value, "round")
    mark = next((point for point in points if point[0] == kept), None)
    lines = [Line(_title(part) + (f", round {kept} kept" if mark else ""), points, mark=mark)]
    pooled = run.parts.get("centralized")
    if pooled is not None and pooled is not part and pooled.scored:
        lines.append(Line("centralised", [_last(pooled)], is_level=True))
    alone = [_last(each) for key, each in run.parts.items() if key.startswith("isolated/") and each.scored]
    if alone:
        lines.append(Line("each alone: mean", [(0.0, sum(y for _, y in alone) / len(alone))], is_level=True))
    return lines


def _last(part: Part) -> Point:
    """The figure that a part is judged by: that of its result, else of its newest scored round."""
    kept = number(inner(part.result.value, "metrics"), part.kind)
    place, value = part.scored[-1]
    return float(place), value if kept is None else kept


def _losses(part: Part) -> list[Line]:
    lines = [Line("mean", _floats(part.losses))]
    own = [(name, client) for name, client in part.clients.items() if client.losses and name != "(sum)"]
    own.sort(key=lambda each: (-(each[1].examples or 0), each[0]))
    lines += [Line(name, _floats(sorted(client.losses.items()))) for name, client in own[:MOST_LINES]]
    return lines


def _floats(points: Sequence[tuple[int, float]]) -> list[Point]:
    return [(float(x), y) for x, y in points]


def _round_row(part: Part, place: int) -> tuple[str, ...]:
    each = part.rounds[place]
    answered = f"{len(each.asked) - len(each.failed)} of {len(each.asked)}" if each.asked else "-"
    return (
        str(place),
        "-" if each.figure is None else kind_text(part, each.figure),
        "-" if each.loss is None else f"{each.loss:.3f}",
        "-" if each.seconds is None else f"{each.seconds:.1f}",
        bytes_text(each.bytes_up),
        bytes_text(each.bytes_down),
        answered,
    )


def _institutions(run: WatchedRun) -> dict[str, Any]:
    """Who holds how much, came how often, and failed how often."""
    part = run.federated
    held = inner(run.document("partition"), "clients")
    if part is None:
        return {"rows": [], "heads": (), "least": None, "more": []}
    asked, failed = _counts(part)
    names = [name for name in dict.fromkeys([*map(word, held), *part.clients, *asked]) if name != "(sum)"]
    rounds = sum(1 for place in part.rounds if place)
    rows = []
    for name in names[:MOST_ROWS]:
        examples = whole(inner(held, name), "num_examples")
        times, lost = asked.get(name, 0), failed.get(name, 0)
        came = (f"{times - lost} of {times}", str(lost), str(max(0, rounds - times)))
        rows.append((name, *_own(part, name, examples, came), _last_failure(part, name)))
    heads = ("institution", "examples", "answered", "failed", "not asked", "newest loss", "epsilon", "last failure")
    least = whole(inner(run.document("config"), "federation"), "min_replies")
    return {"rows": rows, "heads": heads, "least": least, "more": _more(len(names))}


def _own(part: Part, name: str, held: int | None, came: Sequence[str]) -> tuple[str, ...]:
    """An institution's examples, how often it came, its newest loss and its epsilon, as texts."""
    client = part.clients.get(name, Client())
    examples = held if held is not None else client.examples
    loss = client.losses[max(client.losses)] if client.losses else None
    return (
        "-" if examples is None else f"{examples:,}",
        *came,
        "-" if loss is None else f"{loss:.3f}",
        "-" if client.epsilon is None else f"{client.epsilon:.3g}",
    )


def _last_failure(part: Part, name: str) -> str:
    own = (failure for failure in reversed(part.failures) if failure.client == name)
    return next((f"round {failure.round}: {failure.reason}" for failure in own), "")


def _counts(part: Part) -> tuple[dict[str, int], dict[str, int]]:
    asked: dict[str, int] = {}
    failed: dict[str, int] = {}
    for each in part.rounds.values():
        for name in each.asked:
            asked[name] = asked.get(name, 0) + 1
        for name in each.failed:
            failed[name] = failed.get(name, 0) + 1
    return asked, failed


def _failures(run: WatchedRun) -> dict[str, Any]:
    every = [] if run.federated is None else run.federated.failures
    newest = every[-NEWEST_FAILURES:][::-1]
    rows = [(str(each.round), each.client, each.stage, each.reason) for each in newest]
    return {"rows": rows, "number": len(every), "heads": ("round", "institution", "stage or rule", "why")}


def _privacy(run: WatchedRun) -> dict[str, Any]:
    said, part = run.document("privacy"), run.federated
    planned = number(inner(said, "plan"), "epsilon")
    points = (
        []
        if part is None
        else [(float(each.number), each.epsilon) for each in _rounds(part) if each.epsilon is not None]
    )
    lines = [Line("epsilon spent", points)]
    if planned is not None:
        lines.append(Line("planned", [(0.0, planned)], is_level=True))
    rounds = None if part is None else run.rounds_of(part)
    label = "Epsilon spent by round"
    drawing = (
        chart(lines, label=label, shown=lambda value: f"{value:.3g}", least=0.0, most_x=rounds)
        if points
        else Markup("")
    )
    return {
        "statement": words(said.get("statement")),
        "drawing": drawing,
        "title": label,
        "spent": "" if not points else f"{points[-1][1]:.3g}",
        "planned": "" if planned is None else f"{planned:.3g}",
        "delta": number(inner(said, "plan"), "delta"),
    }


def _rounds(part: Part) -> list[Any]:
    return [part.rounds[place] for place in sorted(part.rounds)]


def _costs(run: WatchedRun) -> dict[str, Any]:
    """What each part has cost so far."""
    parts = [part for part in run.parts.values() if part.rounds]
    names = ("seconds", "bytes_up", "bytes_down", "joules")
    rows = [(_title(part), *_cost_texts([part.total(name) for name in names])) for part in parts[:MOST_ROWS]]
    if len(parts) > 1:
        rows.append(("all", *_cost_texts([run.total(name) for name in names])))
    source = word(inner(parts[0].result.value, "cost").get("energy_source")) if parts else ""
    heads = ("trained", "time, with scoring", "sent up", "sent down", "energy")
    notes = [f"energy is {source}"] if source in ("estimated", "measured", "unavailable") else []
    return {"rows": rows, "heads": heads, "notes": [*notes, *_more(len(parts))]}


def _cost_texts(values: Sequence[float | None]) -> tuple[str, str, str, str]:
    seconds, up, down, joules = values
    return seconds_text(seconds), bytes_text(up), bytes_text(down), scaled_text(joules, "J")


def _trail(run: WatchedRun) -> dict[str, Any]:
    """The newest entries of the audit trail."""
    rows = []
    for entry in run.trail.entries[-NEWEST_ENTRIES:][::-1]:
        fields = inner(entry, "fields")
        place, client = whole(fields, "round"), word(fields.get("client"))
        about = [word(fields.get("kind")), word(fields.get("rule")), word(fields.get("stage"))]
        when = clock_text(number(entry, "time"))
        rows.append(
            (str(whole(entry, "index") or 0), when, word(entry["event"]), "" if place is None else str(place), client,
             ", ".join(filter(None, about)))
        )  # fmt: skip
    heads = ("entry", "time", "event", "round", "institution", "of what")
    return {
        "rows": rows,
        "heads": heads,
        "number": run.trail.number,
        "is_closed": run.trail.is_closed,
        "folder": word(str(run.path)),
    }


def _notes(run: WatchedRun) -> dict[str, Any]:
    return {"notes": [note for note in run.notes if note]}


def _about(run: WatchedRun) -> dict[str, Any]:
    """The configuration and the versions, as the folder has them."""
    said = run.document("versions")
    packages = [(word(name), word(value) or "not installed") for name, value in inner(said, "packages").items()]
    machine = [(name, word(said.get(name))) for name in ("python", "platform", "machine", "cores") if said.get(name)]
    return {"versions": [*machine, *packages][:MOST_ROWS], "settings": _flat(run.document("config"))[:400]}


def _flat(value: Mapping[str, Any], above: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Keys of a configuration with dots -> their values as text."""
    found: list[tuple[str, str]] = []
    for key, each in value.items():
        name = f"{above}.{word(key)}" if above else word(key)
        if isinstance(each, dict) and depth < 8:
            found += _flat(each, name, depth + 1)
        elif each not in (None, [], {}, ""):
            found.append((name, ", ".join(words(each)) if isinstance(each, list) else word(each)))
    return found


_SECTIONS: Mapping[str, Callable[[WatchedRun], dict[str, Any]]] = {
    "head": _head,
    "now": _now,
    "results": _results,
    "curves": _curves,
    "institutions": _institutions,
    "failures": _failures,
    "privacy": _privacy,
    "costs": _costs,
    "trail": _trail,
    "notes": _notes,
    "about": _about,
}
"""Sections of a run's page in order: name of its macro in ``run.html.jinja`` -> what the macro is given."""
