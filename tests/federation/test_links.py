"""Compressed links: what a client makes of a request, what it keeps, and that a resumed run ends with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from acting import ORDER, acting
from silotune import tensors as arithmetic
from silotune.errors import MessageError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire.links import CHANGE, address, open_reply, open_request
from silotune.federation.wire.messages import layout_of
from silotune.lora import cut, padded, rank_of
from silotune.methods.algorithms import method
from silotune.methods.compress.pack import PACKED, packed_layout
from silotune.record.runs import RunFolder
from silotune.settings.links import CompressionSection, DownloadSection
from silotune.settings.objectives import Sgd
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import Failure, Reply, Request, ServerState
from silotune.tensors import put_under
from silotune.transports.in_process import InProcess

EXAMPLES = tiny.encoded(tiny.closed(8))
TRAINING = tiny.training(learning_rate=0.01, max_steps=1, optimizer_state="keep")
SMALL = {"upload": {"keep": "top-k", "share": 0.1, "values": "sign", "zstd": 1}}
BOTH = {**SMALL, "download": {"delta": True, "keep": "top-k", "share": 0.2, "values": "int8"}}


def transport(model, federation: FederationSection, *, training: TrainingSection = TRAINING, **more) -> InProcess:
    acts = acting(training, section=federation)
    sites = {name: Site(name, EXAMPLES[place::3], model, settings=acts) for place, name in enumerate("abc")}
    return InProcess(sites, links=federation, **more)


def plan(federation: FederationSection, *, training: TrainingSection = TRAINING, **changes) -> Plan:
    values = {"rounds": 4, "method": method(federation), "body": ORDER, "seed": 3}
    acts = acting(training, section=federation)
    return Plan(**{**values, "settings": acts, "download": federation.download, **changes})


def requests(tensors, *names: str) -> dict[str, Request]:
    return {name: Request("train", 2, name, tensors, {"x": 1}) for name in names}


def test_without_settings_nothing_changes(start) -> None:
    asked = requests(start, "a", "b")
    made, held = address(asked, DownloadSection(), held={}, holders=(), seed=1)
    assert made == asked and held == {}
    assert made["a"].as_sent() is made["a"]


def test_a_model_is_packed_once_and_opened_alike(model, start) -> None:
    settings = DownloadSection(values="int8")
    made, held = address(requests(start, "a", "b"), settings, held={}, holders=(), seed=1)
    assert held == {} and made["a"].wire is made["b"].wire
    assert layout_of(made["a"].as_sent().tensors) == packed_layout(layout_of(start), settings)
    opened = open_request(made["a"].as_sent().tensors, settings, layout_of(start), held={})
    tiny.assert_same_bits(opened, made["a"].tensors)
    assert any(not torch.equal(opened[name], start[name]) for name in start)


def test_holders_get_the_change_and_others_the_model(model, start) -> None:
    settings = DownloadSection(delta=True, values="int4")
    target = tiny.stir(start, seed=4)
    made, held = address(requests(target, "a", "b"), settings, held=start, holders=("b",), seed=1)
    assert made["a"].wire is held and made["b"].wire.keys() == {f"{CHANGE}/{PACKED}"}
    whole = open_request(made["a"].as_sent().tensors, settings, layout_of(start), held={})
    changed = open_request(made["b"].as_sent().tensors, settings, layout_of(start), held=start)
    for opened in (whole, changed):
        tiny.assert_same_bits(opened, held)
    gap, before = (arithmetic.norm(arithmetic.subtract(target, got)) for got in (held, start))
    assert gap < 0.2 * before


def test_the_error_of_a_change_is_sent_with_the_next(start) -> None:
    settings = DownloadSection(delta=True, keep="top-k", share=0.3)
    target, held = tiny.stir(start, seed=4), start
    for number in range(4):
        _, held = address(requests(target, "a"), settings, held=held, holders=("a",), seed=number)
    tiny.assert_close(held, target, 1e-6)


def test_who_holds_nothing_gets_the_exact_model(start) -> None:
    settings = DownloadSection(delta=True, values="sign")
    target = tiny.stir(start, seed=4)
    made, held = address(requests(target, "a"), settings, held=start, holders=("b",), seed=1)
    assert made["a"].wire is target and held is target


def test_what_a_client_refuses(model, start) -> None:
    with pytest.raises(MessageError, match=r"as federation.download packs them"):
        open_request(start, DownloadSection(values="int8"), layout_of(start), held={})
    packed = address(requests(start, "a"), DownloadSection(values="int8"), held={}, holders=(), seed=1)[0]["a"].wire
    with pytest.raises(MessageError, match="has received no model yet"):
        open_request(put_under(CHANGE, packed), DownloadSection(values="int8", delta=True), layout_of(start), held={})


def test_values_that_are_not_finite_are_found_after_opening() -> None:
    layout = {"w": ("F32", (4,))}
    infinite = torch.tensor([0x80, 0x7F, 1, 1, 1, 1], dtype=torch.uint8)  # the scale is infinite
    with pytest.raises(MessageError, match="'a'.*not finite"):
        open_reply(Reply("train", 1, "a", {PACKED: infinite}), CompressionSection(values="int8"), layout)


def test_a_client_keeps_what_it_left_out_beside_its_moments(model, start) -> None:
    federation = FederationSection(**SMALL)
    site = Site("bank", EXAMPLES, model, settings=acting(TRAINING, section=federation))
    bare = Site("bank", EXAMPLES, model, settings=acting(TRAINING))
    plain = client_round(Request("train", 1, "bank", start, ORDER), bare)
    reply = client_round(Request("train", 1, "bank", start, ORDER), site)
    arrived = open_reply(reply, federation.upload, layout_of(start)).tensors
    left = site.state.residual
    tiny.assert_same_bits(left, arithmetic.subtract(plain.tensors, arrived))
    assert {key.partition("/")[0] for key in site.state.optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    assert site.state.groups().keys() == {"optimizer", "residual"}
    again = client_round(Request("train", 2, "bank", start, ORDER), site)
    assert reply.tensors.keys() == again.tensors.keys() == {PACKED}


def test_a_federation_over_compressed_links(model, start, tmp_path: Path) -> None:
    made = {}
    for name, options in (("plain", {}), ("small", BOTH)):
        federation = FederationSection(**options)
        clients = transport(model, federation)
        made[name] = run_rounds(plan(federation, rounds=3), clients, ServerState(0, start), RunFolder(tmp_path / name))
        if options:
            for state in clients.states().values():
                tiny.assert_same_bits(state.received, made[name].held)
    small, plain = made["small"], made["plain"]
    assert RunFolder(tmp_path / "small").read_rows("metrics")[-1]["failures"] == []
    assert plain.bytes_up > 7 * small.bytes_up  # of so small a model, the header is most
    assert plain.bytes_down > 1.4 * small.bytes_down  # the first round sends the whole model
    assert small.holders == ("a", "b", "c") and plain.holders == () and plain.held == {}
    assert not torch.equal(arithmetic.flatten(small.weights), arithmetic.flatten(start))


def test_encoding_and_workers_change_no_bit(model, start, tmp_path: Path) -> None:
    federation = FederationSection(**BOTH)
    made = [
        run_rounds(plan(federation, rounds=2), transport(model, federation, **options), ServerState(0, start),
                   RunFolder(tmp_path / str(number))).weights
        for number, options in enumerate(({}, {"encode": False}, {"workers": 2}))
    ]  # fmt: skip
    for other in made[1:]:
        tiny.assert_same_bits(made[0], other)


def test_a_resumed_run_ends_with_the_same_bits(model, start, tmp_path: Path) -> None:
    federation = FederationSection(**BOTH, clients_per_round=2)
    sampled = {"clients_per_round": 2}
    whole_folder, cut_folder = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    whole = run_rounds(plan(federation, **sampled), transport(model, federation), ServerState(0, start), whole_folder)
    run_rounds(plan(federation, rounds=2, **sampled), transport(model, federation), ServerState(0, start), cut_folder)
    checkpoint = cut_folder.load_checkpoint()
    assert checkpoint is not None
    state, sites = checkpoint
    clients = transport(model, federation)
    clients.restore(sites)
    resumed = run_rounds(plan(federation, **sampled), clients, state, cut_folder)
    tiny.assert_same_bits(resumed.weights, whole.weights)
    tiny.assert_same_bits(resumed.held, whole.held)
    plain = {"weights": {}, "held": {}, "seconds": 0.0}
    assert replace(resumed, **plain) == replace(whole, **plain)
    assert cut_folder.read_rows("metrics")[-1]["bytes_up"] == whole_folder.read_rows("metrics")[-1]["bytes_up"]


@pytest.mark.parametrize("below_minimum", ["wait", "skip"])
def test_after_a_round_that_failed_the_model_goes_out_whole(
    model, start, tmp_path: Path, below_minimum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that answered a round that came to nothing hold its model, which the coordinator has not kept."""
    federation = FederationSection(download={"delta": True, "values": "int8"})
    clients = transport(model, federation)
    sent: list[tuple[int, bool]] = []
    carried = clients.exchange

    def exchange(asked, *, timeout_seconds: float):
        sent.append((asked["a"].round_number, any(name.startswith(CHANGE) for name in asked["a"].as_sent().tensors)))
        for reply in carried(asked, timeout_seconds=timeout_seconds):
            lost = len(sent) == 2 and reply.client == "c"
            yield Failure("c", reply.round_number, "network", "away") if lost else reply

    monkeypatch.setattr(clients, "exchange", exchange)
    asked = plan(federation, rounds=4, min_replies=3, below_minimum=below_minimum)
    state = run_rounds(asked, clients, ServerState(0, start), RunFolder(tmp_path))
    again = {"wait": [(2, False)], "skip": []}[below_minimum]
    assert sent == [(1, False), (2, True), *again, (3, below_minimum == "wait"), (4, True)]
    for site in clients.states().values():
        tiny.assert_same_bits(site.received, state.held)


def test_a_reply_of_another_length_is_a_failure(model, start, monkeypatch: pytest.MonkeyPatch) -> None:
    from silotune.transports import in_process

    def short(request: Request, site: Site) -> Reply:
        return Reply("train", 1, site.name, {PACKED: torch.zeros(5, dtype=torch.uint8)}, {})

    monkeypatch.setattr(in_process, "client_round", short)
    federation = FederationSection(**SMALL)
    asked = {"a": Request("train", 2, "a", start, ORDER)}
    replies = list(transport(model, federation).exchange(asked, timeout_seconds=1))
    assert "'packed' came as ('U8', (5,)), expected ('U8'" in replies[0].reason


def test_scaffold_s_controls_travel_packed_too(model, start, tmp_path: Path) -> None:
    federation = FederationSection(algorithm="scaffold", **{**BOTH, "upload": {"values": "int8"}})
    training = TRAINING.model_copy(update={"optimizer": Sgd(), "optimizer_state": "reset"})
    clients = transport(model, federation, training=training)
    state = run_rounds(
        plan(federation, rounds=2, training=training), clients, ServerState(0, start), RunFolder(tmp_path)
    )
    assert RunFolder(tmp_path).read_rows("metrics")[-1]["failures"] == []
    assert len(state.held) == 2 * len(start)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("algorithm", ["feddyn", "scaffold"])
def test_a_client_s_control_follows_what_arrives_of_a_rounded_update(model, start, algorithm: str, rank) -> None:
    federation = FederationSection(algorithm=algorithm, upload={"values": "int4"})
    training = TRAINING.model_copy(update={"optimizer": Sgd(), "optimizer_state": "reset"})
    site = Site("a", EXAMPLES, model, settings=acting(training, section=federation))
    site.initial = start
    down = cut(method(federation).sent(start, {}), rank)
    arrived = open_reply(
        client_round(Request("train", 1, "a", down, ORDER), site), federation.upload, layout_of(down)
    ).tensors
    scale = {name: -federation.algorithm.alpha * arrived[name] for name in arrived} if algorithm == "feddyn" else {}
    expected = padded(scale or arithmetic.taken_from("control", arrived), rank_of(start))
    for name, tensor in site.state.control.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
