"""``run_rounds`` over clients that are functions: what it asks, what it makes of the replies, what it records."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from silotune.errors import FederationError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings.sections import BudgetSection, FederationSection
from silotune.structs import Failure, Reply, Request, ServerState, SiteState, Tensors

NAMES = ("a", "b", "c", "d")
START = {"w": torch.tensor([1.0, -2.0, 0.5])}
Answer = Callable[[Request], Reply | Failure]


def report(examples: int, loss: float = 1.0) -> dict[str, Any]:
    spent = {"core_seconds": 0.5, "joules": 2.0, "energy_source": "measured"}
    return {"num_examples": examples, "loss": loss, "steps": 1, "tokens": 10, "seconds": 0.0, **spent}


def honest(request: Request) -> Reply:
    """Moves half-way to the client's own target; weighs 1, 2, 3, 4."""
    place = NAMES.index(request.client)
    delta = {"w": 0.5 * (torch.full((3,), float(place)) - request.tensors["w"])}
    return Reply("train", request.round_number, request.client, delta, report(place + 1, place + 0.5), 100, 40 + place)


class Fake:
    """A transport whose clients are one function; it keeps what a stateful client would."""

    def __init__(self, answer: Answer = honest, names: Sequence[str] = NAMES) -> None:
        self.answer = answer
        self.names = names
        self.asked: list[dict[str, Request]] = []
        self.kept: dict[str, SiteState] = {}

    def clients(self) -> Sequence[str]:
        return self.names

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        self.asked.append(dict(requests))
        for request in requests.values():
            yield self.answer(request)

    def states(self) -> dict[str, SiteState]:
        return self.kept

    def restore(self, states: Mapping[str, SiteState]) -> None:
        self.kept = dict(states)


def plan(**changes: Any) -> Plan:
    return Plan(**{"rounds": 3, "method": method(FederationSection()), "body": {"x": 1}, "seed": 7, **changes})


def run(folder: Path, made: Plan, transport: Fake | None = None, state: ServerState | None = None, **more: Any):
    state = state or ServerState(0, dict(START))
    return run_rounds(made, transport or Fake(), state, RunFolder(folder), **more)


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    timed = ("train_seconds", "evaluate_seconds", "cost")
    return [{key: value for key, value in row.items() if key not in timed} for row in RunFolder(folder).read_rows(name)]


def test_a_withheld_loss_is_not_taken_for_none_at_all(tmp_path: Path) -> None:
    def silent(request: Request) -> Reply:
        reply = honest(request)
        return replace(reply, body={**reply.body, "loss": None})

    with pytest.raises(FederationError, match="withholds its loss"):
        run(tmp_path, plan(method=method(FederationSection(weighting="q-ffl"))), Fake(silent))


def total(weights: Tensors) -> dict[str, Any]:
    return {"sum": float(weights["w"].sum())}


def test_requests_and_arithmetic(tmp_path: Path) -> None:
    transport = Fake()
    state = run(tmp_path, plan(rounds=2), transport)
    expected = START["w"]
    for number, requests in enumerate(transport.asked, start=1):
        assert tuple(requests) == NAMES
        for name, request in requests.items():
            assert (request.kind, request.round_number, request.client, request.body) == (
                "train",
                number,
                name,
                {"x": 1},
            )
            torch.testing.assert_close(request.tensors["w"], expected)
        expected = expected + 0.5 * (2.0 - expected)  # the weighted mean of the targets is (0 + 2 + 6 + 12) / 10
    torch.testing.assert_close(state.weights["w"], expected)
    assert state.round_number == 2 and state.stopped == ""


def test_rows_say_what_happened(tmp_path: Path) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []
    state = run(tmp_path, plan(rounds=2, score=total), notify=lambda event, fields: told.append((event, fields)))
    metrics = rows(tmp_path)
    assert [row["round"] for row in metrics] == [0, 1, 2]
    assert metrics[0] == {
        "round": 0, "sum": -0.5, "train_loss": None, "bytes_up": 0, "bytes_down": 0, "clients": [], "failures": [],
        "aggregation_error": None,
    }  # fmt: skip
    assert metrics[1]["train_loss"] == pytest.approx((1 * 0.5 + 2 * 1.5 + 3 * 2.5 + 4 * 3.5) / 10)
    assert metrics[2]["sum"] == float(state.weights["w"].sum())
    assert metrics[1]["bytes_up"] == 40 + 41 + 42 + 43 and metrics[1]["bytes_down"] == 400
    assert (state.bytes_up, state.bytes_down) == (2 * 166, 800)
    clients = rows(tmp_path, "clients")
    assert [(row["round"], row["client"], row["num_examples"]) for row in clients] == [
        (number, name, place + 1) for number in (1, 2) for place, name in enumerate(NAMES)
    ]
    assert clients[1] == {"round": 1, "client": "b", **report(2, 1.5), "bytes_up": 41, "bytes_down": 100}
    assert [event for event, _ in told].count("client_finished") == 8
    assert [fields["round"] for event, fields in told if event == "round_finished"] == [0, 1, 2]


def test_order_of_clients_does_not_matter(tmp_path: Path) -> None:
    forward = run(tmp_path / "1", plan(), Fake())
    backward = run(tmp_path / "2", plan(), Fake(names=NAMES[::-1]))
    tiny.assert_close(forward.weights, backward.weights, 1e-7)


def fails_for(*names: str) -> Answer:
    def answer(request: Request) -> Reply | Failure:
        if request.client in names:
            return Failure(request.client, request.round_number, "train", "it broke", bytes_down=100)
        return honest(request)

    return answer


def test_a_failed_client_is_recorded_and_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    state = run(tmp_path, plan(rounds=1), Fake(fails_for("d")), notify=lambda event, fields: told.append(event))
    torch.testing.assert_close(state.weights["w"], START["w"] + 0.5 * (8 / 6 - START["w"]))
    (row,) = rows(tmp_path)
    assert row["failures"] == [{"client": "d", "stage": "train", "reason": "it broke"}]
    assert row["clients"] == list(NAMES)
    assert row["bytes_down"] == state.bytes_down == 400, "what was sent to the client that failed was sent"
    assert row["bytes_up"] == 40 + 41 + 42
    assert told.count("client_failed") == 1 and told.count("client_finished") == 3


def test_a_round_that_waits_ends_with_the_bits_of_one_that_did_not(tmp_path: Path) -> None:
    bad = {2: 3}  # round -> tries that go wrong

    def answer(request: Request) -> Reply | Failure:
        if request.client == "a" and bad.get(request.round_number, 0):
            bad[request.round_number] -= 1
            return Failure("a", request.round_number, "network", "away")
        return honest(request)

    told: list[str] = []
    waited = run(
        tmp_path / "1",
        plan(min_replies=4, below_minimum="wait"),
        Fake(answer),
        notify=lambda name, _: told.append(name),
    )
    tiny.assert_same_bits(waited.weights, run(tmp_path / "2", plan()).weights)
    assert told.count("round_waits") == 3 and rows(tmp_path / "1") == rows(tmp_path / "2")
    with pytest.raises(FederationError, match="round 1 was tried 20 times: 3 usable replies of 4"):
        run(tmp_path / "3", plan(min_replies=4, below_minimum="wait"), Fake(fails_for("a")))


def test_a_round_that_is_skipped_changes_nothing_and_is_recorded(tmp_path: Path) -> None:
    def answer(request: Request) -> Reply | Failure:
        return fails_for("a")(request) if request.round_number == 2 else honest(request)

    state = run(tmp_path, plan(min_replies=4, below_minimum="skip"), Fake(answer))
    metrics = rows(tmp_path)
    assert [row["round"] for row in metrics] == [1, 2, 3] and state.round_number == 3
    assert metrics[1]["failures"][0]["client"] == "a"
    tiny.assert_same_bits(state.weights, run(tmp_path / "2", plan(rounds=2)).weights)
    assert state.bytes_down == 3 * 400


def test_too_few_replies_end_the_run_and_say_why(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="1 usable replies of 4.*min_replies = 2.*'a' failed in round 1 at train"):
        run(tmp_path, plan(min_replies=2), Fake(fails_for("a", "b", "c")))
    with pytest.raises(FederationError, match=r"'a' failed in round 1 at train: it broke \(and 3 more\)"):
        run(tmp_path, plan(), Fake(fails_for(*NAMES)))
    assert RunFolder(tmp_path).load_checkpoint() is None


WRONG: dict[str, Callable[[Reply], Reply]] = {
    "num_examples": lambda reply: replace(reply, body={**reply.body, "num_examples": -3}),
    "loss": lambda reply: replace(reply, body={**reply.body, "loss": float("nan")}),
    "body": lambda reply: replace(reply, body={}),
    "round": lambda reply: replace(reply, round_number=9),
    "kind": lambda reply: replace(reply, kind="evaluate"),
    "client": lambda reply: replace(reply, client="stranger"),
    "twice": lambda reply: replace(reply, client="a"),
    "not finite": lambda reply: replace(reply, tensors={"w": torch.tensor([1.0, float("nan"), 0.0])}),
    "too large": lambda reply: replace(reply, tensors={"w": torch.tensor([1.0, -1e30, 0.0])}),
    "shape": lambda reply: replace(reply, tensors={"w": torch.ones(4)}),
    "name": lambda reply: replace(reply, tensors={"v": torch.ones(3)}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_reply_that_answers_no_request_counts_as_failed(tmp_path: Path, fault: str) -> None:
    def answer(request: Request) -> Reply:
        return WRONG[fault](honest(request)) if request.client == "d" else honest(request)

    state = run(tmp_path / "1", plan(rounds=1), Fake(answer))
    expected = run(tmp_path / "2", plan(rounds=1), Fake(fails_for("d")))
    tiny.assert_same_bits(state.weights, expected.weights)
    (failure,) = rows(tmp_path / "1")[0]["failures"]
    assert failure["stage"] == "reply" and failure["client"] in ("a", "d", "unknown")


def test_never_two_updates_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def answer(request: Request) -> Reply:
        nonlocal most
        reply = honest(request)
        alive.append(weakref.ref(reply.tensors["w"]))
        most = max(most, sum(ref() is not None for ref in alive))
        return reply

    run(tmp_path, plan(rounds=2), Fake(answer))
    assert len(alive) == 8 and most == 1


def test_clients_are_sampled_by_seed(tmp_path: Path) -> None:
    transports = [Fake() for _ in range(3)]
    for number, (transport, seed) in enumerate(zip(transports, (7, 7, 8), strict=True)):
        run(tmp_path / str(number), plan(rounds=6, clients_per_round=2, seed=seed), transport)
    asked = [[tuple(requests) for requests in transport.asked] for transport in transports]
    assert asked[0] == asked[1] != asked[2]
    assert {len(names) for names in asked[0]} == {2} and len(set(asked[0])) > 1


def test_scoring_every_second_round(tmp_path: Path) -> None:
    run(tmp_path, plan(rounds=5, every=2, score=total))
    assert [row["round"] for row in rows(tmp_path) if "sum" in row] == [0, 2, 4, 5]


def selecting(*values: float) -> Callable[[Tensors], float]:
    remaining = iter(values)
    return lambda weights: next(remaining)


def test_the_best_round_is_kept(tmp_path: Path) -> None:
    seen: list[Tensors] = []

    def select(weights: Tensors) -> float:
        seen.append(weights)
        return (0.1, 0.5, 0.9, 0.7, 0.9)[len(seen) - 1]

    state = run(tmp_path, plan(rounds=4, select=select))
    assert (state.best_round, state.best_metric, state.round_number) == (2, 0.9, 4)
    tiny.assert_same_bits(state.best_weights, seen[2])


def test_the_untrained_model_may_be_the_best(tmp_path: Path) -> None:
    state = run(tmp_path, plan(rounds=2, select=selecting(0.9, 0.5, 0.6)))
    assert (state.best_round, state.best_metric) == (0, 0.9)
    tiny.assert_same_bits(state.best_weights, START)


def test_patience_stops_the_run(tmp_path: Path) -> None:
    state = run(tmp_path, plan(rounds=9, patience=2, select=selecting(0.1, 0.5, 0.4, 0.5, 9, 9)))
    assert state.round_number == 3 and state.best_round == 1
    assert state.stopped == "no better selection metric for 2 rounds"
    checkpoint = RunFolder(tmp_path).load_checkpoint()
    assert checkpoint is not None and checkpoint[0].stopped == state.stopped
    again = run(tmp_path, plan(rounds=9, patience=2), state=checkpoint[0])
    assert again.round_number == 3  # a stopped run stays stopped


def test_the_selection_metric_is_looked_at_every_few_rounds_and_at_the_end(tmp_path: Path) -> None:
    state = run(tmp_path / "1", plan(rounds=5, select_every=2, select=selecting(0.1, 0.4, 0.6, 0.5)))
    assert (state.best_round, state.best_metric) == (4, 0.6)  # after rounds 0, 2, 4 and 5
    budget = BudgetSection(bytes=3 * 566)
    state = run(tmp_path / "2", plan(rounds=9, select_every=5, budget=budget, select=selecting(0.1, 0.4)))
    assert (state.round_number, state.best_round, state.best_metric) == (3, 3, 0.4)  # where it stopped


def test_the_target_stops_the_run(tmp_path: Path) -> None:
    state = run(tmp_path, plan(rounds=9, target=0.5, select=selecting(0.1, 0.4, 0.6)))
    assert state.round_number == 2 and state.stopped == "the selection metric reached evaluation.target = 0.5"


def test_budgets_stop_the_run_before_they_are_passed(tmp_path: Path) -> None:
    """A round takes 566 bytes, and 8 joules of the clients; the coordinator's are not known here."""
    state = run(tmp_path / "1", plan(rounds=9, budget=BudgetSection(bytes=3 * 566)))
    assert state.round_number == 3 and state.bytes_up + state.bytes_down == 3 * 566
    assert "federation.budget.bytes = 1698: 1698 are spent" in state.stopped
    state = run(tmp_path / "2", plan(rounds=9, budget=BudgetSection(joules=100)))
    assert state.round_number == 1 and "joules are not known" in state.stopped


@pytest.mark.parametrize("last", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path: Path, last: int, checkpoint_every: int) -> None:
    def made() -> Plan:
        return plan(
            rounds=5, clients_per_round=3, score=total, select=lambda weights: -abs(float(weights["w"].sum()) - 4),
            checkpoint_every=checkpoint_every,
        )  # fmt: skip

    class KilledError(Exception):
        pass

    def dies(request: Request) -> Reply:
        if request.round_number == last + 1 and request.client != "a":
            raise KilledError
        return honest(request)

    whole = run(tmp_path / "whole", made())
    with pytest.raises(KilledError):
        run(tmp_path / "cut", made(), Fake(dies))
    checkpoint = RunFolder(tmp_path / "cut").load_checkpoint()
    assert (checkpoint[0].round_number if checkpoint else 0) == last // checkpoint_every * checkpoint_every
    resumed = run(tmp_path / "cut", made(), state=checkpoint[0] if checkpoint else None)
    tiny.assert_same_bits(resumed.weights, whole.weights)
    tiny.assert_same_bits(resumed.best_weights, whole.best_weights)
    assert replace(resumed, weights={}, best_weights={}, seconds=0.0) == replace(
        whole, weights={}, best_weights={}, seconds=0.0
    )
    for name in ("metrics", "clients"):
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)


def test_checkpoints_hold_the_clients_states(tmp_path: Path) -> None:
    transport = Fake()
    transport.kept = {"b": SiteState(optimizer={"exp_avg/w": torch.ones(3)})}
    run(tmp_path, plan(rounds=1), transport)
    checkpoint = RunFolder(tmp_path).load_checkpoint()
    assert checkpoint is not None
    tiny.assert_same_bits(checkpoint[1]["b"].optimizer, {"exp_avg/w": torch.ones(3)})
