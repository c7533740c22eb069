from __future__ import annotations

import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


@pytest.mark.end_to_end
def test_the_notebook_runs_and_prints_only_what_it_says(tmp_path: Path, tiny_folder: Path) -> None:
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    changes = [f"model.name={str(tiny_folder)!r}", f"record.folder={str(tmp_path / 'runs')!r}", *SMALL, *GENERATED]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "changes = []" in first.source
    first.source = first.source.replace("changes = []", f"changes = {changes!r}")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    said = "".join(output.get("text", "") for output in outputs)
    assert all(word in said for word in ("round 1 of 1", "together:", "tuned:")), said
