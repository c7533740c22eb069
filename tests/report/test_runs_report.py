from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from finished_run import finished_run, summary
from silotune.errors import RunFolderError
from silotune.record.runs import RunFolder
from silotune.report import pictures
from silotune.report import runs as report


def shown(table: Table, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_the_summary_has_a_row_for_each_way_to_train():
    text = shown(report.summary_table(summary()))
    rows = [line for line in text.splitlines() if " % " in line]
    assert [row.split("│")[1].strip() for row in rows] == [
        "base, untrained", "each alone: mean", "each alone: best", "federated", "centralised",
    ]  # fmt: skip
    assert "80.0 % (77.0–83.0)" in rows[3] and "79.0 %" in rows[3] and "8.3 MB" in rows[3] and "20.5" in rows[3]
    assert "every mode takes 250 optimiser steps" in text
    narrow = shown(report.summary_table(summary()), width=80)
    assert "80.0 % (77.0–83.0)" in narrow


def test_an_answer_that_is_always_the_same_is_told_beside_its_figure():
    always = {"answer": "neutral", "accuracy": 0.62, "macro_f1": 0.2551}
    federated = {"accuracy": 0.62, "macro_f1": 0.2551, "answers_one_class": True, "round": 2, "rounds": 8, "seconds": 1}
    alone = {**summary()["isolated"], "clients": {"a": {"answers_one_class": True}, "b": {"answers_one_class": False}}}
    given = summary(majority=always, federated=federated, isolated=alone)
    text = shown(report.summary_table(given))
    assert "always neutral" in text and "62.0 %" in text and "25.5 %" in text
    assert text.count("answers one class only") == 1 and "1 of 2 answer one class only" in text


def test_the_round_that_was_kept_is_named_below_the_table():
    kept = "kept, as the best by the selection metric: round of federated 3 of 8"
    assert kept in " ".join(shown(report.summary_table(summary(kept=kept))).split())


def test_a_worst_institution_above_the_mean_is_explained():
    cost = {"joules": None, "co2_kg": None, "peak_memory_bytes": None, "energy_source": "unavailable"}
    alone = {**summary()["isolated"], "cost": cost, "own": {"a": 0.9, "b": 0.7}}
    assert "may exceed the mean" in " ".join(shown(report.served_table(summary(isolated=alone))).split())
    alone = {**alone, "own": {"a": 0.9, "b": 0.6}}
    assert "may exceed the mean" not in " ".join(shown(report.served_table(summary(isolated=alone))).split())


def test_modes_that_did_not_run_have_no_row():
    text = shown(report.summary_table(summary(isolated=None, centralized=None, base=None)))
    assert "federated" in text and "alone" not in text and "centralised" not in text and "untrained" not in text


def test_open_answers_are_shown_by_perplexity():
    changes = {
        "metric": "perplexity", "base": {"perplexity": 30.0}, "federated": {"perplexity": 12.345, "seconds": 1},
        "centralized": None, "isolated": {"perplexity": {"mean": 20.0, "best": 15.0}, "seconds": 2},
    }  # fmt: skip
    text = shown(report.summary_table(summary(**changes)))
    assert "perplexity" in text and "12.35" in text and "15.00" in text and "macro-F1" not in text


def test_several_runs_side_by_side(tmp_path):
    runs = [finished_run(tmp_path), finished_run(tmp_path, "tfns", task="tfns", metric="macro_f1", isolated=None)]
    text = shown(report.runs_table(runs))
    assert "80.0 %" in text and "79.0 %" in text and "61.0 %" in text and "-" in text
    assert [row["folder"] for row in report.runs_json(runs)] == [str(run.path) for run in runs]
    assert report.runs_json(runs)[0]["seed"] == 3
    assert max(len(line) for line in shown(report.runs_table(runs), width=80).splitlines()) <= 80
    doubtful = {"accuracy": 0.62, "answers_one_class": True, "seconds": 1, "round": 3}
    first = {"accuracy": 0.34, "seconds": 1, "round": 0}
    run = finished_run(tmp_path, "x", federated=doubtful, centralized=first, majority={"accuracy": 0.62})
    text = shown(report.runs_table([run]))
    assert "one class" in text and "untrained" in text and text.count("62.0 %") == 2


def test_a_run_that_is_not_finished_says_how_to_go_on(tmp_path):
    run = RunFolder.create(tmp_path, "demo", config={})
    with pytest.raises(RunFolderError, match="silotune resume"):
        report.runs_table([run])
    with pytest.raises(RunFolderError, match="not finished"):
        pictures.draw_rounds(run, tmp_path / "x.png")
    with pytest.raises(RunFolderError, match="partition.json"):
        pictures.draw_skew(run, tmp_path / "x.png")


def test_pictures_are_drawn(tmp_path):
    run = finished_run(tmp_path)
    out = pictures.draw_rounds(run, run.path / "accuracy.png")
    assert out == run.path / "accuracy.png"
    assert min(png_size(out)) > 400
    assert min(png_size(pictures.draw_skew(run, tmp_path / "new" / "skew.png"))) > 300


def test_the_picture_shows_the_figure_of_the_table_and_lines_that_lie_on_each_other(tmp_path):
    points = [(number, 0.5 + number / 10) for number in range(4)]
    kind = report.KINDS["accuracy"]
    kept = summary(federated={"accuracy": 0.6, "round": 1, "rounds": 3})
    assert pictures._kept(kept, kind, points) == (1, 0.6)
    assert pictures._kept_text(kept, kind, points) == "60.0 % in round 1, which was kept"
    assert [pictures.twins([0.5, 0.7, 0.5, 0.5], place) for place in range(4)] == [2, 0, 1, 0]


def test_a_run_without_federated_rounds_has_no_picture_of_them(tmp_path):
    run = RunFolder.create(tmp_path, "demo", config={})
    run.write_json("summary", summary(federated=None))
    with pytest.raises(RunFolderError, match="no federated rounds"):
        pictures.draw_rounds(run, tmp_path / "x.png")


def test_perplexity_is_drawn_as_it_is(tmp_path):
    run = RunFolder.create(tmp_path, "demo", config={})
    run.write_json("summary", summary(metric="perplexity", isolated=None, centralized=None))
    run.part("federated").append("metrics", {"round": 0, "perplexity": 9.0})
    run.part("federated").append("metrics", {"round": 1, "perplexity": None})
    assert png_size(pictures.draw_rounds(run, tmp_path / "x.png"))[0] > 400


@pytest.mark.parametrize(("clients", "labels"), [(3, 12), (60, 4), (2, 0)])
def test_skew_of_many_labels_many_clients_or_open_answers(tmp_path, clients, labels):
    run = RunFolder.create(tmp_path, "demo", config={})
    held = {f"label {number}": 5 * (number + 1) for number in range(labels)}
    report_of = {f"c{number}": {"num_examples": 10, "labels": held} for number in range(clients)}
    run.write_json("partition", {"clients": report_of})
    assert png_size(pictures.draw_skew(run, tmp_path / "x.png"))[0] > 400


def test_many_labels_are_gathered_without_losing_examples():
    held = {f"label {number}": number + 1 for number in range(12)}
    labels = pictures._shown_labels([held])
    assert len(labels) == pictures.MOST_LABELS
    assert sum(pictures._width(held, label, labels) for label in labels) == sum(held.values())


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8.3e6, "8.3 MB"), (2e9, "2.0 GB"), (3e12, "3.0 TB")],
)
def test_bytes_for_people(number, text):
    assert report.bytes_text(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (3.21, "3.2 s"), (125, "2 min 05 s"), (7300, "2 h 01 min")])
def test_seconds_for_people(seconds, text):
    assert report.seconds_text(seconds) == text


def test_costs_are_shown_and_estimates_marked():
    cost = {"joules": 1234.0, "co2_kg": 6e-5, "energy_source": "estimated", "peak_memory_bytes": 812_000_000}
    unknown = {**cost, "joules": None, "co2_kg": None, "energy_source": "unavailable"}
    cost |= {"steps": 1200, "passes": 2.5, "core_seconds": 20.0, "slowest_seconds": 5.0}
    changes = {
        "federated": {"accuracy": 0.8, "ece": 0.0456, "own": {"a": 0.7, "b": 0.9, "c": None}, "cost": cost},
        "isolated": {"ece": {"mean": 0.2}, "own": {"a": 0.5}, "cost": {**cost, "energy_source": "measured"}},
        "centralized": {"accuracy": 0.8, "own": {}, "cost": unknown},
    }
    own = [cells(line) for line in shown(report.served_table(summary(**changes))).splitlines() if "│" in line]
    assert own == [["each alone", "0.200", "50.0 %"], ["federated", "0.046", "70.0 %"], ["centralised", "-", "-"]]
    took = [cells(line) for line in shown(report.cost_table(summary(**changes))).splitlines() if "MB" in line]
    assert took == [
        ["each alone", "1,200", "2.5", "20.0 s", "5.0 s", "1.23 kJ", "60 mg", "812.0 MB"],
        ["federated", "1,200", "2.5", "20.0 s", "5.0 s", "1.23 kJ", "60 mg", "812.0 MB"],
        ["centralised", "-", "-", "-", "-", "-", "-", "812.0 MB"],
    ]
    assert "at equal time" in shown(report.cost_table(summary(**changes, budget_match="time")))
    said = " ".join(shown(report.cost_table(summary(**changes))).split())
    assert "energy, and so CO2e, is estimated and not measured: federated" in said
    one = {**summary(**changes), "isolated": None, "centralized": None}
    assert "what it took" in shown(report.cost_table(one)) and "at equal" not in shown(report.cost_table(one))
    assert report.scaled_text(0.0, "J") == "0 J" and report.scaled_text(2e-7, "g") == "0.2 µg"


def test_a_run_of_an_older_version_has_no_cost_rows():
    assert "MB" not in shown(report.cost_table(summary()))
