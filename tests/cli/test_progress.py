from __future__ import annotations

import io

import pytest
from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table

from finished_run import events
from silotune.cli.output import stdout
from silotune.cli.progress import RunProgress, bars_with_time, count_text, figure_text
from silotune.record.printable import counted


def test_bars_end_full():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    with RunProgress(console) as progress:
        for event, fields in events("runs/x"):
            progress(event, fields)
        tasks = progress._view._progress.tasks
        assert [task.description for task in tasks] == ["federated", "each alone bank-1"]
        assert [(task.completed, task.total) for task in tasks] == [(2, 2), (4, 4)]
    assert progress.folder == "runs/x"
    written = console.file.getvalue()
    assert "12.3 k of 1.9 M parameters" in written and "timed out" in written


def test_a_bar_moves_with_every_client():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    with RunProgress(console) as progress:
        told = events("runs/x")
        for event, fields in told[:6]:
            progress(event, fields)
        task = progress._view._progress.tasks[0]
        assert task.completed == pytest.approx(1 / 3) and task.fields["state"] == "round 1, client 1/2, loss 0.500"
        progress("round_finished", {"mode": "never started", "round": 1, "rounds": 2})
        progress("mode_finished", {"mode": "never started"})


@pytest.mark.parametrize(
    ("number", "text"), [(None, "?"), (12, "12"), (12_300, "12.3 k"), (1_900_000, "1.9 M"), (7e9, "7.0 B")]
)
def test_counts_for_people(number, text):
    assert count_text(number) == text


def test_the_main_figure_is_named():
    assert figure_text({"accuracy": 0.5, "loss": 1.0}) == "accuracy 50.0 %"
    assert figure_text({"perplexity": 12.3}) == "perplexity 12.30"
    assert figure_text({}) == figure_text(None) == ""


def test_what_is_left_says_so_and_ends_with_the_work() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = bars_with_time(console)
    task = bars.add_task("federated", total=2, state="round 1/2", completed=1)
    left = bars.columns[-1]
    assert str(left(bars.tasks[0])).endswith(" left")
    bars.update(task, completed=2)
    assert str(left.render(bars.tasks[0])) == ""


def test_one_is_no_plural() -> None:
    assert [counted(number, "round") for number in (0, 1, 1200)] == ["0 rounds", "1 round", "1200 rounds"]


def test_a_row_of_a_table_is_one_line_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    table = Table("trained", "a word and another", box=ROUNDED)
    table.add_row("federated", "long " * 60)
    stdout().print(table)
    head, row = written.getvalue().splitlines()
    assert head.split() == ["trained", "a", "word", "and", "another"] and row.split() == ["federated", *["long"] * 60]
