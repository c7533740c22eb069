"""What a run folder says of its run while it goes on, and the page that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finished_run import ACCURACIES, finished_run
from silotune.record.files import write_bytes
from silotune.record.runs import RunFolder
from silotune.report.lines import Line, chart, spark, thinned, ticks
from silotune.report.run_page import facts, sections, write_run_page
from silotune.report.watched import WatchedRun, number, whole, word

CONFIG = {
    "seed": 0, "model": {"name": "nano"}, "data": {"task": "finance-news"}, "adapter": {"type": "lora"},
    "federation": {"rounds": 10, "min_replies": 2, "algorithm": {"type": "fedavg"}},
}  # fmt: skip


def begun(root: Path, rounds: int = 3, name: str = "run") -> RunFolder:
    """A run of ten rounds over three banks that was stopped; bank-2 fails in round 2."""
    run = RunFolder.create(root, name, config=CONFIG)
    clients = {f"bank-{place}": {"num_examples": 100 + place} for place in range(3)}
    run.write_json("partition", {"clients": clients})
    run.append("events", {"event": "run_started", "time": 1000.0, "modes": ["federated"]})
    run.append("events", {"event": "mode_started", "time": 1001.0, "mode": "federated", "rounds": 10})
    for place in range(rounds + 1):
        add_round(run, place)
    return run


def add_round(run: RunFolder, place: int, **changes: Any) -> None:
    failures = [{"client": "bank-2", "stage": "deadline", "reason": "too late"}] if place == 2 else []
    row = {
        "round": place, "accuracy": 0.5 + place / 100, "train_loss": 1.0 / place if place else None,
        "train_seconds": 4.0, "evaluate_seconds": 1.0, "bytes_up": 1000 if place else 0, "bytes_down": 2000,
        "clients": [f"bank-{each}" for each in range(3)] if place else [], "failures": failures, **changes,
    }  # fmt: skip
    for each in range(3) if place else ():
        if each < 2 or place != 2:
            told = {"round": place, "client": f"bank-{each}", "loss": 1.0 + each, "num_examples": 100, "joules": 2.0}
            run.part("federated").append("clients", told)
    run.part("federated").append("metrics", row)
    run.append("events", {"event": "round_finished", "time": 1001.0 + 5 * place, "mode": "federated", "round": place})


def watched(run: RunFolder) -> WatchedRun:
    seen = WatchedRun(run.path)
    seen.refresh()
    return seen


def text(html: object) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", str(html)).split())


def test_a_run_that_was_stopped_says_its_round_its_cost_and_how_to_go_on(tmp_path: Path) -> None:
    run = begun(tmp_path)
    with run.lock():
        pass
    seen = watched(run)
    said = facts(seen)
    assert (said["state"], said["round"], said["figure"], said["left"]) == ("stopped", "3 of 10", "53.0 %", "-")
    assert (said["seconds"], said["bytes_up"], said["bytes_down"]) == ("20.0 s", "3.0 kB", "8.0 kB")
    assert said["energy"] == "16 J", "eight replies of two joules"
    assert f"silotune resume {run.path}" in text(sections(seen)["head"])


def test_time_left_is_the_pace_of_the_newest_rounds_while_a_process_holds_the_run(tmp_path: Path) -> None:
    run = begun(tmp_path)
    with run.lock():
        seen = watched(run)
        assert (seen.state, seen.seconds_left()) == ("running", 35.0)
        before = seen.version
        assert not seen.refresh() and seen.version == before, "nothing new"
        add_round(run, 4)
        assert seen.refresh() and seen.seconds_left() == 30.0 and facts(seen)["round"] == "4 of 10"
    seen.refresh()
    assert seen.state == "stopped" and seen.seconds_left() is None


def test_rounds_that_a_resumed_run_drops_are_not_shown(tmp_path: Path) -> None:
    run = begun(tmp_path)
    seen = watched(run)
    run.part("federated").keep_rounds("metrics", 1)
    run.part("federated").keep_rounds("clients", 1)
    run.append("events", {"event": "run_started", "time": 2000.0, "modes": ["federated"]})
    seen.refresh()
    assert seen.federated is not None and sorted(seen.federated.rounds) == [0, 1]
    assert seen.federated.failures == [] and seen.sessions == 2 and seen.started == 1000.0
    assert "resumed 1 time;" in text(sections(seen)["head"])


def test_who_came_who_failed_and_why_stand_in_the_page(tmp_path: Path) -> None:
    parts = sections(watched(begun(tmp_path)))
    assert "bank-2 102 2 of 3 1 0 3.000 - round 2: too late" in text(parts["institutions"])
    assert "needs 2 usable replies" in text(parts["institutions"])
    assert "2 bank-2 deadline too late" in text(parts["failures"])


def test_who_is_waited_for_comes_from_the_audit_trail(tmp_path: Path) -> None:
    run = begun(tmp_path)
    told = [("aggregation", {"round": 3})]
    told += [("request", {"round": 4, "kind": "train", "client": name}) for name in ("bank-0", "bank-1", "bank-2")]
    told += [
        ("reply", {"round": 4, "kind": "train", "client": "bank-1"}),
        ("refusal", {"round": 4, "client": "bank-2"}),
    ]
    for index, (event, fields) in enumerate(told):
        run.part("federated").append("audit", {"index": index, "event": event, "fields": fields, "time": 5.0})
    seen = watched(run)
    assert seen.trail.present() == (4, "train", ["bank-0", "bank-1", "bank-2"], ["bank-1", "bank-2"])
    assert "Round 4, train: 2 of 3 asked have answered; at least 2 must. Not answered yet: bank-0." in text(
        sections(seen)["now"]
    )
    assert seen.trail.number == 6 and not seen.trail.is_closed


def test_privacy_is_shown_as_spent_against_planned(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.write_json("privacy", {"statement": ["a record is protected"], "plan": {"epsilon": 8.0, "delta": 1e-5}})
    add_round(run, 4, epsilon=3.25)
    said = text(sections(watched(run))["privacy"])
    assert "Epsilon spent 3.25 of 8 planned, at delta 1e-05." in said and "a record is protected" in said


def test_a_finished_run_shows_the_tables_of_its_report(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    seen = watched(run)
    assert seen.state == "finished"
    results = text(sections(seen)["results"])
    assert "finance-news with nano and lora: test split" in results and "80.0 % (77.0–83.0)" in results
    assert f"{100 * ACCURACIES[-1]:.1f} %" in text(sections(seen)["curves"])


def test_a_page_is_one_file_without_script_or_address(tmp_path: Path) -> None:
    page = write_run_page(finished_run(tmp_path, "demo").path).read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "default-src &#39;none&#39;" in page and "<svg" in page


NASTY = '<script>alert("x")</script>\u202e\u001b[2J'


def test_every_name_in_the_folder_is_escaped(tmp_path: Path) -> None:
    config = {**CONFIG, "data": {"task": NASTY}, "model": {"name": NASTY}, NASTY: NASTY}
    run = RunFolder.create(tmp_path, "run", config=config)
    run.write_json("partition", {"clients": {NASTY: {"num_examples": 3}}})
    run.write_json("privacy", {"statement": [NASTY], "plan": {"epsilon": 1}})
    run.append("events", {"event": "run_started", "time": 1.0, "modes": ["federated", NASTY]})
    run.append("events", {"event": "note", "text": NASTY})
    failure = {"client": NASTY, "stage": NASTY, "reason": NASTY}
    row = {"round": 1, "accuracy": 0.5, "clients": [NASTY], "failures": [failure], "epsilon": 1.0}
    run.part("federated").append("metrics", row)
    run.part("federated").append("clients", {"round": 1, "client": NASTY, "loss": 1.0})
    run.part("federated").append("audit", {"index": 0, "event": NASTY, "fields": {"client": NASTY, "kind": NASTY}})
    page = write_run_page(run.path).read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;") > 10
    assert "<script" not in page and "\u202e" not in page and "\u001b" not in page


WRONG: tuple[Any, ...] = (None, True, "x", [], {}, [[]], {"a": []}, -1, 10**400, 1e308, "9" * 5000, {"x": {"y": {}}})


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_values_of_a_wrong_type_are_not_known_and_break_nothing(tmp_path: Path, value: Any) -> None:
    run = begun(tmp_path)
    names = ("config", "versions", "partition", "privacy", "summary")
    for name in names:
        (run.path / f"{name}.json").write_text(json.dumps(value))
        write_run_page(run.path)
    keys = ("federation", "data", "clients", "plan", "statement", "packages", "task", "metric", "budget", "isolated")
    for name in names:
        (run.path / f"{name}.json").write_text(json.dumps(dict.fromkeys(keys, value)))
        write_run_page(run.path)
    heads = (
        "round", "accuracy", "train_loss", "train_seconds", "clients", "failures", "cost", "epsilon", "bytes_up",
        "time", "event", "mode", "modes", "text", "client", "loss", "index", "fields", "joules", "num_examples",
        "rounds",
    )  # fmt: skip
    for name in ("events", "federated/metrics", "federated/clients", "federated/audit"):
        with (run.path / f"{name}.jsonl").open("a") as file:
            for head in heads:
                told = {"round": 1, "event": "mode_started", "mode": "federated", "client": "a", head: value}
                file.write(json.dumps(told) + "\n")
    write_run_page(run.path)


def test_a_broken_line_is_named_in_the_page_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = begun(tmp_path)
    place = run.path / "federated" / "metrics.jsonl"
    lines = place.read_bytes().split(b"\n")
    write_bytes(place, b"\n".join([lines[0], b"{broken", *lines[1:]]))
    head = text(sections(watched(run))["head"])
    assert "federated: line 2 of metrics.jsonl is not a JSON object: it is left out" in head and "3 of 10" in head


def test_numbers_and_words() -> None:
    assert [number({"a": value}, "a") for value in (1, 2.5, True, "1", float("nan"), 10**400)] == [1, 2.5] + 4 * [None]
    assert [whole({"a": value}, "a") for value in (3, 3.9, -1, 1e300)] == [3, 3, None, None]
    assert (word("a\nb"), word(None), word(3), len(word("x" * 500))) == ("a\\u000ab", "", "3", 200)


def test_ticks_are_round_numbers() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1.0])
    assert ticks(0, 10) == pytest.approx([0, 5, 10])
    assert ticks(3, 3) == [3]
    assert ticks(-0.02, 0.02) == pytest.approx([-0.02, -0.01, 0, 0.01, 0.02])


def test_a_long_line_keeps_its_ends_and_its_peak() -> None:
    points = [(float(x), 100.0 if x == 777 else x % 7 / 10) for x in range(5000)]
    few = thinned(points)
    assert len(few) <= 260 and few[0] == points[0] and few[-1] == points[-1] and (777.0, 100.0) in few
    assert [x for x, _ in few] == sorted(x for x, _ in few)


def test_a_chart_of_one_point_or_of_equal_ones_is_drawn() -> None:
    for points in ([(1.0, 2.0)], [(0.0, 5.0), (1.0, 5.0)], [(0.0, 0.0)], [(1.0, -1e30), (2.0, 1e30)]):
        drawn = str(chart([Line("a", points), Line("level", points[:1], is_level=True)], label="l", shown=str))
        assert "<svg" in drawn and "nan" not in drawn and "inf" not in drawn
    assert chart([Line("a", [])], label="l", shown=str) == "" and spark([(1.0, 1.0)]) == ""


def test_a_marked_point_stands_in_the_legend() -> None:
    drawn = text(chart([Line("a", [(1.0, 3.0), (2.0, 1.0)], mark=(1.0, 3.0))], label="l", shown=str))
    assert "a 3.0" in drawn
