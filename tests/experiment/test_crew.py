"""When clients train in processes, and that a run's results do not depend on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from silotune.config import Config, from_mapping
from silotune.experiment import crew as module
from silotune.experiment.crew import LONG, Crew, crew_of, planned_examples
from silotune.experiment.run import run_experiment
from silotune.record.family import Family


class Started:
    """Stands for a process."""

    def __init__(self, name: str, opening: dict, *, family: Family) -> None:
        self.opening, self.is_closed = opening, False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WorkerProcess", Started)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def config(**changes: object) -> Config:
    """One that goes through 20 x 4 x 5 x 16 examples, which is more than `LONG`; "centralized" is one client."""
    document: dict = {
        "model": {"name": "nano", "device": "cpu"},
        "data": {"task": "finance-news", "num_train": 80, "partition": {"clients": 4}},
        "training": {"batch_size": 16, "max_steps": 5},
        "federation": {"rounds": 20, "modes": ["federated", "centralized"]},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        document.setdefault(section, {})[name] = value
    return from_mapping(document)


def test_examples_of_a_run() -> None:
    assert planned_examples(config(), [20] * 4) == 6400 > LONG
    assert planned_examples(config(federation__clients_per_round=2), [20] * 4) == 3200
    assert planned_examples(config(training__max_steps=None, training__epochs=1), [20] * 4) == 20 * 4 * 2 * 16
    assert planned_examples(config(training__gradient_accumulation=3), [20] * 4) == 3 * 6400


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 3),
        ({"federation__clients_per_round": 3, "federation__rounds": 40}, 2),
        ({"federation__workers": 2}, 1),
        ({"federation__workers": 1}, 0),
        ({"federation__rounds": 2}, 0),
        ({"federation__modes": ["centralized"]}, 0),
        ({"federation__rounds": 2, "federation__worker_processes": True}, 3),
        ({"federation__worker_processes": False}, 0),
        ({"federation__engine": "ray"}, 0),
        ({"federation__encode": False}, 0),
        ({"adapter__dropout": 0.1}, 0),
        ({"adapter__kind": "qlora", "model__precision": "int4"}, 0),
        ({"privacy__protection": "secure_sum"}, 0),
        ({"training__threads": 2}, 1),
    ],
)
def test_how_many_processes_a_run_gets(changes: dict, count: int) -> None:
    with crew_of(config(**changes), Family()) as crew:
        ahead = list(crew._workers)
        begun = crew.begin([20] * 4)
    assert len(begun) == len(ahead) == count  # known before the data are read: they are generated
    assert all(worker.is_closed for worker in begun)


@pytest.mark.usefixtures("four_cores")
def test_what_is_not_known_ahead_is_begun_when_it_is(tmp_path: Path) -> None:
    plain = config(federation__worker_processes=True, data__num_train=None)
    with crew_of(plain, Family()) as crew:
        assert not crew._workers
        assert len(crew.begin([3, 50, 7])) == 2
        assert [worker.opening["threads"] for worker in crew.begin([3, 50, 7])] == [1, 1]
    with crew_of(config(model__name=str(tmp_path)), Family()) as crew:  # no weights there: how many is not known
        assert not crew._workers


@pytest.mark.usefixtures("four_cores")
def test_no_more_processes_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda: {"available": 2 * module.ROOM + 5})
    with crew_of(config(), Family()) as crew:
        begun = crew.begin([20] * 4)
        assert [worker.opening["threads"] for worker in begun] == [1, 1]  # of four cores: a thread is the fourth worker
        monkeypatch.setattr(module, "memory", lambda: {"available": 5})
        assert crew.begin([20] * 4) == begun


def test_close_may_be_called_without_begin() -> None:
    Crew(config(), Family()).close()


@pytest.mark.end_to_end
def test_a_run_gives_the_same_bits_in_processes(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for processes in (True, False):
        made = run_experiment(
            from_mapping(
                {
                    "model": {"name": str(tiny_folder), "max_length": 256, "device": "cpu"},
                    "data": {
                        "task": "finance-news",
                        "num_train": 48,
                        "num_validation": 6,
                        "num_test": 6,
                        "partition": {"clients": 3},
                    },
                    "training": {"batch_size": 4, "max_steps": 2, "threads": 2, "optimizer": "sgd", "clip_norm": 0},
                    "federation": {
                        "rounds": 6,
                        "algorithm": "scaffold",
                        "modes": ["federated", "isolated"],
                        "worker_processes": processes,
                    },
                    "record": {"folder": str(tmp_path), "name": f"processes-{processes}"},
                }
            )
        )
        parts = sorted(made.path.glob("**/adapter/adapter_model.safetensors"))
        found[processes] = [load_file(path) for path in parts]
        summary = json.loads((made.path / "summary.json").read_text(encoding="utf-8"))
        assert summary["federated"]["cost"]["core_seconds"] > 0
    assert len(found[True]) == len(found[False]) == 4
    for left, right in zip(found[True], found[False], strict=True):
        tiny.assert_same_bits(left, right)
