"""Which cells a grid has, with which configurations, and what makes a cell another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.benchmark.expand import Changes, expand, trials
from silotune.benchmark.run import choose, describe
from silotune.benchmark.schema import Grid, load_grid
from silotune.errors import ConfigError
from silotune.record.grids import cell_folder, config_digest

Make = Callable[..., Grid]
NONE = Changes()
WIDE: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "tasks": ["finance-news", {"name": "medical", "config": {"data": {"task": "medical-choice"}}}],
    "adapters": ["lora", "qlora", "ia3"],
    "partitions": [{"name": "alpha 0.1", "alpha": 0.1}, {"name": "alpha 1.0", "alpha": 1.0}],
}


def test_cells_are_the_product_of_the_lists(make: Make) -> None:
    planned = expand(make(**WIDE), NONE)
    assert len(planned) == 2 * 3 * 2 * 3
    assert len({each.cell.folder for each in planned}) == len(planned)
    one = next(each for each in planned if each.cell.title == "medical, tiny, qlora, fedavg, alpha 1.0, seed 2")
    config = one.config
    assert (config.data.task, config.adapter.type, config.model.precision) == ("medical-choice", "qlora", "int4")
    assert (config.data.partition.alpha, config.seed, config.adapter.rank) == (1.0, 2, 2)
    assert one.cell.modes == config.federation.modes == ("federated", "isolated", "centralized")


def test_a_wrong_key_in_a_list_is_named_with_those_allowed(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('name = "g"\nmodes = ["federated"]\nmodels = ["nano"]\n[[tasks]]\nnmae = "fpb"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tasks.0.nmae: unknown key 'nmae': did you mean 'name'\?") as caught:
        load_grid(file)
    assert not any("at least 1 item" in fault for fault in caught.value.faults)
    file.write_text('name = "g"\nmodes = ["federated"]\nmodels = ["nano"]\ntasks = []\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tasks = \[\]: tuple should have at least 1 item"):
        load_grid(file)


def test_cells_of_one_model_and_adapter_stand_together(make: Make) -> None:
    kinds = [each.cell.adapter for each in expand(make(**WIDE), NONE)]
    assert kinds == ["lora"] * 12 + ["qlora"] * 12 + ["ia3"] * 12


def test_include_keeps_and_exclude_drops(make: Make) -> None:
    only = expand(make(**WIDE, include=[{"adapter": "lora"}, {"adapter": "ia3", "seed": 1}]), NONE)
    assert len(only) == 12 + 4
    fewer = expand(make(**WIDE, exclude=[{"adapter": ["qlora", "ia3"], "partition": "alpha 1.0"}]), NONE)
    assert len(fewer) == 36 - 2 * 2 * 3
    with pytest.raises(ConfigError, match="leave no cell"):
        expand(make(exclude=[{"adapter": "lora"}]), NONE)


def test_baselines_are_trained_once_for_all_algorithms(make: Make) -> None:
    grid = make(algorithms=["fedavg", "fedprox"], exclude=[{"algorithm": "fedavg", "seed": 1}])
    modes = {(each.cell.algorithm, each.cell.seed): each.cell.modes for each in expand(grid, NONE)}
    every = ("federated", "isolated", "centralized")
    assert modes == {("fedavg", 0): every, ("fedprox", 0): ("federated",), ("fedprox", 1): every}
    alone = make(algorithms=["fedavg", "fedprox"], modes=["isolated"])
    assert {each.cell.algorithm for each in expand(alone, NONE)} == {"fedavg"}


def test_later_changes_win(make: Make) -> None:
    grid = make(
        adapters=[{"name": "wide", "config": {"adapter": {"type": "lora", "rank": 4}}}],
        overrides=[{"when": {"adapter": "wide", "seed": 1}, "config": {"training": {"learning_rate": 0.5}}}],
    )
    first, second = expand(grid, NONE, {("finance-news", "tiny", "wide"): {"training.weight_decay": 0.25}})
    assert (first.config.adapter.type, first.config.adapter.rank, first.config.adapter.alpha) == ("lora", 4, 4)
    assert (first.config.training.learning_rate, second.config.training.learning_rate) == (0.01, 0.5)
    assert first.config.training.weight_decay == 0.25
    (changed, _) = expand(grid, Changes(Path("data"), ["training.learning_rate=0.75"]))
    assert changed.config.training.learning_rate == 0.75 and changed.config.data.root == Path("data")


def test_whatever_changes_figures_makes_another_folder_and_nothing_else_does(make: Make) -> None:
    def folder(*settings: str, root: Path | None = None) -> str:
        return expand(make(), Changes(root, settings))[0].cell.folder

    assert folder() == folder() == folder("training.threads=3") == folder("record.folder=elsewhere")
    others = [
        folder("training.learning_rate=0.02"), folder("data.num_test=17"), folder(root=Path("x")),
    ]  # fmt: skip
    assert len({folder(), *others}) == 4


def test_the_command_line_makes_no_cell_other_than_its_name_says(make: Make) -> None:
    grid = make(**WIDE, tune={"seed": 9, "candidates": {"training.learning_rate": [0.1]}})
    settings = ["adapter.type=ia3", "data.partition.alpha=5", "seed=3", "federation.modes=[]"]
    with pytest.raises(ConfigError) as caught:
        expand(grid, Changes(settings=[*settings, "training.learning_rate=1", "data.num_test=5"]))
    said = caught.value.faults
    assert [fault.split(":")[0] for fault in said] == [
        "--set adapter.type", "--set data.partition.alpha", "--set seed", "--set federation.modes",
        "--set training.learning_rate",
    ]  # fmt: skip
    assert "would make all 3 adapters of the grid the same" in said[0] and "all 2 partitions" in said[1]


def test_what_takes_the_place_of_an_only_entry_gives_the_name(make: Make) -> None:
    (one, _) = expand(make(), Changes(settings=["adapter.type=ia3", "data.partition.alpha=5"]))
    assert (one.cell.adapter, one.config.adapter.type, one.config.data.partition.alpha) == ("ia3", "ia3", 5.0)
    assert "-ia3-" in one.cell.folder and describe(make(), [one.cell])["adapters"] == ["ia3"]


def test_the_digest_is_of_the_whole_configuration(make: Make) -> None:
    planned = expand(make(), NONE)[0]
    assert planned.cell.digest == config_digest(planned.config.model_dump(mode="json"))
    assert planned.cell.folder.endswith(planned.cell.digest[:10])
    assert cell_folder("cells", ("Qwen/Qwen2.5 é", "../x"), "0" * 64) == "cells/Qwen2.5---x-0000000000"


def test_trials_look_at_the_selection_set_alone(make: Make) -> None:
    tune = {"seed": 9, "candidates": {"training.learning_rate": [0.1, 0.2], "training.batch_size": [2]}, "rounds": 3}
    grid = make(**{**WIDE, "tune": tune})
    tried = trials(grid, NONE)
    assert len(tried) == 2 * 3 * 2
    for trial in tried:
        config = trial.planned.config
        assert config.evaluation.gold == config.evaluation.selection == "validation"
        assert config.seed == 9 and config.federation.rounds == 3 and config.training.batch_size == 2
        assert trial.planned.cell.partition == "alpha 0.1" and trial.planned.cell.folder.startswith("tuning/")
    assert [trial.planned.config.training.learning_rate for trial in tried[:2]] == [0.1, 0.2]
    first, second = tried[:2]
    assert choose([(first, 0.5), (second, 0.6)])[first.planned.key] == second.setting
    assert choose([(first, 0.5), (second, 0.5)])[first.planned.key] == first.setting
    assert choose([(first, None), (second, -3.0)])[first.planned.key] == second.setting
    assert choose([(first, None), (second, None)]) == {}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "twice"),
        ({"tasks": ["fpb", "fpb"]}, "twice"),
        ({"modes": []}, "at least one mode"),
        ({"exclude": [{"adapter": "lorra"}]}, "did you mean 'lora'"),
        ({"exclude": [{"seed": 7}]}, "seed 7"),
        ({"taks": []}, "did you mean 'tasks'"),
        ({"partitions": [{"name": "x", "aplha": 1}]}, "did you mean 'alpha'"),
        ({"algorithms": [{"name": "x", "config": {"federation": {"budget_match": "time"}}}]}, "a partition of its own"),
        ({"tune": {"seed": 0, "candidates": {"training.learning_rate": [1]}}}, "must not be reported"),
        ({"tune": {"seed": 5, "candidates": {}}}, "at least one key"),
        ({"tune": {"seed": 5, "candidates": {"a.b": [1]}, "partition": "alpha 1"}}, "did you mean 'alpha 0.1'"),
    ],
)
def test_faults_of_a_grid_file_are_explained(make: Make, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make(**changes)


def test_faults_of_cells_are_all_reported(make: Make) -> None:
    grid = make(adapters=["lora", "lorra"], base={"training": {"learning_rte": 1}})
    with pytest.raises(ConfigError) as caught:
        expand(grid, NONE)
    text = "\n".join(caught.value.faults)
    assert "learning_rte" in text and "lorra" in text and len(caught.value.faults) == 2


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_grid(tmp_path / "none.toml")


def test_a_cell_is_known_wherever_its_model_and_its_files_lie(make: Make) -> None:
    def keys(*settings: str) -> set[str]:
        return {planned.cell.portable for planned in expand(make(), Changes(settings=settings))}

    assert keys("data.root=/a/data") == keys("data.root=/b/c/data") != keys("data.root=/a/other")
    assert keys("model.name=/a/model") == keys("model.name=/b/model") != keys("model.name=/b/other")
    assert keys("training.learning_rate=0.5") != keys()
