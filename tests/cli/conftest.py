"""Stand-ins for the layer below the command line, so that its tests need no model."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finished_run import events, finished_run
from silotune.cli import main as entry
from silotune.errors import ModelError


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def silotune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Calls the command line in this process."""
    monkeypatch.setattr(entry, "hush", lambda: None)
    monkeypatch.delenv("SILOTUNE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            entry.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return call


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


class Below:
    """Fakes of the functions under the command line; ``calls`` says what they were called with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: dict[str, Any] = {}

    def run_experiment(self, config: Any, *, observer: Any = None) -> Any:
        print("a library talks")
        self.calls["config"] = config
        run = finished_run(self.root)
        for event, fields in events(str(run.path)) if observer else ():
            observer(event, fields)
        return run

    def resume_experiment(self, path: Path, *, observer: Any = None) -> Any:
        self.calls["resumed"] = path
        return self.run_experiment(None, observer=observer)

    def load_tuned(self, path: str, *, mode: str = "federated", base: bool = False) -> str:
        return f"{'base' if base else mode} of {Path(path).name}"

    def stream_answer(self, model: str, messages: Sequence[tuple[str, str]], sampling: Sampling) -> Iterator[str]:
        self.calls.update(sampling=sampling, messages=messages)
        if messages[-1][1] == "too long":
            raise ModelError("the prompt fills the context")
        yield from (f"{model}: ", messages[-1][1].upper())

    def evaluate(self, path: Path, **settings: Any) -> dict[str, Any]:
        print("a library talks")
        self.calls["evaluate"] = settings
        return {
            "model": "nano + demo/federated", "split": "test", "num_examples": 4, "accuracy": 0.5, "loss": 1.5,
            "accuracy_interval": [0.4, 0.6], "confusion": [[1]], "notes": ["gold.jsonl: read as cp1252"],
            "per_class": {"negative": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 2}},
        }  # fmt: skip

    def export(self, path: Path, out: Path, *, merge: bool, mode: str) -> Path:
        self.calls["export"] = (path, merge, mode)
        return out

    def loader_of(self, path: Path, out: Path, *, merge: bool) -> str:
        return f"{'transformers.Auto' if merge else 'peft.AutoPeft'}ModelForCausalLM({str(out)!r})"

    def next_command(self, path: Path) -> str:
        return f"silotune chat {path}"

    def sample_prompts(self, path: Path, count: int) -> list[Any]:
        return [((("user", f"[{number}] good news?"),), "yes") for number in range(count)]

    def least_memory(self, config: Any) -> dict[str, Any]:
        return {"memory_bytes": self.calls.get("weights_bytes", 1)}

    def estimate(self, config: Any) -> dict[str, Any]:
        memory = self.calls.get("memory_bytes", 1)
        return {"trainable": 1000, "memory_bytes": memory, "seconds": 100.5, "notes": ["a note"]}


@pytest.fixture
def below(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Puts the fakes in place; what they were called with."""
    fakes = Below(tmp_path / "runs")
    modules = {
        "silotune.experiment.run": ("run_experiment", "resume_experiment"),
        "silotune.experiment.tuned": (
            "load_tuned",
            "evaluate",
            "export",
            "loader_of",
            "next_command",
            "sample_prompts",
        ),
        "silotune.experiment.estimate": ("estimate", "least_memory"),
        "silotune.evaluation.generate": ("stream_answer",),
    }
    for name, functions in modules.items():
        module = types.ModuleType(name)
        for function in functions:
            setattr(module, function, getattr(fakes, function))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["silotune.evaluation.generate"], "Sampling", Sampling, raising=False)
    return fakes.calls
