"""Settings of one configuration, chosen on its validation split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.benchmark.tune import MOST_TRIALS, candidates_of
from silotune.config import load_config
from silotune.errors import ConfigError
from silotune.record.runs import RunFolder
from silotune.shipped import shipped

TINY = (
    "data.num_train=40", "data.num_validation=24", "data.num_test=12", "data.partition.clients=2",
    "training.max_steps=2", "federation.rounds=1", "evaluation.bootstrap_samples=0", "record.energy=false",
)  # fmt: skip


def test_what_is_tried_is_read_as_settings_are() -> None:
    assert candidates_of([], 3e-3) == {"training.learning_rate": (1e-3, 3e-3, 9e-3)}
    asked = ["training.learning_rate=1e-4,1e-3", "federation.algorithm=fedavg,fedadam", "training.learning_rate=2e-3"]
    assert candidates_of(asked, 1.0) == {
        "training.learning_rate": (1e-4, 1e-3, 2e-3),
        "federation.algorithm": ("fedavg", "fedadam"),
    }
    assert candidates_of(['data.prompt=["a, {text}", "b {text}"]'], 1.0) == {"data.prompt": ("a, {text}", "b {text}")}


@pytest.mark.parametrize("text", ["training.learning_rate", "training.learning_rate=", "x=[1"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form section.key=value,value"):
        candidates_of([text], 1.0)


def test_a_search_without_end_is_refused() -> None:
    many = ",".join(map(str, range(1, 12)))
    with pytest.raises(ConfigError, match=f"121 combinations, at most {MOST_TRIALS}"):
        candidates_of([f"federation.rounds={many}", f"training.max_steps={many}"], 1.0)


@pytest.mark.parametrize("changes", [["evaluation.selection=test"], ["evaluation.gold=validation"]])
def test_settings_are_not_chosen_on_what_is_reported(
    silotune: Callable[..., Any], tmp_path: Path, changes: list[str]
) -> None:
    given = [word for text in (*TINY, *changes) for word in ("--set", text)]
    done = silotune("tune", "quickstart", *given, "--out", tmp_path / "t")
    assert done.code == 2 and "settings are not chosen on the set that is reported" in done.err
    assert not list(tmp_path.glob("t/tuning/*"))


@pytest.mark.end_to_end
def test_the_best_of_the_trials_is_what_the_command_says_to_run(silotune: Callable[..., Any], tmp_path: Path) -> None:
    given = [word for text in TINY for word in ("--set", text)]
    asked = ("tune", "quickstart", *given, "--try", "training.learning_rate=1e-9,5e-3", "--out", tmp_path / "t")
    done = silotune(*asked)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "t" / "tuning.json").read_text(encoding="utf-8"))
    best = max(found["trials"], key=lambda trial: trial["figure"])
    assert (
        best["is_chosen"]
        and found["split"] == "validation"
        and found["seed"] == 1000 + load_config(shipped("quickstart")).seed
    )
    for trial in found["trials"]:
        config = RunFolder.open(tmp_path / "t" / trial["folder"]).read_json("config")
        assert config["evaluation"]["gold"] == "validation" and config["federation"]["modes"] == ["federated"]
    command = done.out.split("run it:")[1].split()
    assert command[:3] == ["silotune", "run", "quickstart"]
    assert f"training.learning_rate={best['setting']['training.learning_rate']}" in command
    again = silotune(*asked, "--json")
    assert json.loads(again.out)["skipped"] == 2 and json.loads(again.out)["computed"] == 0
