"""A run with a model that not all shortcuts fit: it finishes, and says what it computes in the plain way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from silotune.config import Config
from silotune.experiment.run import run_experiment


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_a_run_says_what_was_switched_off(configuration: Callable[..., Config], tmp_path: Path, fast: str) -> None:
    folder = tiny.save(tmp_path / "codegen", "codegen")
    run = run_experiment(configuration(model={"name": str(folder), "fast": fast}, federation={"rounds": 1}))
    notes = [note for note in run.read_json("summary")["notes"] if note.startswith("model.fast: ")]
    told = [row["text"] for row in run.read_rows("events") if row["event"] == "note"]
    assert len(notes) == (fast == "auto") and set(notes) <= set(told)
    assert all("codegen" in note and "last layer" in note for note in notes)
