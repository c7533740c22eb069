from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.config import Config, from_mapping, overlaid


@pytest.fixture
def configuration(tiny_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run of seconds: the tiny model on embedded finance news; sections are updated by keyword."""

    def make(**sections: dict[str, Any]) -> Config:
        document: dict[str, Any] = {
            "model": {"name": str(tiny_folder), "max_length": 128},
            "adapter": {"rank": 2, "alpha": 4},
            "data": {"num_train": 48, "num_validation": 12, "num_test": 18, "partition": {"clients": 3}},
            "training": {"batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "objective": "choice"},
            "federation": {"modes": ["federated"], "rounds": 2},
            "evaluation": {"bootstrap_samples": 20},
            "record": {"folder": str(tmp_path / "runs"), "name": "demo"},
        }
        return from_mapping(overlaid(document, sections))

    return make
