"""Rounds under a simulated clock: who counts, who is late, how stale, and that a resumed run has the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from silotune.errors import FederationError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.simulation.clocked import Clocked
from silotune.federation.simulation.pace import Pace
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings.links import ClockSection
from silotune.settings.sections import FederationSection
from silotune.structs import Failure, Reply, Request, ServerState, SiteState

NAMES = ("a", "b", "c", "d")
START = {"w": torch.tensor([1.0, -2.0, 0.5])}
SECONDS = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 10.0}
PACES = {name: Pace(seconds, 1.0, 1.0) for name, seconds in SECONDS.items()}
BODY = {"num_examples": 1, "loss": 1.0, "steps": 1, "tokens": 1, "seconds": 0.0}


class Inner:
    """Clients that are functions of what they were sent; each counts its rounds in its state."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.kept: dict[str, SiteState] = {}
        self.asked: list[tuple[str, int]] = []

    def clients(self) -> tuple[str, ...]:
        return NAMES

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for name, request in requests.items():
            self.asked.append((name, request.round_number))
            if name == self.broken:
                yield Failure(name, request.round_number, "train", "it broke")
                continue
            rounds = self.kept.get(name, SiteState(data={"rounds": 0})).data["rounds"] + 1
            self.kept[name] = SiteState(data={"rounds": rounds})
            delta = {"w": 0.5 * (torch.full((3,), float(NAMES.index(name)) + rounds) - request.tensors["w"])}
            yield Reply("train", request.round_number, name, delta, BODY)

    def states(self) -> dict[str, SiteState]:
        return dict(self.kept)

    def restore(self, states: Mapping[str, SiteState]) -> None:
        self.kept = dict(states)


def simulated(inner: Inner | None = None, *, wanted: int = 4, now: float = 0.0, **clock: Any) -> Clocked:
    return Clocked(inner or Inner(), PACES, settings=ClockSection(**clock), wanted=wanted, now=now)  # type: ignore[arg-type]


def plan(**changes: Any) -> Plan:
    return Plan(**{"rounds": 3, "method": method(FederationSection()), "body": {}, "seed": 7, **changes})


def run(folder: Path, transport: Clocked, made: Plan, state: ServerState | None = None) -> ServerState:
    return run_rounds(made, transport, state or ServerState(0, dict(START)), RunFolder(folder))


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    timed = ("train_seconds", "evaluate_seconds", "cost")
    return [{key: value for key, value in row.items() if key not in timed} for row in RunFolder(folder).read_rows(name)]


def test_a_round_lasts_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    state = run(tmp_path, simulated(), plan(rounds=2))
    assert [row["simulated_seconds"] for row in rows(tmp_path)] == [10.0, 20.0] and state.simulated_seconds == 20.0
    assert [(row["client"], row["simulated_seconds"]) for row in rows(tmp_path, "clients")][:4] == [
        ("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 10.0),
    ]  # fmt: skip
    plain = run_rounds(plan(rounds=2), Inner(), ServerState(0, dict(START)), RunFolder(tmp_path / "plain"))
    tiny.assert_same_bits(state.weights, plain.weights)


def test_what_comes_after_the_deadline_is_discarded_and_told(tmp_path: Path) -> None:
    state = run(tmp_path, simulated(deadline_seconds=5), plan(rounds=1))
    (row,) = rows(tmp_path)
    assert row["simulated_seconds"] == 5.0 and state.simulated_seconds == 5.0
    assert row["failures"] == [{"client": "d", "stage": "deadline", "reason": "its reply takes 10 simulated seconds"}]
    torch.testing.assert_close(state.weights["w"], START["w"] + 0.5 * (2.0 - START["w"]))  # targets 1, 2, 3


def test_nobody_in_time_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="'a' failed in round 1 at deadline"):
        run(tmp_path, simulated(deadline_seconds=0.5), plan(rounds=1))


def test_the_first_replies_count_when_more_were_asked(tmp_path: Path) -> None:
    state = run(tmp_path, simulated(wanted=2, over_sampling=2), plan(rounds=1, clients_per_round=4))
    (row,) = rows(tmp_path)
    assert row["simulated_seconds"] == state.simulated_seconds == 2.0
    assert [(item["client"], item["stage"]) for item in row["failures"]] == [("c", "late"), ("d", "late")]
    torch.testing.assert_close(state.weights["w"], START["w"] + 0.5 * (1.5 - START["w"]))


def test_a_client_that_fails_counts_as_none_of_the_wanted(tmp_path: Path) -> None:
    run(tmp_path, simulated(Inner("a"), wanted=2), plan(rounds=1))
    (row,) = rows(tmp_path)
    assert [(item["client"], item["stage"]) for item in row["failures"]] == [("a", "train"), ("d", "late")]
    assert row["simulated_seconds"] == 4.0


def buffered(**changes: Any) -> Plan:
    return plan(**{"staleness_exponent": 0.5, **changes})


def test_a_buffer_lets_the_slow_work_on(tmp_path: Path) -> None:
    inner = Inner()
    state = run(tmp_path, simulated(inner, buffer=2), buffered(rounds=9))
    clients = [(row["round"], row["client"], row["simulated_seconds"], row["staleness"]) for row in
               rows(tmp_path, "clients")]  # fmt: skip
    assert clients[:4] == [(1, "a", 1.0, 0), (1, "b", 2.0, 0), (2, "a", 3.0, 0), (2, "c", 4.0, 1)]
    (slow,) = [entry for entry in clients if entry[1] == "d"]
    assert slow[2] == 10.0 and slow[3] == slow[0] - 1 > 2
    assert state.simulated_seconds <= 12.0, "nine synchronous rounds take 90"
    assert [row["clients"] for row in rows(tmp_path)][0] == ["a", "b"]


def test_stale_updates_weigh_less(tmp_path: Path) -> None:
    state = run(tmp_path, simulated(buffer=2), buffered(rounds=2))
    first = START["w"] + 0.5 * (((1 - START["w"]) + (2 - START["w"])) / 2)
    fresh, stale = 0.5 * (2 - first), 0.5 * (3 - START["w"]) / 2**0.5  # "a" a second time; "c" from round 1
    torch.testing.assert_close(state.weights["w"], first + (fresh + stale) / 2)


def test_a_full_buffer_of_everybody_is_synchronous(tmp_path: Path) -> None:
    together = run(tmp_path / "1", simulated(), plan())
    apart = run(tmp_path / "2", simulated(buffer=4), buffered())
    tiny.assert_close(together.weights, apart.weights, 1e-6)
    assert together.simulated_seconds == apart.simulated_seconds
    assert {row["staleness"] for row in rows(tmp_path / "2", "clients")} == {0}


def test_at_most_so_many_work_at_one_time(tmp_path: Path) -> None:
    inner = Inner()
    run(tmp_path, simulated(inner, wanted=1, buffer=1), buffered(rounds=5))
    assert [number for _, number in inner.asked] == [1, 2, 3, 4, 5]
    assert len({name for name, _ in inner.asked}) > 1


def test_no_offer_is_passed_over(tmp_path: Path) -> None:
    inner = Inner()
    transport = simulated(inner, wanted=2, buffer=3)
    requests = {name: Request("train", 1, name, dict(START)) for name in NAMES}
    assert [reply.client for reply in transport.exchange(requests, timeout_seconds=1)] == ["a", "b", "c"]
    assert [name for name, _ in inner.asked] == ["a", "b", "c", "d"]


def test_a_broken_client_does_not_fill_the_buffer(tmp_path: Path) -> None:
    run(tmp_path, simulated(Inner("a"), buffer=2), buffered(rounds=2))
    assert [[item["client"] for item in row["failures"]] for row in rows(tmp_path)] == [["a"], ["a"]]
    assert len(rows(tmp_path, "clients")) == 4


@pytest.mark.parametrize("clock", [{"buffer": 2}, {"buffer": 1}, {"deadline_seconds": 5.0}])
@pytest.mark.parametrize("last", [1, 2, 3])
@pytest.mark.parametrize("broken", ["", "b"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path: Path, clock, last: int, broken: str) -> None:
    made = buffered(rounds=5) if "buffer" in clock else plan(rounds=5)
    whole = run(tmp_path / "whole", simulated(Inner(broken), **clock), made)
    run(tmp_path / "cut", simulated(Inner(broken), **clock), replace(made, rounds=last))
    checkpoint = RunFolder(tmp_path / "cut").load_checkpoint()
    assert checkpoint is not None
    state, sites = checkpoint
    transport = simulated(Inner(broken), now=state.simulated_seconds, **clock)
    transport.restore(sites)
    resumed = run(tmp_path / "cut", transport, made, state)
    tiny.assert_same_bits(resumed.weights, whole.weights)
    assert replace(resumed, weights={}, seconds=0.0) == replace(whole, weights={}, seconds=0.0)
    for name in ("metrics", "clients"):
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)


def test_other_requests_take_no_time() -> None:
    transport = simulated()
    requests = {name: Request("evaluate", 1, name, START) for name in NAMES}
    assert [reply.simulated_seconds for reply in transport.exchange(requests, timeout_seconds=1)] == [None] * 4
