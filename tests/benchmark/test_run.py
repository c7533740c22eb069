"""Working on a grid: nothing is computed twice, a failure stops nothing, a kill changes no digit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from silotune.benchmark.expand import Changes, expand
from silotune.benchmark.plan import forecast, totals
from silotune.benchmark.run import Work, run_grid
from silotune.benchmark.schema import Grid
from silotune.benchmark.workers import Job, run_jobs
from silotune.errors import ConfigError, RunFolderError
from silotune.evaluation.comparison import Comparison, compare
from silotune.evaluation.observations import observe
from silotune.record.grids import Cell, GridFolder, is_grid

Make = Callable[..., Grid]
NONE = Changes()
pytestmark = pytest.mark.end_to_end


class Seen:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.events: list[tuple[str, str]] = []

    def stage(self, title: str, *, total: int, done: int) -> None:
        self.stages.append((title, total, done))

    def cell(self, cell: Cell, what: str, fields: Mapping[str, Any]) -> None:
        if what != "event":
            self.events.append((cell.folder, what))


def table(folder: Path) -> list[Any]:
    """All figures of a grid, to the last digit; time, energy and message headers, which hold times, left out."""
    found: Comparison = compare(observe(GridFolder.open(folder)))
    rows = [
        (row.task, row.adapter, row.partition, row.algorithm, row.mode, row.seeds, _exact(row.figures))
        for row in found.rows
    ]
    return [*rows, *found.claims, *found.summaries]


def _exact(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in figures.items() if name != "joules"}


def written(folder: Path) -> dict[str, int]:
    """When each result of the grid was written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("summary.json"))}


def test_cells_are_tuned_run_skipped_and_renewed(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "grid"
    tune = {"seed": 9, "candidates": {"training.learning_rate": [0.01, 0.02]}}
    grid = make(algorithms=["fedavg", "fedprox"], tune=tune)
    seen = Seen()
    tally = run_grid(grid, path, NONE, Work(watcher=seen))
    assert (tally.computed, tally.skipped, tally.failures) == (2 + 4, 0, {})
    assert seen.stages == [("choosing hyper-parameters", 2, 0), ("cells", 4, 0)]
    assert [what for _, what in seen.events] == ["started", "done"] * 6
    folder = GridFolder.open(path)
    tuning = folder.tuning()
    assert tuning is not None and [trial["is_chosen"] for trial in tuning["trials"]].count(True) == 1
    for trial in tuning["trials"]:
        result = folder.run(folder.cells()[0]).part("federated").read_json("result")
        tried = json.loads((path / trial["folder"] / "federated" / "result.json").read_text())
        assert tried["split"] == tuning["split"] == "validation" and result["split"] == "test"
    chosen = next(trial for trial in tuning["trials"] if trial["is_chosen"])["setting"]["training.learning_rate"]
    for cell in folder.cells():
        assert folder.run(cell).read_json("config")["training"]["learning_rate"] == chosen
    before, figures = written(path), table(path)
    again = run_grid(grid, path, NONE, Work())
    assert (again.computed, again.skipped) == (0, 6) and written(path) == before and table(path) == figures
    changed = run_grid(grid, path, Changes(settings=["training.max_steps=2"]), Work())
    assert (changed.computed, changed.skipped) == (6, 0)
    assert before.items() <= written(path).items() and table(path) != figures
    assert [session["computed"] for session in folder.sessions()] == [6, 0, 6]
    planned = list(forecast(grid, path, NONE))
    assert len(planned) == 6 and all(each.is_done and not each.figures for each in planned)
    assert totals(planned, jobs=1)["seconds"] == 0


def test_a_forecast_tries_each_kind_once_and_writes_nothing(make: Make, tmp_path: Path) -> None:
    grid = make(algorithms=["fedavg", "fedprox"], adapters=["lora", {"name": "bad", "config": {
        "adapter": {"type": "lora", "targets": ["nowhere"]}}}])  # fmt: skip
    planned = list(forecast(grid, tmp_path / "grid", NONE, threads=1))
    assert len(planned) == 8 and not (tmp_path / "grid").exists()
    good, bad = planned[0], planned[-1]
    assert good.figures["seconds"] > 0 and good.figures["bytes"] > 0 and good.figures["steps"] == 2 * 3
    assert not bad.figures and "nowhere" in bad.problem
    total = totals(planned, jobs=2)
    assert (total["to_do"], total["without_estimate"]) == (8, 4)
    assert total["seconds"] == pytest.approx(sum(each.figures.get("seconds", 0) for each in planned) / 2)
    assert 0 < total["seconds_least"] <= total["seconds"] <= total["seconds_most"] and total["load"] >= 0


def test_a_failed_cell_stops_no_other_side_by_side(make: Make, tmp_path: Path) -> None:
    broken = {"when": {"adapter": "broken", "seed": 1}, "config": {"adapter": {"targets": ["nowhere"]}}}
    grid = make(adapters=["lora", {"name": "broken", "config": {"adapter": {"type": "lora"}}}], overrides=[broken])
    path = tmp_path / "grid"
    tally = run_grid(grid, path, NONE, Work(jobs=2))
    assert tally.computed == 3 and len(tally.failures) == 1
    ((name, reason),) = tally.failures.items()
    assert "broken" in name and "nowhere" in reason
    folder = GridFolder.open(path)
    assert folder.failures() == tally.failures
    assert {cell.title for cell in folder.cells() if not folder.is_done(cell)} == {
        "finance-news, tiny, broken, fedavg, alpha 0.1, seed 1"
    }
    assert folder.run(folder.cells()[0]).read_json("config")["training"]["threads"] >= 1
    assert run_grid(grid, path, NONE, Work()).computed == 0  # tried again, failed again


def test_every_candidate_failing_fails_its_cells(make: Make, tmp_path: Path) -> None:
    tune = {"seed": 9, "candidates": {"adapter.targets": [["nowhere"]]}}
    tally = run_grid(make(tune=tune), tmp_path / "grid", NONE, Work())
    assert tally.computed == 0 and len(tally.failures) == 2
    assert all("no hyper-parameters" in reason for reason in tally.failures.values())


def die() -> None:
    """What takes a worker down as running out of memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_cells_that_were_run_elsewhere_are_not_run_again(make: Make, tmp_path: Path) -> None:
    grid, file = make(), tmp_path / "cells.csv"
    cells = [planned.cell for planned in expand(grid, NONE)]
    rows = [f"{cell.portable},{mode},done,accuracy,0.5" for cell in cells for mode in cell.modes]
    file.write_text("\n".join(["key,mode,status,metric,accuracy", *rows]), encoding="utf-8")
    assert all(each.is_done for each in forecast(grid, tmp_path / "grid", NONE, known=file))
    assert not (tmp_path / "grid").exists()
    tally = run_grid(grid, tmp_path / "grid", NONE, Work(), known=file)
    assert (tally.computed, tally.skipped, tally.failures) == (0, len(cells), {})
    assert not (tmp_path / "grid" / "cells").exists()
    assert all(each.is_done for each in forecast(grid, tmp_path / "grid", NONE))
    seen = observe(GridFolder.open(tmp_path / "grid"))
    assert len(seen) == 3 * len(cells) and {each.quality["accuracy"] for each in seen} == {0.5}


def test_a_worker_that_is_killed_is_a_failed_cell(tmp_path: Path) -> None:
    jobs = [Job(str(number), "a", tmp_path / "x", {}) for number in range(2)]
    messages = [(message.job.name, message.what) for message in run_jobs(jobs, workers=1, threads=1, start=die)]
    assert messages == [("0", "started"), ("0", "failed"), ("1", "started"), ("1", "failed")]


def test_faults_are_found_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run_grid(make(adapters=["lora", "lorra"]), tmp_path / "grid", NONE, Work())
    assert not (tmp_path / "grid").exists()
    folder = GridFolder.make(tmp_path / "held")
    with folder.lock(), pytest.raises(RunFolderError, match="in use by process"):
        run_grid(make(), tmp_path / "held", NONE, Work())


def test_a_grid_that_was_killed_before_its_first_cell_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "given.toml"
    file.write_text("name = 'g'", encoding="utf-8")
    folder = GridFolder.make(tmp_path / "grid")
    folder.keep_file(file)  # trials come next, the list of cells after them
    (folder.path / "tuning").mkdir()
    assert GridFolder.make(tmp_path / "grid") == folder and is_grid(folder.path)
    with pytest.raises(
        RunFolderError, match="is a grid that has run no cell yet: 'silotune benchmark' goes on with it"
    ):
        GridFolder.open(folder.path)
    (folder.path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"holds 'thesis.tex' and is no grid folder"):
        GridFolder.make(tmp_path / "grid")


def rows_written(folder: Path) -> int:
    """Counts rows while workers write; ``os.walk`` passes over a folder that vanishes under it."""
    places = [Path(place) for place, _, files in os.walk(folder) if "clients.jsonl" in files]
    return sum((place / "clients.jsonl").read_bytes().count(b"\n") for place in places)


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_three_kills_change_no_digit(document: dict[str, Any], make: Make, tmp_path: Path) -> None:
    partition = {"name": "alpha 0.1", "alpha": 0.1, "clients": 3}
    changes = {"partitions": [partition], "adapters": ["lora", "ia3"], "seeds": [0]}
    settings = ["federation.rounds=4", "training.max_steps=2"]
    grid = make(**changes)
    whole = tmp_path / "whole"
    assert run_grid(grid, whole, Changes(settings=settings), Work()).failures == {}
    total = rows_written(whole)
    assert total == 2 * 4 * (3 + 3 + 1) == len(expand(grid, NONE)) * 28
    moments = random.Random()
    seed = moments.randrange(2**32)
    print(f"moments of the kills: seed {seed}")
    moments.seed(seed)
    file = tmp_path / "grid.toml"
    file.write_text(to_toml({**document, **changes}), encoding="utf-8")
    command = [sys.executable, "-m", "silotune.cli.main", "benchmark", str(file), "--out", str(tmp_path / "cut")]
    command += [word for setting in settings for word in ("--set", setting)]
    killed = 0
    for rows in sorted(moments.sample(range(1, total - 14), 3)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        limit = time.monotonic() + 240
        while process.poll() is None and rows_written(tmp_path / "cut") < rows:
            assert time.monotonic() < limit
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        if process.poll() is None:
            workers = children(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
            process.wait()
            while any(is_alive(worker) for worker in workers):  # they end by themselves
                assert time.monotonic() < limit
                time.sleep(0.01)
    assert killed >= 2
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failures"] == {}
    assert table(tmp_path / "cut") == table(whole)
    assert not list((tmp_path / "cut").rglob(".*tmp"))


def to_toml(document: Mapping[str, Any]) -> str:
    """One key a line; JSON's lists, texts and numbers are TOML's, and tables are written inline."""

    def value(item: Any) -> str:
        if isinstance(item, Mapping):
            return "{" + ", ".join(f"{json.dumps(key)} = {value(own)}" for key, own in item.items()) + "}"
        if isinstance(item, (list, tuple)):
            return "[" + ", ".join(value(own) for own in item) + "]"
        return json.dumps(item)

    return "".join(f"{key} = {value(item)}\n" for key, item in document.items())
