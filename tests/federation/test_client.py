from __future__ import annotations

import pytest

import tiny
from acting import ORDER, acting
from silotune.errors import MessageError
from silotune.federation.site.client import begin, client_round, release
from silotune.federation.site.local_round import one_by_one
from silotune.federation.site.state import Site
from silotune.record.cost import Account
from silotune.seeds import derive
from silotune.structs import Request
from silotune.training.local import RoundPlace, train_round

EXAMPLES = tiny.encoded(tiny.closed(6))


def site(model, training=None, *, name: str = "bank", **federation) -> Site:
    acts = acting(training or tiny.training(), labels=tiny.LABELS, **{"rounds": 4, **federation})
    return Site(name, EXAMPLES, model, settings=acts)


def test_train_is_a_local_round_with_the_client_s_own_seed(model, start) -> None:
    reply = client_round(Request("train", 2, "bank", start, ORDER), site(model))
    place = RoundPlace(derive(3, "train", round_number=2, client="bank"), 2, 4)
    expected = train_round(model, start, EXAMPLES, settings=tiny.training(), place=place)
    tiny.assert_same_bits(reply.tensors, expected.delta)
    assert (reply.kind, reply.round_number, reply.client) == ("train", 2, "bank")
    assert reply.body["num_examples"] == 6 and reply.body["loss"] == expected.loss and reply.body["steps"] == 2


def test_clients_and_rounds_draw_different_orders(model, start) -> None:
    single = tiny.training(batch_size=1, max_steps=4)
    replies = [
        client_round(Request("train", number, name, start, ORDER), site(model, single, name=name))
        for name in ("a", "b") for number in (1, 2)
    ]  # fmt: skip
    assert len({reply.body["tokens"] + reply.body["loss"] for reply in replies}) == 4


def test_fedprox_reaches_the_client(model, start) -> None:
    plain, pulled, none = (
        client_round(Request("train", 1, "bank", start, ORDER), site(model, **options)).tensors
        for options in (
            {},
            {"algorithm": {"type": "fedprox", "proximal_mu": 50.0}},
            {"algorithm": {"type": "fedprox", "proximal_mu": 0.0}},
        )
    )
    tiny.assert_same_bits(plain, none)
    assert any(not (plain[name] == pulled[name]).all() for name in plain)


def test_state_moves_on_with_the_site(model, start) -> None:
    bank = site(model, tiny.training(optimizer_state="keep"))
    for number, steps in ((1, 2.0), (2, 4.0)):
        client_round(Request("train", number, "bank", start, ORDER), bank)
        counted = {float(tensor) for key, tensor in bank.state.optimizer.items() if key.startswith("step/")}
        assert counted == {steps}


def test_evaluate_sends_figures_and_no_tensors(model, start) -> None:
    reply = client_round(Request("evaluate", 2, "bank", start, ORDER), site(model))
    assert reply.tensors == {}
    assert reply.body["num_examples"] == 6 and 0 <= reply.body["accuracy"] <= 1


def test_what_a_client_refuses(model, start) -> None:
    with pytest.raises(MessageError, match="unknown request 'tran': did you mean 'train'"):
        client_round(Request("tran", 1, "bank", start, ORDER), site(model))
    wrong = {"seed": -1, "setup": "x", "run": 1, "more": 1, "training": {"learning_rate": 1}, "privacy": {"dp": "none"}}
    for kind in ("train", "personalize", "evaluate"):
        with pytest.raises(MessageError, match=f"body of this {kind} request is not valid at 'seed'"):
            client_round(Request(kind, 1, "bank", start, {}), site(model))
        for name, value in wrong.items():
            with pytest.raises(MessageError, match=f"body of this {kind} request is not valid at '{name}'"):
                client_round(Request(kind, 1, "bank", start, {**ORDER, name: value}), site(model))


def test_an_engine_may_train_the_works_of_many_clients_at_once(model, start) -> None:
    """Begun one after the other, trained in one call, released in another order: each client's bits are its own."""
    requests = {name: Request("train", 1, name, start, ORDER) for name in "abc"}
    alone = {name: client_round(requests[name], site(model, name=name)) for name in requests}
    sites = {name: site(model, name=name) for name in requests}
    begun = {name: begin(requests[name], sites[name]) for name in requests}
    works = [work for one in begun.values() for work in one.works]
    results = dict(zip(begun, one_by_one(model, works), strict=True))
    for name in reversed(list(begun)):
        reply = release(begun[name], [results[name]], Account(), sites[name])
        tiny.assert_same_bits(reply.tensors, alone[name].tensors)
        assert reply.body["loss"] == alone[name].body["loss"] and reply.body["num_examples"] == len(EXAMPLES)
