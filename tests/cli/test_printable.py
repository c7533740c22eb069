"""Texts of other parties reach the terminal as text: every command that shows what a folder or a process says."""

from __future__ import annotations

import ast
import csv
import io
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

import kits
from finished_run import finished_run
from governed import job
from silotune.benchmark.run import Tally
from silotune.cli import benchmark
from silotune.cli.progress import RunProgress
from silotune.config import Config
from silotune.deploy.check import Found
from silotune.deploy.kits import coordinator_folder, read_kit
from silotune.deploy.queue import Jobs
from silotune.errors import RunFolderError
from silotune.record.audit import FILE, Trail
from silotune.record.files import append_line, to_line, write_json
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key

TITLE = "\x1b]0;owned\x07"
"""Sets the title of a terminal's window."""
HOSTILE = f"=cmd|'/c calc'!A1 {TITLE}\x1b[2J\x9b31m\x7f\x00\u202egnp.exe\u2066\r\nround 9: all is well\u2028"
CLI = Path(benchmark.__file__).parent


def assert_harmless(shown: str, *, is_line_kept: bool = True) -> None:
    acting = {
        character
        for character in shown
        if (unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t")
        or unicodedata.bidirectional(character) in ("RLO", "LRI")
    }
    assert not acting
    if is_line_kept:
        assert not any(line.startswith("round 9") for line in shown.splitlines())


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    """A trail of a coordinator that names everything as it likes."""
    made = Trail(tmp_path / "run" / FILE, new_key(), actor=f"@{HOSTILE}")
    made.add(
        HOSTILE, {"round": HOSTILE, "client": f"+{HOSTILE}", "reason": HOSTILE, "rule": HOSTILE, HOSTILE: [HOSTILE]}
    )
    made.flush()
    return tmp_path / "run"


def test_audit_shows_and_verifies_other_parties_words(silotune, trail: Path) -> None:
    for command in (("show", trail), ("show", trail, "--json"), ("verify", trail, "--unfinished"), ("verify", trail)):
        said = silotune("audit", *command)
        assert said.out or said.err
        assert_harmless(said.out + said.err)
    shown = silotune("audit", "show", trail).out
    assert shown.count("\n") == 1 and "\\u001b]0;owned\\u0007" in shown
    (row,) = json.loads(silotune("audit", "show", trail, "--json").out)["entries"]
    assert row["event"] == HOSTILE and row["client"] == f"+{HOSTILE}"  # what JSON says is the very text


def test_an_exported_trail_runs_nothing_where_it_is_opened(silotune, trail: Path, tmp_path: Path) -> None:
    for ending in ("json", "csv", "html", "pdf"):
        said = silotune("audit", "export", trail, tmp_path / f"trail.{ending}")
        assert said.code == 0, said.err
        assert_harmless(said.out + said.err)
    for ending in ("json", "csv", "html"):
        assert_harmless((tmp_path / f"trail.{ending}").read_text())
    assert json.loads((tmp_path / "trail.json").read_text())["entries"][0]["fields"]["reason"] == HOSTILE
    rows = list(csv.reader(io.StringIO((tmp_path / "trail.csv").read_text())))
    assert len(rows) == 2 and rows[1][0] == "0"
    assert not [cell for cell in rows[1] if cell.lstrip().startswith(("=", "+", "-", "@"))]
    assert "<td>=cmd|&#39;/c calc" in (tmp_path / "trail.html").read_text()


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", " =", "\t=", "\r\n=", "\uff1d"])
def test_no_cell_of_a_table_begins_like_a_formula(silotune, tmp_path: Path, begin: str) -> None:
    made = Trail(tmp_path / FILE, new_key(), actor=f"{begin}1+1")
    made.add(f"{begin}1+1", {"round": f"{begin}1+1", "client": f"{begin}1+1"})
    made.flush()
    assert silotune("audit", "export", tmp_path, tmp_path / "trail.csv").code == 0
    _, cells = csv.reader(io.StringIO((tmp_path / "trail.csv").read_text()))
    assert [cell for cell in cells if cell.endswith("1+1")]
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d"))]


@pytest.mark.parametrize("time", [1e300, -1e300, 1e18])
def test_a_time_that_no_calendar_has_is_one_line(silotune, tmp_path: Path, monkeypatch, time: float) -> None:
    monkeypatch.setattr("silotune.record.audit.time.time", lambda: time)
    made = Trail(tmp_path / FILE, new_key(), actor="bank-a")
    made.add("refusal", {"reason": "no"})
    made.flush()
    for command in (("show", tmp_path), ("export", tmp_path, tmp_path / "trail.csv")):
        said = silotune("audit", *command)
        assert (said.code, said.err) == (11, "error: entry 0 is not valid: its time is not a time\n")


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kits.make(tmp_path_factory.mktemp("f"), ["bank-a", "bank-b"]) / "coordinator"


EVENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("run_started", {"folder": HOSTILE, "task": HOSTILE, "model": HOSTILE, "clients": 2}),
    ("privacy", {"statement": [HOSTILE]}),
    ("note", {"text": HOSTILE}),
    ("mode_started", {"mode": HOSTILE, "rounds": 2, "clients_per_round": 2}),
    ("mode_started", {"mode": "isolated", "client": HOSTILE, "rounds": 2}),
    ("client_failed", {"mode": "federated", "client": HOSTILE, "round": 1, "reason": HOSTILE}),
    ("round_finished", {"mode": HOSTILE, "round": 1, "rounds": 2, "metrics": {}, "seconds": 1.0}),
    ("mode_finished", {"mode": HOSTILE, "metrics": {}}),
)


@pytest.fixture(scope="module")
def submitted(coordinator: Path) -> str:
    """A run whose site gave such a reason."""
    jobs = Jobs(coordinator_folder(read_kit(coordinator)))
    name = jobs.submit(Config(), job(run="demo"))
    run = RunFolder.create(jobs.run_path(name).parent, name, config={})
    for event, fields in EVENTS:
        run.append("events", {"event": event, "time": 1.0, **fields})
    run.part("federated").append("metrics", {"round": HOSTILE})
    jobs.change(name, status="failed", reason=HOSTILE, exit_code=6)
    return name


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_a_submitted_run_says(silotune, coordinator: Path, submitted: str, monkeypatch, is_terminal: bool) -> None:
    if is_terminal:  # rich shows its bars then, with sequences of its own
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    for command in (("status", submitted), ("list",), ("logs", submitted), ("status", submitted, "--json")):
        said = silotune(*command, "--kit", coordinator)
        assert "owned" in said.out + said.err
        for acting in (TITLE, "\x9b", "\u202e", "\x1b[2J", "\x07"):
            assert acting not in said.out + said.err
        if not is_terminal:
            assert_harmless(said.out + said.err)
    said = silotune("coordinator", "status", coordinator)
    assert "owned" in said.out
    assert_harmless(said.out)


def test_what_processes_say_of_themselves(silotune, coordinator: Path, monkeypatch) -> None:
    node = {"status": "refused", "reason": HOSTILE}
    trainer = {"status": "state", "process": 7, "works_on": HOSTILE, "served": 0, "base": HOSTILE, "base_loads": 1}
    monkeypatch.setattr(
        "silotune.deploy.site.status", lambda kit: {"site": HOSTILE, "process": 1, "node": node, "trainer": trainer}
    )
    state = {"process": 1, "sites": {HOSTILE: HOSTILE}, "jobs": [], "fault": HOSTILE}
    monkeypatch.setattr("silotune.deploy.coordinator.status", lambda kit: state)
    monkeypatch.setattr("silotune.deploy.check.check_site", lambda kit: [Found(HOSTILE, True, HOSTILE)])
    monkeypatch.setattr(
        "silotune.deploy.site.start",
        lambda kit, notify: notify("process_restarted", {"name": HOSTILE, "list": [HOSTILE]}),
    )
    kit = coordinator.parent / "bank-a"
    for command in (("site", "status"), ("site", "check"), ("site", "start"), ("coordinator", "status")):
        said = silotune(*command, kit)
        assert said.code == 0 and "owned" in said.out, said.err
        assert_harmless(said.out)


def test_reports_of_a_run_folder_that_came_from_elsewhere(silotune, tmp_path: Path) -> None:
    given = {"task": HOSTILE, "model": HOSTILE, "budget": HOSTILE, "stopped": [HOSTILE], "notes": [HOSTILE]}
    runs = [finished_run(tmp_path, name, **given, privacy={"dp": "none", "statement": [HOSTILE]}) for name in "ab"]
    for folders in ([runs[0].path], [run.path for run in runs]):
        said = silotune("report", *folders)
        assert said.code == 0 and "owned" in said.out, said.err
        assert_harmless(said.out, is_line_kept=False)  # a caption of several lines is one on purpose


def test_ledgers_of_a_folder_that_came_from_elsewhere(silotune, tmp_path: Path) -> None:
    spend = {"noise_multiplier": 1.0, "sampling_rate": 0.5, "steps": 1, "shares": [1.0]}
    append_line(tmp_path / f"{TITLE}.jsonl", to_line({"run": HOSTILE, "round": 1, "identity": HOSTILE, "spend": spend}))
    said = silotune("privacy", "spent", tmp_path, "--rdp")
    assert said.out + said.err
    assert_harmless(said.out + said.err)


def test_failures_of_a_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cells failed"):
        benchmark._show(tmp_path, Tally(1, 0, {HOSTILE: HOSTILE}), as_json=False)
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert_harmless(shown)


def test_members_of_a_kit_that_came_from_elsewhere(silotune, coordinator: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "members.json", {HOSTILE: HOSTILE})
    said = silotune("provision", "members", coordinator, tmp_path / "members.json")
    assert said.code != 0
    assert_harmless(said.out + said.err)


def test_answers_of_a_model(silotune, below) -> None:
    for stream in ((), ("--no-stream",)):
        said = silotune("generate", "x", "--prompt", HOSTILE, *stream)
        assert said.code == 0 and "OWNED" in said.out
        assert_harmless(said.out, is_line_kept=False)  # an answer has as many lines as it likes


def test_errors_that_quote_other_parties(silotune, below, monkeypatch, tmp_path: Path) -> None:
    def fails(path: Path, *, observer: Any = None) -> None:
        raise RunFolderError(HOSTILE)

    monkeypatch.setattr(sys.modules["silotune.experiment.run"], "resume_experiment", fails)
    said = silotune("resume", tmp_path)
    assert said.code == 7 and said.err.count("\n") == 1 and "owned" in said.err
    assert_harmless(said.err)


def test_live_progress(capsys: pytest.CaptureFixture[str]) -> None:
    from silotune.cli.output import stdout

    with RunProgress(stdout()) as progress:
        for event, fields in EVENTS:
            progress(event, fields)
    shown = capsys.readouterr().out
    assert shown.count("owned") >= 10
    assert_harmless(shown)


def test_a_bar_s_words_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from silotune.cli.output import stdout

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    name = "[link=file:///etc/passwd]click[/link]"
    with RunProgress(stdout()) as progress:
        progress("mode_started", {"mode": name, "rounds": 2})
        progress("mode_started", {"mode": "isolated", "client": name, "rounds": 2})
    shown = capsys.readouterr().out
    assert "[link=file:///etc/passwd]" in shown and "\x1b]8;" not in shown


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_texts_reach_the_terminal_in_one_place(path: Path) -> None:
    """Outside of ``cli/output.py``, a command prints tables and bars through its console, and texts through ``say``."""
    if path.stem == "output":
        return
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in ("print", "typer.echo", "click.echo", "typer.secho", "Console", "sys.stdout.write"), name
        if name.endswith(".print"):
            assert not isinstance(call.args[0], (ast.JoinedStr, ast.Constant)), f"{name} shows a text: use say"
