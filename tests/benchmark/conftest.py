from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.benchmark.schema import Grid
from silotune.config import validated


@pytest.fixture
def document(tiny_folder: Path) -> dict[str, Any]:
    """A grid of seconds a cell: the tiny model on embedded finance news."""
    return {
        "name": "tiny",
        "seeds": [0, 1],
        "tasks": ["finance-news"],
        "models": [{"name": "tiny", "config": {"model": {"name": str(tiny_folder), "max_length": 128}}}],
        "adapters": ["lora"],
        "partitions": [{"name": "alpha 0.1", "alpha": 0.1, "clients": 2}],
        "base": {
            "adapter": {"rank": 2, "alpha": 4},
            "data": {"num_train": 32, "num_validation": 12, "num_test": 18},
            "training": {"batch_size": 4, "max_steps": 1, "learning_rate": 0.01, "objective": "choice"},
            "federation": {"rounds": 1},
            "evaluation": {"bootstrap_samples": 0},
        },
    }


@pytest.fixture
def make(document: dict[str, Any]) -> Callable[..., Grid]:
    def made(**changes: Any) -> Grid:
        return validated(Grid, {**document, **changes}, source="grid")

    return made
