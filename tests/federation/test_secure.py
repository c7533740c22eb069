"""Protected rounds over real clients and messages: the same model as in the clear, and nothing of a single client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from acting import ORDER, acting
from protected import EXAMPLES, NAMES, PHASES, TRAINING, Net, asked, privacy, run
from silotune.errors import ProtectionError, RunFolderError
from silotune.federation.coordinator.exchange import Asking
from silotune.federation.coordinator.protection import PROTECTIONS
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.coordinator.secure_sum import terms_of
from silotune.federation.site.client import client_round
from silotune.federation.site.secure_sum import check_terms
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import encode
from silotune.methods.algorithms import method
from silotune.privacy.ring import Scale, levels
from silotune.record.runs import RunFolder
from silotune.settings.algorithms import ALGORITHMS
from silotune.settings.privacy import SecureSum
from silotune.settings.sections import FederationSection
from silotune.structs import Request, ServerState, SiteState
from silotune.tensors import flatten


@pytest.fixture(scope="module")
def clear(tmp_path_factory) -> Path:
    """Folder of the run without protection."""
    return tmp_path_factory.mktemp("clear")


@pytest.fixture(scope="module")
def plain(model, start, clear: Path) -> ServerState:
    settings = privacy("none")
    return run(clear, Net(model, settings), start, settings)


def test_the_same_model_as_in_the_clear(model, start, plain, clear: Path, tmp_path: Path) -> None:
    settings = privacy()
    net = Net(model, settings)
    state = run(tmp_path, net, start, settings)
    bound = Scale(levels(32, 5), 1.0, 64).error_bound(5, 25)
    difference = (flatten(state.weights) - flatten(plain.weights)).abs().max()
    assert 0 < difference <= bound + 1e-6
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert (row["client"], row["num_examples"], row["clients_in_sum"], row["steps"]) == ("(sum)", 25, 5, 5)
    (metrics,) = RunFolder(tmp_path).read_rows("metrics")
    (in_clear,) = RunFolder(clear).read_rows("metrics")
    assert metrics["train_loss"] == pytest.approx(in_clear["train_loss"], abs=1e-5)
    assert metrics["bytes_up"] == state.bytes_up == row["bytes_up"] == sum(reply.bytes_up for reply in net.seen)


def test_nothing_of_a_single_client_is_seen(model, start, tmp_path: Path) -> None:
    """Neither update, weight nor figures; not the same bytes twice."""
    settings = privacy()
    net = Net(model, settings)
    run(tmp_path, net, start, settings, rounds=2)
    assert {reply.kind for reply in net.seen} == {f"secure_sum.{phase}" for phase in PHASES}
    inputs = [reply for reply in net.seen if reply.kind == "secure_sum.input"]
    assert all(reply.body == {} and set(reply.tensors) == {"values", "figures"} for reply in inputs)
    alone = Site("a", EXAMPLES["a"], model, settings=acting(TRAINING, rounds=2))
    update = client_round(Request("train", 1, "a", start, ORDER), alone)
    terms_scale = Scale(levels(32, 5), 1.0, 64)
    quantised = np.rint(flatten(update.tensors).numpy() * terms_scale.factor(3)).astype(np.int64)
    for reply in inputs:
        masked = reply.tensors["values"].numpy().astype(np.int64)
        assert np.mean(np.abs(masked - quantised) < 2**20) < 0.01
        assert reply.tensors["figures"].tolist()[0] not in range(100)
    first, second = (reply.tensors["values"] for reply in inputs if reply.client == "a")
    assert (first == second).float().mean() < 0.01


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_may_drop_out_of_any_exchange(model, start, tmp_path: Path, phase: str) -> None:
    settings = privacy()
    state = run(
        tmp_path, Net(model, settings, lambda kind, name: kind.endswith(phase) and name == "c"), start, settings
    )
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert row["clients_in_sum"] == (4 if phase in PHASES[:4] else 5)
    (metrics,) = RunFolder(tmp_path).read_rows("metrics")
    assert [(failure["client"], failure["stage"]) for failure in metrics["failures"]] == [("c", f"secure_sum.{phase}")]
    assert (flatten(state.weights) - flatten(start)).abs().max() > 0


def test_too_few_end_the_run_with_nothing_opened(model, start, tmp_path: Path) -> None:
    settings = privacy()
    net = Net(model, settings, lambda kind, name: kind.endswith("input") and name in "ab")
    with pytest.raises(ProtectionError, match="3 of 5 clients sent their input, 4 are needed: the sum stays closed"):
        run(tmp_path, net, start, settings)
    assert not [reply for reply in net.seen if reply.kind in ("secure_sum.check", "secure_sum.unmask")]


def test_a_run_killed_and_resumed_has_the_same_bits(model, start, tmp_path: Path) -> None:
    settings = privacy()
    whole = run(tmp_path / "whole", Net(model, settings), start, settings, rounds=2)
    first = Net(model, settings, memory=tmp_path / "memory")
    run(tmp_path / "parts", first, start, settings, rounds=1)
    state, sites = RunFolder(tmp_path / "parts").load_checkpoint()
    assert first.sites["a"].served.opened("secure_sum:1") is not None
    net = Net(model, settings, memory=tmp_path / "memory")
    net.restore(sites)
    resumed = run(tmp_path / "parts", net, start, settings, rounds=2, state=state)
    tiny.assert_same_bits(resumed.weights, whole.weights)


def test_a_round_that_stayed_closed_is_done_again_where_the_run_waits(model, start, plain, tmp_path: Path) -> None:
    begun: list[str] = []

    def lost(kind: str, client: str) -> bool:
        begun.extend([client] if kind == "secure_sum.keys" else [])
        return kind == "secure_sum.input" and client in "abc" and len(begun) <= len(NAMES)

    settings = privacy()
    state = run(tmp_path, Net(model, settings, lost), start, settings, below_minimum="wait")
    assert len(begun) == 2 * len(NAMES) and state.round_number == 1
    assert (flatten(state.weights) - flatten(plain.weights)).abs().max() <= 1e-5


def test_a_round_is_never_opened_over_two_sets_of_clients(model, start, tmp_path: Path) -> None:
    settings = privacy()
    run(tmp_path / "1", Net(model, settings, memory=tmp_path / "memory"), start, settings)
    again = Net(model, settings, memory=tmp_path / "memory")
    run(tmp_path / "2", again, start, settings)  # the same clients: the same sum, nothing new
    again.lost = lambda kind, name: kind.endswith("input") and name == "e"
    with pytest.raises(ProtectionError, match="0 of 5 clients signed the list of inputs"):
        run(tmp_path / "3", again, start, settings)
    refused = {failure.client for failure in again.failures if "opened before, over other clients" in failure.reason}
    assert refused == set("abcd")


def test_an_encrypted_run_killed_and_resumed_has_the_same_bits_and_memory(model, start, tmp_path: Path) -> None:
    settings = privacy("he")
    whole = run(tmp_path / "whole", Net(model, settings), start, settings, rounds=2)
    run(tmp_path / "parts", Net(model, settings, memory=tmp_path / "memory"), start, settings, rounds=1)
    state, sites = RunFolder(tmp_path / "parts").load_checkpoint()
    net = Net(model, settings, memory=tmp_path / "memory")
    net.restore(sites)
    for name, known in (("a", "opened"), ("b", "sent")):
        assert [net.sites[name].served.opened(f"he.{kind}:1") for kind in ("weight", "update")] == [known, known]
    weight = asked(net, "b", "he.weight", {}).tensors["figures"]
    order = {"packing": 3, "size": 0, "num_figures": 2}
    with pytest.raises(ProtectionError, match="has opened a sum of round 1 before"):
        asked(net, "a", "he.open", order, {"figures": weight})
    resumed = run(tmp_path / "parts", net, start, settings, rounds=2, state=state)
    tiny.assert_same_bits(resumed.weights, whole.weights)


def test_a_sum_that_cannot_be_remembered_is_not_opened(model, start, tmp_path: Path, monkeypatch) -> None:
    """A full disk, or a kill, before the memory is on the disk: no share has left the site, and the next try opens."""
    settings, memory = privacy(), tmp_path / "memory"
    net = Net(model, settings, memory=memory)

    def full(path: Path, line: bytes) -> None:
        raise RunFolderError("no space left")

    with monkeypatch.context() as patch, pytest.raises(ProtectionError):
        patch.setattr("silotune.federation.site.served.append_line", full)
        run(tmp_path / "1", net, start, settings)
    assert not [reply for reply in net.seen if reply.kind == "secure_sum.unmask"]
    restarted = Net(model, settings, lambda kind, name: kind.endswith("input") and name == "e", memory=memory)
    run(tmp_path / "2", restarted, start, settings)
    whole = Net(model, settings, memory=memory)
    with pytest.raises(ProtectionError):  # now it was opened over four, and never over five
        run(tmp_path / "3", whole, start, settings)
    assert sum("opened before, over other clients" in failure.reason for failure in whole.failures) == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS.those("summable"))
def test_algorithms_that_work_on_the_sum(model, start, tmp_path: Path, algorithm: str) -> None:
    states = []
    for name in ("none", "secure_sum"):
        settings = privacy(name)
        states.append(run(tmp_path / name, Net(model, settings), start, settings, algorithm=algorithm))
    tiny.assert_close(states[0].weights, states[1].weights, 1e-5)


def told_in(folder: Path, model, start, settings) -> tuple[ServerState, list[str]]:
    """A round's state and its notes."""
    told = list[str]()
    notify = lambda event, fields: told.append(fields["text"]) if event == "note" else None  # noqa: E731
    return run(folder, Net(model, settings), start, settings, notify=notify), told


def test_values_beyond_the_bound_raise_an_alarm(model, start, tmp_path: Path) -> None:
    state, told = told_in(tmp_path, model, start, privacy(bound=1e-5))
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert (
        row["clipped"] > 0 and f"round 1: {row['clipped']} values" in told[0] and "privacy.protection.bound" in told[0]
    )
    assert (flatten(state.weights) - flatten(start)).abs().max() <= 1.1e-5


def test_a_ring_that_is_too_coarse_for_its_settings_raises_an_alarm(model, start, plain, tmp_path: Path) -> None:
    """16 bits carry more than an int8 would where bound and largest weight fit, at half the bytes of 32."""
    coarse, told = told_in(tmp_path / "coarse", model, start, privacy(ring_bits=16, max_examples=65536))
    assert len(told) == 1 and "round 1: rounding in the ring" in told[0] and "lower max_examples" in told[0]
    delta = flatten(plain.weights) - flatten(start)
    bound = 1.5 * float(delta.abs().max())
    fitting = privacy(ring_bits=16, max_examples=8, bound=bound)
    state, told = told_in(tmp_path / "fitting", model, start, fitting)
    assert not [text for text in told if "rounding" in text]
    error = flatten(state.weights) - flatten(plain.weights)
    assert (
        float(error.abs().max()) < bound / 127 < float((flatten(coarse.weights) - flatten(plain.weights)).abs().max())
    )
    wide, _ = told_in(tmp_path / "wide", model, start, privacy(max_examples=8, bound=bound))
    assert wide.bytes_up - state.bytes_up == pytest.approx(len(NAMES) * 2 * len(delta), abs=50)


# --- requests that a site refuses -------------------------------------------------------------------------------------


def test_nothing_is_answered_twice_or_out_of_turn(model, start, tmp_path: Path) -> None:
    settings = privacy()
    sent: list[Request] = []
    net = Net(model, settings)
    original = net.exchange

    def exchange(requests, *, timeout_seconds):
        sent.extend(requests.values())
        return original(requests, timeout_seconds=timeout_seconds)

    net.exchange = exchange
    run(tmp_path, net, start, settings)
    to_a = {request.kind: request for request in sent if request.client == "a"}
    for kind in ("shares", "input", "check", "unmask"):
        with pytest.raises(ProtectionError, match="out of turn, or twice"):
            client_round(to_a[f"secure_sum.{kind}"], net.sites["a"])
    client_round(to_a["secure_sum.keys"], net.sites["a"])  # the same terms again: fresh keys, so old messages are void
    with pytest.raises(ProtectionError, match="the coordinator changed it"):
        client_round(to_a["secure_sum.shares"], net.sites["a"])
    with pytest.raises(ProtectionError, match="out of turn, or twice"):  # and a refusal closes the sum
        client_round(to_a["secure_sum.shares"], net.sites["a"])


def test_orders_that_do_not_fit_are_refused(model, start) -> None:
    settings = privacy()
    net = Net(model, settings)
    nothing = Asking(2, NAMES, start, start, ORDER, lambda requests: iter(()), None, lambda event, fields: None)
    terms = terms_of(settings, nothing)
    with pytest.raises(ProtectionError, match="round 2 has 1 clients, least_clients = 3"):
        terms_of(settings, replace(nothing, clients=("a",)))
    with pytest.raises(ProtectionError, match="for another round"):
        asked(net, "a", "secure_sum.keys", {"terms": terms.model_dump(mode="json")}, number=1)
    net.sites["a"] = replace(net.sites["a"], protection=None)
    with pytest.raises(ProtectionError, match="'a' has no keys for protected sums"):
        asked(net, "a", "secure_sum.keys", {"terms": terms.model_dump(mode="json")}, number=2)


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"ring_bits": 64}, "bits = 64"),
        ({"bound": 1e6}, "bound = 1000000.0"),
        ({"max_examples": 7}, "max_examples = 7"),
        ({"threshold": 0.7}, "threshold = 0.7"),
    ],
)
def test_a_coordinator_cannot_choose_terms_that_the_settings_do_not_say(
    model, start, tmp_path: Path, chosen, name: str
) -> None:
    """The settings stand in the signed setup; nothing is trained under other terms, and no budget is spent."""
    net = Net(model, privacy())
    chosen = PROTECTIONS[SecureSum](privacy(**chosen), net.keys)
    plan = Plan(rounds=1, method=method(FederationSection()), body=ORDER, seed=3, protected=chosen)
    with pytest.raises(ProtectionError, match="0 of 5 clients sent their input"):
        run_rounds(plan, net, ServerState(0, start), RunFolder(tmp_path))
    reasons = {failure.reason for failure in net.failures}
    assert len(reasons) == 1 and f"the terms of the sum say {name}, the settings of the order to train say" in str(
        reasons
    )


def test_threshold_and_weights_follow_from_the_settings(model, start) -> None:
    settings = privacy()
    asking = Asking(1, NAMES, start, start, ORDER, lambda requests: iter(()), None, lambda event, fields: None)
    terms = terms_of(settings, asking)
    check_terms(terms, acting(TRAINING, privacy=settings))
    with pytest.raises(ProtectionError, match="terms of the sum say threshold = 0.9, .* say 0.6"):
        check_terms(terms.model_copy(update={"threshold": 0.9}), acting(TRAINING, privacy=settings))
    capped = FederationSection(weighting={"type": "capped", "cap": 9})
    noise = {"noise_multiplier": 0.5, "clip_norm": 0.05}
    noised = privacy(dp="distributed", **noise)
    for federation, weight in ((FederationSection(weighting="uniform"), 1), (capped, 9)):
        acts = acting(TRAINING, privacy=noised, section=federation)
        made = terms_of(privacy(dp="distributed", **noise, max_examples=weight), asking)
        check_terms(made, acts)
        with pytest.raises(ProtectionError, match=f"say max_examples = 10, .* say {weight}"):
            check_terms(made.model_copy(update={"max_examples": 10}), acts)


@pytest.mark.parametrize("section", ["privacy", "federation", "training"])
@pytest.mark.parametrize("protection", ["secure_sum", "he"])
def test_the_order_in_a_sum_holds_no_settings(model, start, tmp_path: Path, section: str, protection: str) -> None:
    """A coordinator that puts some into the order of a sum gets no update of any site."""
    net = Net(model, privacy(protection))
    honest = net.exchange

    def exchange(requests, *, timeout_seconds):
        for name, request in requests.items():
            if "train" in request.body:
                order = {**request.body["train"], section: {}}
                requests[name] = replace(request, body={**request.body, "train": order})
        return honest(requests, timeout_seconds=timeout_seconds)

    net.exchange = exchange
    with pytest.raises(ProtectionError):
        run(tmp_path, net, start, privacy(protection))
    assert len(net.failures) == len(NAMES) and not [reply for reply in net.seen if reply.kind.endswith("input")]
    assert all(f"request is not valid at 'train.{section}'" in failure.reason for failure in net.failures)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_protected_site_is_never_seen_alone(model, start, kind: str) -> None:
    net = Net(model, privacy())
    with pytest.raises(ProtectionError, match=f"protected sums only: {kind!r} is refused"):
        asked(net, "a", kind, {}, start)


# --- homomorphic encryption -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"packing": 2}, 1e-6), ({}, 2e-5)],
)
def test_encrypted_rounds_give_the_same_model(model, start, plain, tmp_path: Path, changes, tolerance) -> None:
    settings = privacy("he", **changes)
    net = Net(model, settings)
    state = run(tmp_path, net, start, settings)
    assert (flatten(state.weights) - flatten(plain.weights)).abs().max() <= tolerance
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert (row["client"], row["num_examples"], row["clients_in_sum"], row["clipped"]) == ("(sum)", 25, 5, 0)
    inputs = [reply for reply in net.seen if reply.kind == "he.input"]
    assert all(reply.body == {} for reply in inputs) and len(inputs) == 5
    assert [reply.client for reply in net.seen if reply.kind == "he.open"] == ["a", "a"]


def test_encrypted_rounds_survive_lost_clients_and_openers(model, start, tmp_path: Path) -> None:
    settings = privacy("he")

    def lost(kind: str, name: str) -> bool:
        return (kind, name) in (("he.weight", "a"), ("he.input", "b"), ("he.open", "c"))

    run(tmp_path, Net(model, settings, lost), start, settings)
    (row,) = RunFolder(tmp_path).read_rows("clients")
    assert (row["clients_in_sum"], row["num_examples"]) == (3, 5 + 6 + 7)
    few = Net(model, settings, lambda kind, name: kind == "he.input" and name in "abc")
    with pytest.raises(ProtectionError, match="2 clients are left for this sum, 3 are needed"):
        run(tmp_path / "few", few, start, settings)


def test_a_site_opens_no_sum_of_few_and_none_twice(model, start, tmp_path: Path) -> None:
    settings = privacy("he")
    net = Net(model, settings)
    weight = asked(net, "a", "he.weight", {})
    order = {"packing": 3, "size": 0, "num_figures": 2}
    with pytest.raises(ProtectionError, match="has sent nothing in round 1"):
        asked(net, "b", "he.open", order, {"figures": weight.tensors["figures"]})
    for name in "bc":
        asked(net, name, "he.weight", {})
    with pytest.raises(ProtectionError, match="1 clients are in the sum, 3 are needed"):
        asked(net, "b", "he.open", order, {"figures": weight.tensors["figures"]})
    with pytest.raises(ProtectionError, match="has opened a sum of round 1 before"):
        asked(net, "b", "he.open", order, {"figures": weight.tensors["figures"]})
    with pytest.raises(ProtectionError, match="no ciphertexts named 'figures'"):
        asked(net, "c", "he.open", order)
    assert len(encode(weight)) > 90_000


def test_site_state_is_kept_through_training(model, start) -> None:
    kept = SiteState(data={"kept": {"by a test": "x"}})
    site = Site("a", EXAMPLES["a"], model, state=kept, settings=acting(TRAINING, rounds=1))
    client_round(Request("train", 1, "a", start, ORDER), site)
    assert site.state.data == {"kept": {"by a test": "x"}}
    assert isinstance(start, dict) and all(isinstance(tensor, torch.Tensor) for tensor in start.values())
