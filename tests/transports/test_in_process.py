"""Clients in this process: what would travel is what is counted, and a broken client breaks nobody else."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from acting import ORDER, acting
from crowd import EXAMPLES, KEEPING, SETTINGS, TRAINING, ask, many
from silotune import tensors as arithmetic
from silotune.errors import DataError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import encode
from silotune.federation.wire.run_setup import RunSettings
from silotune.methods.algorithms import method
from silotune.models import adapters
from silotune.models.threads import operation_threads
from silotune.record.runs import RunFolder
from silotune.seeds import derive
from silotune.settings.sections import FederationSection
from silotune.structs import Failure, Reply, Request, ServerState, SiteState
from silotune.training.local import RoundPlace, train_round
from silotune.transports import in_process
from silotune.transports.in_process import InProcess, workers_for


def sites(model, settings: RunSettings = SETTINGS) -> dict[str, Site]:
    own = {"a": EXAMPLES[:3], "b": EXAMPLES[3:]}
    return {name: Site(name, examples, model, settings=settings) for name, examples in own.items()}


def test_bytes_are_those_of_the_encoded_messages(model, start) -> None:
    for reply in ask(InProcess(sites(model)), start):
        request = Request("train", 1, reply.client, start, ORDER)
        assert reply.bytes_down == len(encode(request))
        assert reply.bytes_up == len(encode(Reply("train", 1, reply.client, reply.tensors, reply.body)))


def test_encoding_changes_no_bit(model, start) -> None:
    encoded, direct = (ask(InProcess(sites(model), encode=choice), start) for choice in (True, False))
    for left, right in zip(encoded, direct, strict=True):
        for name, tensor in right.tensors.items():
            assert torch.equal(left.tensors[name], tensor)
        assert right.bytes_up == right.bytes_down == arithmetic.num_bytes(start)
        assert left.body["loss"] == right.body["loss"]


def test_evaluation_sends_no_tensors_back(model, start) -> None:
    replies = ask(InProcess(sites(model)), start, "evaluate")
    assert [reply.body["num_examples"] for reply in replies] == [3, 5]
    assert all(reply.bytes_up < reply.bytes_down for reply in replies)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("client has none"), "client has none"),
        (RuntimeError("a secret sentence"), "RuntimeError"),
        (KeyError("a secret sentence"), "KeyError"),
        (MemoryError(), "MemoryError"),
    ],
)
@pytest.mark.parametrize("encoded", [True, False])
def test_a_failure_is_never_an_exception_and_tells_no_text(
    model, start, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, encoded: bool
) -> None:
    def broken(request: Request, site: Site) -> Reply:
        if site.name == "a":
            raise error
        return client_round(request, site)

    monkeypatch.setattr(in_process, "client_round", broken)
    first, second = ask(InProcess(sites(model), encode=encoded), start)
    assert isinstance(second, Reply)
    assert first == Failure("a", 1, "train", reason, bytes_down=second.bytes_down)


def test_an_update_that_is_not_finite_or_of_another_shape_is_a_failure(model, start, monkeypatch) -> None:
    def poisoned(request: Request, site: Site) -> Reply:
        delta = dict(request.tensors)
        name = next(iter(delta))
        delta[name] = torch.full_like(delta[name], float("nan")) if site.name == "a" else torch.zeros(1)
        return Reply("train", 1, site.name, delta, {})

    monkeypatch.setattr(in_process, "client_round", poisoned)
    first, second = ask(InProcess(sites(model)), start)
    assert isinstance(first, Failure) and "finite" in first.reason
    assert isinstance(second, Failure) and "expected" in second.reason


def test_states_are_kept_and_given_back(model, start) -> None:
    transport = InProcess(sites(model, KEEPING))
    ask(transport, start)
    states = transport.states()
    assert all(state.optimizer for state in states.values())
    fresh = InProcess(sites(model))
    fresh.restore({"b": states["b"]})
    assert fresh.states() == {"a": SiteState(), "b": states["b"]}


def test_fedavg_with_one_client_is_central_training_bit_for_bit(model, start, tmp_path: Path) -> None:
    plan = Plan(rounds=2, method=method(FederationSection()), body=ORDER, seed=3, settings=SETTINGS)
    transport = InProcess({"only": Site("only", EXAMPLES, model, settings=SETTINGS)})
    state = run_rounds(plan, transport, ServerState(0, start), RunFolder(tmp_path))
    weights = start
    for number in (1, 2):
        place = RoundPlace(derive(3, "train", round_number=number, client="only"), number, 2)
        weights = arithmetic.add(weights, train_round(model, weights, EXAMPLES, settings=TRAINING, place=place).delta)
    tiny.assert_same_bits(dict(sorted(state.weights.items())), dict(sorted(weights.items())))


def test_one_local_step_of_equal_silos_is_one_central_step(model, start, tmp_path: Path) -> None:
    settings = tiny.training(optimizer="sgd", learning_rate=0.1, objective="choice", batch_size=8, max_steps=1)
    acts = acting(settings, rounds=2)
    plan = Plan(rounds=1, method=method(acts.federation), body=ORDER, seed=3, settings=acts)
    split = {name: Site(name, EXAMPLES[place::4], model, settings=acts) for place, name in enumerate("abcd")}
    together = {"all": Site("all", EXAMPLES, model, settings=acts)}
    made = [
        run_rounds(plan, InProcess(clients), ServerState(0, start), RunFolder(tmp_path / str(number))).weights
        for number, clients in enumerate((split, together))
    ]
    tiny.assert_close(*made, 1e-6)


def test_fedprox_of_zero_is_fedavg(model, start, tmp_path: Path) -> None:
    made = []
    for number, options in enumerate(({}, {"algorithm": {"type": "fedprox", "proximal_mu": 0.0}})):
        acts = acting(TRAINING, rounds=2, **options)
        plan = Plan(rounds=2, method=method(acts.federation), body=ORDER, seed=3, settings=acts)
        state = run_rounds(
            plan, InProcess(sites(model, acts)), ServerState(0, start), RunFolder(tmp_path / str(number))
        )
        made.append(state.weights)
    tiny.assert_same_bits(*made)


@pytest.mark.parametrize("kind", ["lora", "ia3", "none"])
@pytest.mark.parametrize("encoded", [True, False])
def test_side_by_side_gives_the_bits_and_the_order_of_one_after_another(kind: str, encoded: bool) -> None:
    found = []
    for workers in (1, 3):
        model = tiny.adapted(type=kind, stirred=False)
        first = adapters.read(model)
        transport = InProcess(many(model, settings=KEEPING), encode=encoded, workers=workers)
        rounds = [ask(transport, first) for _ in range(2)]
        found.append((rounds, transport.states()))
        assert adapters.read(model).keys() == first.keys()
    (alone, alone_states), (beside, beside_states) = found
    for left, right in zip([*alone[0], *alone[1]], [*beside[0], *beside[1]], strict=True):
        assert isinstance(left, Reply) and isinstance(right, Reply)
        assert left.client == right.client
        tiny.assert_same_bits(left.tensors, right.tensors)
        assert {key: value for key, value in left.body.items() if "seconds" not in key} == {
            key: value for key, value in right.body.items() if "seconds" not in key
        }
    for name, state in alone_states.items():
        for group, tensors in state.groups().items():
            tiny.assert_same_bits(tensors, beside_states[name].groups()[group])


def test_workers_share_the_base_and_nothing_that_is_trained(model) -> None:
    second = adapters.replicate(model)
    own = {parameter.data_ptr() for parameter in model.parameters.values()}
    mine = {parameter.data_ptr() for parameter in model.model.parameters()} - own
    theirs = {parameter.data_ptr() for parameter in second.model.parameters()}
    trained = {parameter.data_ptr() for parameter in second.parameters.values()}
    assert theirs - trained == mine and not trained & own
    assert second.parameters.keys() == model.parameters.keys()


def test_a_broken_client_breaks_no_neighbour_and_torch_is_left_as_it_was(model, start, monkeypatch) -> None:
    def broken(request: Request, site: Site) -> Reply:
        if site.name in ("site-1", "site-4"):
            raise MemoryError
        torch.rand(3)
        return client_round(request, site)

    monkeypatch.setattr(in_process, "client_round", broken)
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    replies = ask(InProcess(many(model), workers=2), start)
    assert [isinstance(reply, Failure) for reply in replies] == [number in (1, 4) for number in range(7)]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)


def test_only_few_replies_wait_for_their_turn(model, start, monkeypatch) -> None:
    answered: list[str] = []

    def fast(request: Request, site: Site) -> Reply:
        answered.append(site.name)
        return Reply("train", 1, site.name, dict(request.tensors), {})

    monkeypatch.setattr(in_process, "client_round", fast)
    transport = InProcess(many(model, 40), workers=2)
    requests = {name: Request("train", 1, name, start, ORDER) for name in transport.clients()}
    replies = transport.exchange(requests, timeout_seconds=1.0)
    for taken, reply in enumerate(replies, start=1):
        assert isinstance(reply, Reply)
        assert len(answered) <= taken + 2  # those at work, and one that is done
    assert len(answered) == 40


def test_a_run_that_is_given_up_stops_its_workers(model, start) -> None:
    transport = InProcess(many(model, 20), workers=2)
    requests = {name: Request("train", 1, name, start, ORDER) for name in transport.clients()}
    replies = transport.exchange(requests, timeout_seconds=1.0)
    next(replies)
    replies.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def test_how_many_train_at_one_time() -> None:
    calm = tiny.adapted()
    assert workers_for(calm, 8, side_by_side=2) == 2
    assert workers_for(calm, 1, side_by_side=2) == 1
    assert workers_for(calm, 8, side_by_side=1, asked=5) == 5
    assert workers_for(tiny.adapted(dropout=0.1), 8, side_by_side=2, asked=5) == 1
    elsewhere = replace(calm, base=replace(calm.base, device=torch.device("meta")))
    assert workers_for(elsewhere, 8, side_by_side=2, asked=2) == 1
    noisy = tiny.adapted()
    noisy.base.model.config.attention_dropout = 0.1
    assert workers_for(noisy, 8, side_by_side=2) == 1


def test_workers_share_out_the_threads(model, start, monkeypatch) -> None:
    found: list[int] = []

    def counted(request: Request, site: Site) -> Reply:
        found.append(torch.get_num_threads())
        return Reply("train", 1, site.name, dict(request.tensors), {})

    monkeypatch.setattr(in_process, "client_round", counted)
    with operation_threads(5):
        ask(InProcess(many(model), workers=2), start)
        assert torch.get_num_threads() == 5
        ask(InProcess(many(model, 1), workers=2), start)
    assert found == [2] * 7 + [5]
