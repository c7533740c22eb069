"""Rounds under every LoRA rule: what travels, what stays, ranks by client, own models, and exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from acting import ORDER, acting
from silotune import lora
from silotune import tensors as arithmetic
from silotune.errors import MessageError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site, completed
from silotune.federation.wire.messages import decode_reply, encode, layout_of
from silotune.federation.wire.orders import expected_reply
from silotune.methods.algorithms import method
from silotune.methods.schedule import outgoing
from silotune.models import adapters, lora_layers
from silotune.models.adapters import attach
from silotune.record.runs import RunFolder
from silotune.settings.adapters import Lora
from silotune.settings.lora_rules import LORA_RULES
from silotune.settings.objectives import Sgd
from silotune.settings.sections import FederationSection
from silotune.structs import Reply, Request, ServerState, SiteState, Tensors
from silotune.training.local import RoundPlace, train_round
from silotune.transports.in_process import InProcess

EXAMPLES = tiny.encoded(tiny.closed(8))
SETTINGS = tiny.training(learning_rate=0.01, max_steps=1)
RULES = tuple(LORA_RULES)


def made_model(rule: str) -> adapters.Adapted:
    section = Lora(rank=3, alpha=6)
    return attach(tiny.base(), section, seed=0, has_core=LORA_RULES[rule].has_core)


@pytest.fixture(scope="module")
def models() -> dict[bool, adapters.Adapted]:
    """One model a kind of adapter: with a trained core, and without."""
    return {core: made_model("sb" if core else "factors") for core in (False, True)}


class Federation:
    """Three clients on one model, under a rule."""

    def __init__(self, models, folder: Path, rule: str, *, workers: int = 1, training=SETTINGS, **federation) -> None:
        self.model = models[LORA_RULES[rule].has_core]
        section = FederationSection(**{"lora": rule, "rounds": 4, **federation})
        self.settings = acting(training, section=section)
        self.start = first(self.model)
        sites = {name: self.site(name, EXAMPLES[place:]) for place, name in enumerate("abc")}
        self.transport = InProcess(sites, workers=workers, links=section)
        self.method, self.ranks, self.run = method(section), section.ranks, RunFolder(folder)
        self.download = section.download

    def site(self, name: str, examples, **more) -> Site:
        return Site(name, examples, self.model, **{"initial": self.start, "settings": self.settings, **more})

    def rounds(self, count: int, state: ServerState | None = None) -> ServerState:
        links = {"ranks": self.ranks, "download": self.download}
        plan = Plan(rounds=count, method=self.method, body=ORDER, seed=3, settings=self.settings, **links)
        return run_rounds(plan, self.transport, state or ServerState(0, self.start), self.run)


_FIRST: dict[int, Tensors] = {}


def first(model: adapters.Adapted) -> Tensors:
    """The adapter as drawn; tests share the model, and move it."""
    return _FIRST.setdefault(id(model), adapters.read(model))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns_and_says_its_error(rule: str, models, tmp_path: Path) -> None:
    federation = Federation(models, tmp_path, rule)
    state = federation.rounds(2)
    assert arithmetic.digest(state.weights) != arithmetic.digest(federation.start)
    errors = [row["aggregation_error"] for row in federation.run.read_rows("metrics")]
    if rule in ("share-a", "sb"):
        assert errors == [None, None]
    elif rule in ("factors", "svd"):
        assert all(error > 1e-5 for error in errors[1:])
    else:
        assert all(error < 1e-5 for error in errors)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_cut_in_two_ends_with_the_bits_of_one_that_was_not(rule: str, models, tmp_path: Path) -> None:
    own = {"personalization": "ditto"} if rule in ("factors", "freeze-a", "alternate", "sb") else {}
    whole = Federation(models, tmp_path / "whole", rule, **own).rounds(3)
    cut = Federation(models, tmp_path / "cut", rule, **own)
    cut.rounds(2)
    resumed = Federation(models, tmp_path / "cut", rule, **own)
    state, sites = resumed.run.load_checkpoint()
    resumed.transport.restore(sites)
    assert bool(sites) == (rule == "share-a" or bool(own))
    tiny.assert_same_bits(resumed.rounds(3, state).weights, whole.weights)


@pytest.mark.parametrize("rule", ["stack", "share-a", "sb", "alternate"])
def test_side_by_side_gives_the_bits_of_one_after_another(rule: str, models, tmp_path: Path) -> None:
    ends = []
    for workers in (1, 2):
        federation = Federation(models, tmp_path / str(workers), rule, workers=workers)
        ends.append((federation.rounds(2).weights, federation.transport.states()))
    tiny.assert_same_bits(ends[0][0], ends[1][0])
    for name, state in ends[0][1].items():
        for group, tensors in state.groups().items():
            tiny.assert_same_bits(tensors, ends[1][1][name].groups()[group])


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("freeze-a", {"algorithm": "fedadam"}),
        ("alternate", {"algorithm": "fedavgm", "aggregation": "median"}),
        ("share-a", {"algorithm": "fednova", "weighting": "uniform"}),
        ("stack", {"algorithm": "fedprox", "weighting": "uniform"}),
        ("sb", {"algorithm": "feddyn"}),
        ("factors", {"algorithm": "scaffold", "ranks": {"a": 1}}),
    ],
)
def test_rules_go_with_algorithms(rule: str, more: dict, models, tmp_path: Path) -> None:
    training = tiny.training(learning_rate=0.01, max_steps=1, optimizer="sgd")
    federation = Federation(models, tmp_path, rule, training=training, **more)
    state = federation.rounds(2)
    assert arithmetic.all_finite(state.weights)
    parts = federation.method.schedule(2)
    rests = [name for name in federation.start if not parts.rises(name)]
    before = Federation(models, tmp_path / "again", rule, training=training, **more).rounds(1)
    for name in rests:  # no momentum moves what was not sent
        assert torch.equal(state.weights[name], before.weights[name])
    error = federation.run.read_rows("metrics")[-1]["aggregation_error"]
    assert error is None if rule in ("share-a", "sb") else error < 1e-5 if rule != "factors" else error > 0


@pytest.mark.parametrize("rule", RULES)
def test_compressed_links_carry_every_rule(rule: str, models, tmp_path: Path) -> None:
    plain = Federation(models, tmp_path / "plain", rule).rounds(2)
    links = {"upload": {"values": "int8"}}
    if not LORA_RULES[rule].grows:
        links["download"] = {"delta": True, "values": "int8"}
    if LORA_RULES[rule].goes_with_noise:
        links["personalization"] = "ditto"
    small = Federation(models, tmp_path / "small", rule, **links)
    made = small.rounds(2)
    assert all(row["failures"] == [] for row in small.run.read_rows("metrics"))
    assert made.bytes_up < 0.8 * plain.bytes_up  # of so small a model, the header is most
    assert made.weights.keys() == plain.weights.keys()
    names = [name for name in made.weights if rule != "stack" or lora.is_residual(name)]
    assert any(not torch.equal(made.weights[name], plain.weights[name]) for name in names)
    if not LORA_RULES[rule].grows:
        gap = arithmetic.norm(arithmetic.subtract(made.weights, plain.weights))
        assert gap < 0.1 * arithmetic.norm(plain.weights)


@pytest.mark.parametrize("rule", ["freeze-a", "share-a", "sb", "exact-residual"])
def test_what_a_rule_sends_can_be_sent_later(rule: str, models, tmp_path: Path) -> None:
    upload = {"keep": "top-k", "share": 0.2, "values": "sign"}
    federation = Federation(models, tmp_path, rule, upload=upload)
    federation.rounds(2)
    assert all(row["failures"] == [] for row in federation.run.read_rows("metrics"))
    for state in federation.transport.states().values():
        left = state.residual
        assert left.keys() == {name for name in federation.start if federation.method.schedule(2).rises(name)}


def bytes_up(models, folder: Path, rule: str, **federation) -> int:
    return Federation(models, folder, rule, **federation).rounds(1).bytes_up


def test_bytes(models, tmp_path: Path) -> None:
    start = first(models[False])
    b = sum(value.numel() for name, value in start.items() if lora.is_b(name)) * 4
    whole = arithmetic.num_bytes(start)
    plain = bytes_up(models, tmp_path / "1", "factors")
    assert plain - bytes_up(models, tmp_path / "2", "freeze-a") >= 3 * (whole - b)  # three clients; and shorter headers
    assert plain - bytes_up(models, tmp_path / "3", "share-a") >= 3 * b
    assert bytes_up(models, tmp_path / "4", "sb") < plain
    small = bytes_up(models, tmp_path / "5", "factors", ranks={"a": 1, "b": 1, "c": 1})
    assert plain - small == pytest.approx(3 * whole * 2 / 3, abs=200)
    down = Federation(models, tmp_path / "6", "freeze-a").rounds(1)
    assert down.bytes_down < Federation(models, tmp_path / "7", "factors").rounds(1).bytes_down - 3 * (whole - b) + 200


def train_request(federation: Federation, weights: Tensors, client: str = "a", number: int = 1) -> Request:
    parts = federation.method.schedule(number)
    sent = outgoing(weights, parts, federation.ranks.get(client))
    return Request("train", number, client, sent, ORDER)


@pytest.mark.parametrize("rule", RULES)
def test_the_reply_has_the_layout_that_its_decoder_expects_and_no_other(rule: str, models, tmp_path: Path) -> None:
    ranks = {} if rule == "sb" else {"a": 2}
    federation = Federation(models, tmp_path, rule, ranks=ranks)
    request = train_request(federation, federation.start)
    reply = client_round(request, federation.site("a", EXAMPLES[:3]))
    expected = expected_reply(request, federation.settings.federation)
    assert layout_of(reply.tensors) == expected
    assert lora.rank_of(reply.tensors) in (2, None)
    more = {**reply.tensors, "base_model.extra": torch.ones(1)}
    with pytest.raises(MessageError, match="unexpected"):
        decode_reply(encode(Reply("train", 1, "a", more, reply.body)), expected)
    assert expected_reply(Request("evaluate", 1, "a", request.tensors), federation.settings.federation) == {}


def test_a_client_of_low_rank_trains_as_on_an_adapter_of_its_own_rank(models, tmp_path: Path) -> None:
    """Filled up with zeros, the rows it lacks never move: its delta is that of a model with a smaller adapter."""
    training = tiny.training(learning_rate=0.01, max_steps=3, weight_decay=0.1)
    federation = Federation(models, tmp_path, "factors", ranks={"a": 1}, training=training)
    weights = tiny.stir(federation.start)
    reply = client_round(train_request(federation, weights), federation.site("a", EXAMPLES))
    small = attach(tiny.base(), Lora(rank=1, alpha=2), seed=0)  # of the same scale
    from silotune.seeds import derive

    place = RoundPlace(derive(3, "train", round_number=1, client="a"), 1, 4)
    alone = train_round(small, lora.cut(weights, 1), EXAMPLES, settings=training, place=place)
    tiny.assert_close(reply.tensors, alone.delta, 1e-5)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sb"])
def test_mixed_ranks_go_with_the_rules(rule: str, models, tmp_path: Path) -> None:
    federation = Federation(models, tmp_path, rule, ranks={"a": 1, "b": 2})
    state = federation.rounds(2)
    assert lora.rank_of(state.weights) == 3
    error = federation.run.read_rows("metrics")[-1]["aggregation_error"]
    if rule in ("exact-residual", "stack"):
        assert error < 1e-5


def test_b_stays_with_its_client_and_is_there_again(models, tmp_path: Path) -> None:
    federation = Federation(models, tmp_path, "share-a")
    state = federation.rounds(1)
    own = {name: kept.own for name, kept in federation.transport.states().items()}
    names = {name for name in federation.start if lora.is_b(name)}
    assert all(set(tensors) == names for tensors in own.values())
    for name in names:
        assert torch.equal(state.weights[name], federation.start[name])
        assert not torch.equal(own["a"][name], own["b"][name])
    request = train_request(federation, state.weights, number=2)
    held = completed(request.tensors, federation.start, initial=federation.start, own=own["a"])
    tiny.assert_same_bits(
        {name: held[name] for name in sorted(names)}, {name: own["a"][name] for name in sorted(names)}
    )


def test_ditto_of_no_pull_is_training_alone_and_leaves_the_global_model_as_it_was(models, tmp_path: Path) -> None:
    plain = Federation(models, tmp_path / "plain", "factors").rounds(2)
    ditto = Federation(models, tmp_path / "ditto", "factors", personalization={"type": "ditto", "pull": 0.0})
    tiny.assert_same_bits(ditto.rounds(2).weights, plain.weights)
    own = ditto.transport.states()["a"].own
    from silotune.seeds import derive

    weights = ditto.start
    for number in (1, 2):
        place = RoundPlace(derive(3, "own", round_number=number, client="a"), number, 4)
        delta = train_round(ditto.model, weights, EXAMPLES, settings=SETTINGS, place=place).delta
        weights = arithmetic.add(weights, delta)
    tiny.assert_same_bits(own, weights)


def test_ditto_pulls_to_the_global_model(models, tmp_path: Path) -> None:
    apart = []
    training = tiny.training(learning_rate=0.05, max_steps=1, optimizer="sgd")
    for pull in (0.0, 10.0):
        options = {"personalization": {"type": "ditto", "pull": pull}, "training": training}
        federation = Federation(models, tmp_path / str(pull), "factors", **options)
        before = federation.rounds(2)
        final = federation.rounds(3, before)
        own = federation.transport.states()["a"].own
        apart.append(arithmetic.norm(arithmetic.subtract(own, final.weights)))
    assert apart[1] < apart[0]


def test_fine_tuning_keeps_a_model_and_sends_none(models, tmp_path: Path) -> None:
    federation = Federation(models, tmp_path, "stack", personalization="fine-tune")
    state = federation.rounds(1)
    assert lora.residuals(state.weights)
    request = Request("personalize", 5, "a", state.weights, ORDER)
    site = federation.site("a", EXAMPLES, state=SiteState({"exp_avg/x": torch.ones(1)}))
    reply = client_round(request, site)
    assert reply.tensors == {} and reply.body["num_examples"] == 8
    assert set(site.state.own) == set(federation.start) and "exp_avg/x" in site.state.optimizer


def test_fine_tuning_goes_at_the_full_rate_and_takes_the_link_s_tensors_for_no_moments(models, tmp_path: Path) -> None:
    changes = {"schedule": "cosine", "optimizer": Sgd(), "optimizer_state": "keep"}
    options = {"personalization": "fine-tune", "training": SETTINGS.model_copy(update=changes)}
    federation = Federation(models, tmp_path, "factors", **options)
    state = federation.rounds(1)
    request = Request("personalize", 5, "a", state.weights, ORDER)
    link = SiteState(received={"control/w": torch.ones(1)})
    site = federation.site("a", EXAMPLES, state=link)
    client_round(request, site)
    assert any(not torch.equal(own, state.weights[name]) for name, own in site.state.own.items())
    assert "control/w" in site.state.received


def test_what_was_neither_sent_nor_drawn_is_missed(models, tmp_path: Path) -> None:
    federation = Federation(models, tmp_path, "freeze-a")
    with pytest.raises(MessageError, match="neither sent nor"):
        client_round(train_request(federation, federation.start), federation.site("a", EXAMPLES, initial={}))


def test_the_reference_of_preference_has_no_residual_and_leaves_it_in_place(models, tmp_path: Path) -> None:
    federation = Federation(models, tmp_path, "stack")
    weights = federation.rounds(1).weights
    adapters.write(federation.model, weights)
    with adapters.at_start(federation.model):
        assert not lora_layers.residuals_of(federation.model.model)
    found = lora_layers.residuals_of(federation.model.model)
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name])
    assert found
