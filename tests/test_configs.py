from __future__ import annotations

import re
from pathlib import Path

import pytest

from silotune.benchmark.expand import Changes, expand, trials
from silotune.benchmark.schema import load_grid
from silotune.config import Config, load_config
from silotune.data.tasks import TASKS, resolve
from silotune.experiment.examples import check_objective

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.rglob("*.toml"))
GRIDS = sorted((FOLDER / "benchmarks").glob("*.toml"))
RUNS = [path for path in CONFIGS if path not in GRIDS]


def test_none_is_overlooked() -> None:
    assert len(CONFIGS) >= 8
    assert {
        "fpb",
        "fiqa-sa",
        "tfns",
        "medqa",
        "medmcqa",
        "pubmedqa",
        "instruct",
        "custom-task",
        "fpb-classify",
        "client-notes",
        "note-preference",
        "preference",
        "mixture",
    } <= {path.stem for path in CONFIGS}
    assert {path.stem for path in GRIDS} == {
        "embedded",
        "cross-domain",
        "cross-domain-local",
        "flowertune-finance",
        "real-encoder",
        "real-encoder-sampled",
        "real-nano",
        "study",
    }
    assert len(RUNS) + len(GRIDS) == len(CONFIGS)
    assert [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".toml"] == []


def check(config: Config) -> None:
    """The parts of a configuration fit each other and the task."""
    task = resolve(config.data)
    partition = config.data.partition
    if partition.scheme in ("field", "dirichlet"):
        assert set(partition.field.split("+")) <= set(task.partition_fields)
    if config.training.objective.type == "choice":
        assert task.options
    for each in [TASKS[name] for name in config.data.mixture] or [task]:
        check_objective(config, each)
    if config.training.objective.type == "classify":
        assert task.answer == "label"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_config_is_valid_and_its_partition_field_exists(path: Path) -> None:
    check(load_config(path))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_a_grid_is_valid(path: Path) -> None:
    grid = load_grid(path)
    changes = Changes(
        data_root=Path("data") if path.stem.startswith(("real-", "study")) or path.stem.endswith("-local") else None
    )
    planned = expand(grid, changes)
    assert len(grid.seeds) >= 3 and grid.name == path.stem
    for each in [*planned, *(trial.planned for trial in trials(grid, changes))]:
        check(each.config)
    given = path.stem == "flowertune-finance"  # whose rate is part of the protocol
    by_preset = all(each.config.federation.preset == "auto" for each in planned)  # whose rates were chosen before
    assert (grid.tune is not None or given or by_preset) and {each.config.evaluation.gold for each in planned} == {
        "test"
    }


def test_the_grids_have_the_cells_that_they_promise() -> None:
    counts = {path.stem: len(expand(load_grid(path), Changes())) for path in GRIDS}
    assert counts == {
        "embedded": 2 * 3 * 2 * 3, "cross-domain": 4 * 3 * 3 * 2 * 3, "cross-domain-local": 4 * 2 * 2 * 3,
        "real-encoder": 2 * 2 * 2 * 2 * 3, "real-encoder-sampled": 2 * 3, "real-nano": (2 + 1) * 3,
        "flowertune-finance": 3 * 3, "study": 4 * 2 * 2 * 3 + 2 * 3 * 2 * 3 + 2 * 3 * 2,
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    assert 2 <= len(header) <= 5
    assert re.search(r"silotune \w+", "\n".join(header))
    assert max(map(len, lines)) <= 120
