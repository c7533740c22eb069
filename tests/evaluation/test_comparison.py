"""The comparison of a grid's modes, from folders whose figures are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finished_grid import finished_grid
from silotune.errors import RunFolderError
from silotune.evaluation.comparison import ALL, CLAIMS, Claim, Comparison, compare
from silotune.evaluation.observations import observe
from silotune.record.grids import Cell, GridFolder, is_grid

FIRST, SECOND = CLAIMS


def comparison(path: Path, **options: Any) -> Comparison:
    return compare(observe(finished_grid(path, **options)))


def only(claims: tuple[Claim, ...], **names: str) -> Claim:
    (found,) = [claim for claim in claims if all(getattr(claim, key) == value for key, value in names.items())]
    return found


LORA = {"task": "finance-news", "adapter": "lora", "partition": "alpha 0.1"}


def test_rows_are_samples_over_the_seeds(tmp_path: Path) -> None:
    rows = comparison(tmp_path / "grid").rows
    assert len(rows) == 2 * 2 * 2 * 3
    (row,) = [row for row in rows if row.mode == "federated" and all(getattr(row, k) == v for k, v in LORA.items())]
    assert row.seeds == (0, 1, 2) and row.main is not None
    assert row.main.mean == pytest.approx(0.7) and row.main.deviation == pytest.approx(0.01)
    assert row.costs["seconds"] == 10 and row.costs["bytes"] == 4000
    assert row.costs["trainable_parameters"] == 5000  # told by the run itself where no cost is recorded
    assert row.costs["joules"] is None and row.energy_source == "unavailable"
    assert row.per_class == {"yes": pytest.approx(0.7), "no": 0.5}
    alone = next(row for row in rows if row.mode == "isolated")
    assert alone.costs["seconds"] == 20 and alone.algorithm == ""


def test_the_two_claims_by_hand(tmp_path: Path) -> None:
    found = comparison(tmp_path / "grid")
    assert len(found.claims) == 2 * 8
    gain = only(found.claims, name=FIRST, **LORA)
    assert gain.difference is not None
    assert gain.difference.sample.mean == pytest.approx(20) and gain.difference.sample.deviation == pytest.approx(1)
    # 19, 20, 21 points: t = 20 sqrt 3, and of two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    assert gain.difference.p == pytest.approx(1 - (1200**0.5) / (1202**0.5), rel=1e-6)
    assert gain.verdict == "better" and (gain.difference.sample.low, gain.difference.sample.high) == (
        pytest.approx(19), pytest.approx(21),
    )  # fmt: skip
    assert gain.p_holm is not None and gain.p_holm >= gain.difference.p
    smallest = min(claim.difference.p for claim in found.claims if claim.difference and claim.difference.p is not None)
    assert min(claim.p_holm for claim in found.claims if claim.p_holm is not None) == pytest.approx(16 * smallest)


def test_means_over_adapters_count_a_seed_once(tmp_path: Path) -> None:
    found = comparison(tmp_path / "grid")
    mean = only(found.summaries, name=FIRST, task="medical", partition="alpha 1.0")
    assert mean.adapter == ALL and mean.difference is not None and mean.difference.sample.count == 3
    assert mean.difference.sample.mean == pytest.approx(20)
    overall = only(found.summaries, name=SECOND, task=ALL)
    assert overall.difference is not None and overall.difference.sample.mean == pytest.approx(5)


def test_two_seeds_claim_nothing(tmp_path: Path) -> None:
    found = comparison(tmp_path / "grid", seeds=(0, 1))
    assert found.claims and all(claim.difference is None for claim in (*found.claims, *found.summaries))
    assert {claim.verdict for claim in found.claims} == {"none"}
    assert all(claim.p_holm is None for claim in found.claims)


def test_verdicts_follow_the_figures(tmp_path: Path) -> None:
    def reversed_(cell: Cell, mode: str) -> float:
        return {"isolated": 0.7, "federated": 0.5 + 0.01 * cell.seed, "centralized": 0.5 + 0.2 * (cell.seed - 1)}[mode]

    found = comparison(tmp_path / "grid", level=reversed_)
    assert {claim.verdict for claim in found.claims if claim.name == FIRST} == {"worse"}
    assert {claim.verdict for claim in found.claims if claim.name == SECOND} == {"open"}


def test_what_the_runs_measured_is_used_and_summed_over_institutions(tmp_path: Path) -> None:
    def cost(cell: Cell, mode: str) -> dict[str, Any]:
        return {"seconds": 7.0, "joules": 50.0 if cell.adapter == "lora" else 20.0, "energy_source": "measured",
                "energy_method": "RAPL", "bytes_up": 1, "bytes_down": 2, "peak_memory_bytes": 5 if mode else 0,
                "trainable_parameters": 100}  # fmt: skip

    def metrics(cell: Cell, mode: str) -> dict[str, Any]:
        own = {"client-0": {"num_examples": 5, "accuracy": 0.9}, "client-1": {"num_examples": 5, "accuracy": 0.4}}
        forgetting = {"base_perplexity": 20.0, "tuned_perplexity": 25.0}
        return {"ece": 0.1, "beside": {"by_client": own, "forgetting": forgetting}}

    found = comparison(tmp_path / "grid", cost=cost, metrics=metrics)
    row = next(row for row in found.rows if row.mode == "federated" and row.adapter == "lora")
    means = {name: sample.mean for name, sample in row.figures.items() if sample is not None}
    assert (
        means["ece"] == pytest.approx(0.1)
        and means["own"] == pytest.approx(0.65)
        and means["worst"] == pytest.approx(0.4)
    )
    assert means["forgetting_base"] == pytest.approx(20) and means["forgetting_tuned"] == pytest.approx(25)
    alone = next(row for row in found.rows if row.mode == "isolated" and row.adapter == "lora")
    assert alone.costs["joules"] == 100 and alone.costs["peak_memory_bytes"] == 5 and alone.energy_source == "measured"
    first = next(each for each in found.efficiency if each.row is row)
    assert first.gain == pytest.approx(40) and first.per_kilojoule == pytest.approx(800)
    assert first.per_thousand_parameters == pytest.approx(400)
    # IA3 is two points worse for less than half of the energy: both stand on that front; of bytes, not.
    fronts = {each.row.adapter: each.on_front for each in found.efficiency if each.row.task == "medical"}
    assert fronts == {"lora": {"joules": True, "bytes": True}, "ia3": {"joules": True, "bytes": False}}


def test_a_sum_is_as_good_as_its_worst_part(tmp_path: Path) -> None:
    def cost(cell: Cell, mode: str) -> dict[str, Any]:
        source = "estimated" if cell.seed == 1 else "measured"
        return {"joules": 5.0, "energy_source": "unavailable" if mode == "isolated" else source}

    rows = comparison(tmp_path / "grid", cost=cost).rows
    sources = {row.mode: (row.energy_source, row.costs["joules"]) for row in rows}
    assert sources == {
        "isolated": ("unavailable", None),
        "federated": ("estimated", 5),
        "centralized": ("estimated", 5),
    }


def test_cells_without_a_result_are_left_out(tmp_path: Path) -> None:
    found = comparison(tmp_path / "grid", failed=("lora, fedavg, alpha 0.1, seed 1",))
    row = next(row for row in found.rows if row.adapter == "lora" and row.partition == "alpha 0.1")
    assert row.seeds == (0, 2)
    claims = {claim.difference is None for claim in found.claims if claim.adapter == "lora"}
    assert claims == {True, False}
    assert compare([]).rows == ()


def test_a_cell_whose_configuration_was_changed_is_refused(tmp_path: Path) -> None:
    folder = finished_grid(tmp_path / "grid")
    run = folder.run(folder.cells()[0])
    run.write_json("config", {**run.read_json("config"), "seed": 77})
    with pytest.raises(RunFolderError, match="was changed"):
        observe(folder)


def test_a_grid_folder_is_told_from_others(tmp_path: Path) -> None:
    assert is_grid(finished_grid(tmp_path / "grid").path) and not is_grid(tmp_path)
    with pytest.raises(RunFolderError, match="not a grid folder"):
        GridFolder.open(tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RunFolderError, match="give another with --out"):
        GridFolder.make(tmp_path)


def test_a_front_compares_algorithms_too(tmp_path: Path) -> None:
    """fedadam costs as much as fedavg and is worse: it stands on no front beside it."""

    def level(cell: Cell, mode: str) -> float:
        return 0.6 if cell.algorithm == "fedadam" else 0.7

    found = comparison(tmp_path / "grid", algorithms=("fedavg", "fedadam"), level=level, adapters=("lora",))
    on_front = {(each.row.algorithm, each.on_front["bytes"]) for each in found.efficiency}
    assert on_front == {("fedavg", True), ("fedadam", False)}
    overall = [claim for claim in found.summaries if claim.task == ALL and claim.name == FIRST]
    assert [claim.algorithm for claim in overall] == ["fedavg", "fedadam"], "no mean over algorithms"
