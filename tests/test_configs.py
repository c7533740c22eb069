from __future__ import annotations

import re
from pathlib import Path

import pytest

from silotune.config import load_config
from silotune.data.tasks import resolve

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.rglob("*.toml"))


def test_none_is_overlooked() -> None:
    assert len(CONFIGS) >= 8
    assert {"fpb", "fiqa-sa", "tfns", "medqa", "medmcqa", "pubmedqa", "instruct", "custom-task", "fpb-classify"} <= {
        path.stem for path in CONFIGS
    }
    assert [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".toml"] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid_and_its_partition_field_exists(path: Path) -> None:
    config = load_config(path)
    task = resolve(config.data)
    partition = config.data.partition
    if partition.scheme in ("field", "dirichlet"):
        assert partition.field in task.partition_fields
    if config.training.objective == "choice":
        assert task.options
    if config.training.objective == "classify":
        assert task.answer == "label"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    assert 2 <= len(header) <= 5
    assert re.search(r"silotune \w+", "\n".join(header))
    assert max(map(len, lines)) <= 120
