"""``silotune benchmark`` and ``silotune report`` on grids, with the layer below replaced."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finished_grid import finished_grid
from silotune.benchmark import plan, run
from silotune.benchmark.expand import expand
from silotune.benchmark.plan import Forecast
from silotune.benchmark.run import Tally
from silotune.cli.grid_progress import GridProgress
from silotune.record.grids import GridFolder

GRID = """
name = "small"
seeds = [0, 1]
tasks = ["finance-news"]
adapters = ["lora", "ia3"]
[[partitions]]
name = "alpha 0.1"
alpha = 0.1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    return tmp_path / "grid.toml"


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a stand-in for ``run_grid`` in place; what it was called with."""
    calls: dict[str, Any] = {"failures": {}}

    def run_grid(grid: Any, path: Path, changes: Any, work: Any, *, source: Path, known: Path | None) -> Tally:
        calls.update(grid=grid, path=path, changes=changes, work=work, source=source, known=known)
        print("a library talks")
        cells = [each.cell for each in expand(grid, changes)]
        work.watcher.stage("cells", total=len(cells), done=1)
        for cell in cells[1:]:
            work.watcher.cell(cell, "started", {})
            work.watcher.cell(cell, "event", {"event": "round_finished", "mode": "federated", "round": 1, "rounds": 2,
                                              "metrics": {"accuracy": 0.4}})  # fmt: skip
            work.watcher.cell(cell, "event", {"event": "mode_finished", "mode": "federated",
                                              "metrics": {"accuracy": 0.5}})  # fmt: skip
            failure = calls["failures"].get(cell.folder)
            work.watcher.cell(cell, "failed" if failure else "done", {"reason": failure, "seconds": 1.0})
        return Tally(skipped=1, computed=3, failures=dict(calls["failures"]))

    monkeypatch.setattr(run, "run_grid", run_grid)
    return calls


def test_a_grid_is_run(silotune: Callable[..., Any], file: Path, worked: dict[str, Any], tmp_path: Path) -> None:
    done = silotune(
        "benchmark", file, "--out", tmp_path / "out", "--jobs", 2, "--data-root", "data", "--set", "data.num_test=9"
    )
    assert done.code == 0 and worked["path"] == tmp_path / "out" and worked["work"].jobs == 2
    assert worked["changes"].data_root == Path("data") and worked["changes"].settings == ("data.num_test=9",)
    assert "cells: 4, 1 of them done before" in done.out
    assert "[2/4] finance-news, nano, lora, fedavg, alpha 0.1, seed 1: federated accuracy 50.0 %" in done.out
    assert "3 runs done now, 1 before" in done.out and f"silotune report {tmp_path / 'out'}" in done.out


def test_the_folder_is_named_after_the_grid(silotune: Callable[..., Any], file: Path, worked: dict[str, Any]) -> None:
    assert silotune("benchmark", file).code == 0 and worked["path"] == Path("runs/small")
    assert silotune("benchmark", "embedded").code == 0 and worked["grid"].name == "embedded"
    assert silotune("benchmark", "benchmarks/embedded").code == 0
    wrong = silotune("benchmark", "embeded")
    assert wrong.code == 2 and "unknown configuration" in wrong.err


def test_failed_cells_have_their_own_exit_code(
    silotune: Callable[..., Any], file: Path, worked: dict[str, Any]
) -> None:
    silotune("benchmark", file)
    cell = expand(worked["grid"], worked["changes"])[-1].cell
    worked["failures"] = {cell.folder: "the loss is not finite"}
    done = silotune("benchmark", file)
    assert done.code == 9 and f"failed: {cell.folder}: the loss is not finite" in done.out
    assert "FAILED: the loss is not finite" in done.out and done.err.startswith("error: 1 cells failed")
    as_json = silotune("benchmark", file, "--json")
    assert as_json.code == 9 and json.loads(as_json.out)["failures"] == worked["failures"]


def test_a_dry_run_shows_cells_and_totals(
    silotune: Callable[..., Any], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forecast(grid: Any, path: Path, changes: Any, *, threads: int | None, known: Path | None) -> list[Forecast]:
        times = {"seconds": 60.0, "seconds_least": 50.0, "seconds_most": 90.0, "load": 3.25}
        figures = {**times, "steps": 12, "bytes": 2e6, "memory_bytes": 1e9, "trainable": 5}
        planned = expand(grid, changes)
        return [
            Forecast(planned[0], True, False, figures),
            Forecast(planned[1], False, True, {}),
            Forecast(planned[2], False, False, figures),
            Forecast(planned[3], False, False, {}, "no such file"),
        ]

    monkeypatch.setattr(plan, "forecast", forecast)
    done = silotune("benchmark", file, "--dry-run", "--jobs", 2)
    assert (
        done.code == 0
        and "4 runs, 1 done, 3 to do: about 60.0 s (50.0 s to 90.0 s) with --jobs 2, 4.0 MB sent" in done.out
    )
    assert "trial: finance-news" in done.out and "problem: no such file" in done.out
    found = json.loads(silotune("benchmark", file, "--dry-run", "--json").out)
    assert len(found["cells"]) == 4 and found["total"]["seconds"] == 120 and found["cells"][0]["steps"] == 12
    assert found["total"]["without_estimate"] == 1


def test_bars_follow_the_cells(file: Path) -> None:
    from silotune.benchmark.expand import Changes
    from silotune.benchmark.schema import load_grid

    console = Console(file=io.StringIO(), force_terminal=True, width=160, markup=False, highlight=False)
    cells = [each.cell for each in expand(load_grid(file), Changes())]
    with GridProgress(console, is_silent=False, again="again") as progress:
        progress.stage("choosing", total=1, done=1)
        progress.stage("cells", total=4, done=0)
        for cell in cells:
            progress.cell(cell, "started", {})
        told = {"event": "round_finished", "mode": "isolated", "client": "bank-1", "round": 1, "rounds": 3,
                "metrics": {}}  # fmt: skip
        progress.cell(cells[0], "event", told)
        for mode, client, accuracy in (("federated", None, 0.9), ("isolated", "a", 0.25), ("isolated", "b", 0.75)):
            ended = {"event": "mode_finished", "mode": mode, "client": client, "metrics": {"accuracy": accuracy}}
            progress.cell(cells[0], "event", ended)
        progress.cell(cells[0], "done", {"seconds": 1.0})
        progress.cell(cells[1], "failed", {"reason": "no memory"})
        assert progress._bars is not None
        assert [task.completed for task in progress._bars.progress.tasks][0] == 2
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "federated accuracy 90.0 %, isolated accuracy 50.0 %" in text
    assert "[1/4]" in text and "FAILED: no memory" in text
    with pytest.raises(KeyboardInterrupt), GridProgress(console, is_silent=False, again="the same command goes on"):
        raise KeyboardInterrupt
    assert "interrupted; the same command goes on" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_of_a_grid_is_written(silotune: Callable[..., Any], tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid", tasks=("medical",), adapters=("lora",), partitions=("alpha 0.1",))
    done = silotune("report", folder.path, "--out", tmp_path / "out")
    assert done.code == 0 and "learning together beats learning alone by 20.0 points" in done.out
    assert (tmp_path / "out" / "index.html").is_file() and f"written: {tmp_path / 'out' / 'index.html'}" in done.out
    found = json.loads(silotune("report", folder.path, "--json").out)
    assert len(found["rows"]) == 3 and len(found["claims"]) == 2
    assert (GridFolder.open(folder.path).path / "report" / "cells.csv").is_file()


def test_reports_of_grids_and_runs_are_not_mixed(silotune: Callable[..., Any], tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid", tasks=("medical",), adapters=("lora",), partitions=("alpha 0.1",))
    both = silotune("report", folder.path, tmp_path)
    assert both.code == 2 and "give one folder" in both.err
    out = silotune("report", tmp_path, tmp_path, "--out", tmp_path / "x")
    assert out.code == 2 and "--out goes with one folder" in out.err


def test_a_copied_grid_says_how_to_run_it(
    silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "silotune benchmark embedded.toml" in silotune("configs", "copy", "benchmarks/embedded").out
    assert "silotune run fpb.toml" in silotune("configs", "copy", "fpb").out
