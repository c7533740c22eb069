"""The benchmark's judgement: medians, ratios, verdicts and tables, without a run of either side."""

from __future__ import annotations

import json
import math
import sys
from functools import reduce
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def _result(ratio, bound=None, direction="at least"):
    from measure import Result

    return Result("step", "seconds", (2.0, 9.0, 3.0), (1.0,), ratio, bound, direction)


def test_the_ratio_is_that_of_the_medians():
    from measure import speed_up

    assert speed_up([10.0, 100.0, 12.0], [3.0, 4.0, 1.0]) == 4.0
    assert speed_up([10.0, 20.0], [5.0]) == 3.0


@pytest.mark.parametrize(("peer", "silotune"), [([], [1.0]), ([1.0], []), ([1.0], [0.0]), ([1.0], [math.nan])])
def test_a_ratio_without_times_is_refused(peer, silotune):
    from measure import speed_up

    with pytest.raises(ValueError):
        speed_up(peer, silotune)


@pytest.mark.parametrize(
    ("ratio", "bound", "direction", "holds"),
    [
        (5.0, 5.0, "at least", True),
        (4.99, 5.0, "at least", False),
        (1.05, 1.05, "at most", True),
        (1.06, 1.05, "at most", False),
        (math.nan, 5.0, "at least", False),
        (math.nan, 1.05, "at most", False),
        (0.1, None, "at least", True),
    ],
)
def test_a_bound_holds_or_not(ratio, bound, direction, holds):
    assert _result(ratio, bound, direction).passed is holds


def test_the_verdict_needs_every_bound_and_something_measured():
    from measure import all_passed

    good, bad = _result(6.0, 5.0), _result(4.0, 5.0)
    assert all_passed([good, good])
    assert not all_passed([good, bad])
    assert not all_passed([])


def test_losses_differ_relative_to_the_smaller_one():
    from measure import relative_difference

    assert relative_difference(1.02, 1.0) == pytest.approx(0.02)
    assert relative_difference(1.0, 1.02) == relative_difference(1.02, 1.0)
    assert relative_difference(0.7, 0.7) == 0.0


def test_the_end_to_end_part_judges_time_equality_and_learning():
    from against_flower_trl import _end_to_end_results
    from measure import Child
    from workload import Settings

    runs = {"flower_trl_app": [Child(60.0, 400)], "silotune_side": [Child(10.0, 100)]}
    losses = {"flower_trl_app": [1.00], "silotune_side": [1.01]}
    time, memory, equality, learning = _end_to_end_results(Settings(model="m"), runs, losses, start=3.0)
    assert (time.ratio, memory.ratio) == (6.0, 4.0)
    assert equality.ratio == pytest.approx(0.01)
    assert all(result.passed for result in (time, memory, equality, learning))
    apart = _end_to_end_results(Settings(model="m"), runs, {**losses, "silotune_side": [1.03]}, start=3.0)
    assert not apart[2].passed
    idle = _end_to_end_results(Settings(model="m"), runs, losses, start=1.01)
    assert not idle[3].passed


def test_the_sides_take_turns_at_going_first():
    from against_flower_trl import _order

    assert [_order(("peer", "silotune"), number)[0] for number in range(3)] == ["peer", "silotune", "peer"]


def test_a_document_survives_json_and_shows_as_a_table(tmp_path, capsys):
    from against_flower_trl import main
    from measure import as_document, from_document, machine

    results = [_result(6.0, 5.0), _result(1.2)]
    document = as_document(results, machine(), {"clients": 8})
    assert from_document(json.loads(json.dumps(document))) == results
    place = tmp_path / "results.json"
    place.write_text(json.dumps(document))
    assert main(["--show", str(place), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "3 (2 to 9)" in shown and "at least 5" in shown
    assert shown.splitlines()[1].startswith("|--")


def test_a_failed_bound_is_the_exit_code(tmp_path, capsys):
    from against_flower_trl import main
    from measure import as_document, machine

    place = tmp_path / "results.json"
    place.write_text(json.dumps(as_document([_result(4.0, 5.0)], machine(), {})))
    assert main(["--show", str(place)]) == 1
    assert "NO" in capsys.readouterr().out


def test_a_child_is_timed_and_its_failure_is_told(tmp_path):
    from measure import run_child

    assert run_child([sys.executable, "-c", "pass"], tmp_path / "log").seconds > 0
    with pytest.raises(RuntimeError, match="broken pipe of thoughts"):
        run_child([sys.executable, "-c", "raise SystemExit('broken pipe of thoughts')"], tmp_path / "log")


def test_made_examples_have_the_lengths_they_promise():
    from steps import closed_ended, instructions

    closed, open_ended = closed_ended(200, 0), instructions(400, 0)
    assert all(25 <= len(pair.prompt.split()) <= 40 for pair in closed)
    assert {len(pair.completion.split()) for pair in closed} == {1, 2, 3}
    mean = sum(len(pair.completion.split()) for pair in open_ended) / len(open_ended)
    assert 90 < mean < 130


def _rows():
    from communication import Row

    return [
        Row("plain", (0.90, 0.92), (1000, 1000), (500, 500)),
        Row("small", (0.90, 0.91), (50, 50), (500, 500)),
        Row("tiny", (0.85, 0.90), (20, 20), (50, 50)),
    ]


def test_bytes_and_points_are_those_of_the_means():
    from communication import Bound, fewer, lost, met, table

    plain, small, tiny = _rows()
    assert (fewer(plain, plain), lost(plain, plain)) == (1, 0)
    assert fewer(small, plain) == 20 and lost(small, plain) == pytest.approx(0.5)
    assert lost(tiny, plain) == pytest.approx(3.5)
    assert met(Bound(16, 0.51), _rows(), plain) == ["small"]
    assert met(Bound(50, 2.0), _rows(), plain) == []
    assert met(Bound(50, 4.0), _rows(), plain) == ["tiny"]
    assert table(_rows(), plain).splitlines()[-1] == "| tiny | 0.850 0.900 | 0.875 | 3.5 | 20 | 50.0 | 50 | 10.0 |"


def test_every_way_to_send_is_a_valid_configuration():
    from communication import REFERENCE, STEPS, TUNING_SEED, WAYS, document_of, folder_name

    from silotune.config import from_mapping

    assert next(iter(WAYS)) == REFERENCE
    assert len({folder_name(name) for name in WAYS}) == len(WAYS)
    for name in WAYS:
        made = from_mapping(document_of(name, 0))
        assert made.federation.rounds * made.training.max_steps == STEPS
        assert (made.evaluation.gold, made.data.num_test) == ("test", 2000)
        tried = from_mapping(document_of(name, TUNING_SEED, rate=1e-3))
        assert (tried.evaluation.gold, tried.training.learning_rate) == ("validation", 1e-3)


def test_the_grids_of_algorithms_and_rules_hold_no_fault():
    from algorithms import ALGORITHMS, ATTACKS, CANDIDATES, CLIENTS, algorithms_grid, robust_grid, tuning_grid

    from silotune.benchmark.expand import Changes, expand
    from silotune.benchmark.schema import Grid
    from silotune.config import validated
    from silotune.methods import algorithms
    from silotune.methods.algorithms import LORA_RULES
    from silotune.settings.aggregation import AGGREGATIONS

    cells = expand(validated(Grid, algorithms_grid([0, 1, 2], ALGORITHMS), source="test"), Changes())
    assert len(cells) == len(ALGORITHMS) * 2 * 3
    assert {type(cell.config.federation.algorithm) for cell in cells} == set(algorithms.ALGORITHMS)
    assert {type(cell.config.federation.lora) for cell in cells} == set(LORA_RULES)
    chosen = {cell.cell.algorithm: cell.config for cell in cells}
    for name, tried in CANDIDATES.items():
        for path, values in tried.items():
            assert reduce(getattr, path.split("."), chosen[name]) in values
    trials = expand(validated(Grid, tuning_grid(CANDIDATES), source="test"), Changes())
    assert {trial.config.evaluation.gold for trial in trials} == {"validation"}
    assert not {trial.config.seed for trial in trials} & {0, 1, 2}
    cells = expand(validated(Grid, robust_grid([0], AGGREGATIONS, ATTACKS), source="test"), Changes())
    assert len(cells) == len(AGGREGATIONS) * len(ATTACKS)
    assert {cell.config.data.partition.clients for cell in cells} == {CLIENTS}


def test_time_to_an_accuracy_is_that_of_the_first_round_as_good():
    from clock import WAYS, clock_grid, until

    from silotune.benchmark.expand import Changes, expand
    from silotune.benchmark.schema import Grid
    from silotune.config import validated

    rows = [{"round": 0, "accuracy": 1.0}, {"round": 1, "accuracy": 0.5, "simulated_seconds": 3.0}]
    rows += [{"round": number, "accuracy": 0.9, "simulated_seconds": 3.0 * number} for number in (2, 3)]
    assert until(rows, 0.9) == 6.0 and until(rows, 0.95) is None
    assert len(expand(validated(Grid, clock_grid([0]), source="test"), Changes())) == len(WAYS)


def test_the_bounds_of_aggregation_are_judged():
    from aggregation import Side, report

    update = 4 * 160
    sides = {"silotune": Side(9, 2.0, 3 * update, 1.0), "flwr": Side(5, 4.0, 9 * update)}
    text, holds = report(sides, 160)
    assert holds and "| silotune | 9 | 2000.0 | 0.00 | 50% | 3.00 |" in text
    assert not report({**sides, "silotune": Side(9, 4.0, 3 * update, 1.0)}, 160)[1]
    assert not report({**sides, "silotune": Side(9, 2.0, 4 * update, 1.0)}, 160)[1]


def test_aggregation_is_measured_in_a_process_of_its_own(capsys):
    from aggregation import main

    assert main(["--side", "silotune", "--updates", "3", "--values", "16000"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 3


def test_a_protected_round_is_measured_whole():
    from privacy import one_round

    cost = one_round(4, 50, dropouts=1)
    assert cost.error <= 1.01 and cost.clients > 0 and cost.coordinator > 0
    assert set(cost.bytes_up) == {f"site-{number:04}" for number in range(4)}
    assert cost.bytes_up["site-0000"] > cost.bytes_up["site-0003"]  # the one that dropped out


def test_alignment_is_told_with_its_intervals():
    from preference import Row, table

    rows = [
        Row("dpo", seed, 0.5, tuned, (0.1, 0.3), 0.9, 2.0, 0.25, 0.75) for seed, tuned in ((0, 0.7), (1, 0.6), (2, 0.8))
    ]
    text = table(rows)
    assert "| dpo | 1 | 0.500 | 0.600 | +0.100 (+0.100 to +0.300) | 0.900 | 2.0 | 0.25 | 0.75 |" in text
    assert "dpo: gain +0.200, Student's 95 % interval over 3 seeds -0.048 to +0.448" in text


def test_neighbours_end_with_their_block():
    from neighbours import neighbours

    with neighbours(2) as started:
        assert [process.poll() for process in started] == [None, None]
    assert [process.returncode for process in started] == [-9, -9]


def test_only_silotune_s_own_way_is_held_to_a_bound():
    from neighbours import OWN, PLAIN, WAYS, _result

    assert len(WAYS) > 2 and PLAIN != OWN
    for name in WAYS:
        alone, beside = (_result(count, name, "all modes", [2.0], [2.1]) for count in (0, 2))
        assert (alone.passed, beside.passed) == ((True, False) if name == OWN else (True, True))
    assert _result(2, OWN, "isolated", [2.0], [2.1]).bound is None
