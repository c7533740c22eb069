from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
SMALL = ("model.max_length=128", "training.max_steps=1", "federation.rounds=1", "evaluation.bootstrap_samples=0")
GENERATED = ("data.num_train=40", "data.num_validation=6", "data.num_test=12", "data.partition.clients=2")
SAYS = {
    "quickstart.py": ((*SMALL, *GENERATED), ("together: ", "on the validation split", "base model: ")),
    "own_data.py": (SMALL, ("north-bank alone: macro-F1", "south-bank alone", "together: macro-F1")),
    "compare_adapters.py": ((*SMALL, *GENERATED), ("bytes up", "lora ", "ia3 ")),
}


def test_every_example_is_run() -> None:
    assert sorted(SAYS) == SCRIPTS


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(
    name: str, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, words = SAYS[name]
    changes = (f"model.name={str(tiny_folder)!r}", f"record.folder={str(tmp_path / 'runs')!r}", *sizes)
    monkeypatch.setattr(sys, "argv", [name, *changes])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    out = capsys.readouterr().out
    assert all(word in out for word in words), out
