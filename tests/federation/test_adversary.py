"""A coordinator that cheats in a secure sum: each attempt is refused by the site that it is made at."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protected import PHASES, Net, privacy, run
from silotune.errors import ProtectionError
from silotune.privacy.secure_sum import site as protocol
from silotune.privacy.secure_sum.terms import Terms
from silotune.record.runs import RunFolder
from silotune.structs import Failure, Reply, Request, Tensors

Cheat = Callable[["Cheating", Request], Request]


class Cheating(Net):
    """A wire that changes what the coordinator asks site 'a'."""

    def __init__(self, model, cheat: Cheat) -> None:
        super().__init__(model, privacy())
        self.cheat, self.before = cheat, {}
        self.keys = {}  # it has no reason to check what it changes itself

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        changed = {name: self.cheat(self, one) if name == "a" else one for name, one in requests.items()}
        yield from super().exchange(changed, timeout_seconds=timeout_seconds)
        self.before.update({one.kind: one for name, one in requests.items() if name == "a"})

    def again(self, kind: str) -> None:
        """Asks 'a' once more for what it was asked before."""
        list(super().exchange({"a": self.before[kind]}, timeout_seconds=1.0))

    def refusals(self) -> list[tuple[str, str]]:
        return [(failure.stage, failure.reason) for failure in self.failures if failure.client == "a"]


def within(request: Request, **changes) -> Request:
    return replace(request, body={**json.loads(json.dumps(request.body)), **changes})


def swaps_keys(net: Cheating, request: Request) -> Request:
    """Its own keys in the place of b's, signed with a key of its own."""
    if request.kind != "secure_sum.shares":
        return request
    terms = Terms.model_validate(net.before["secure_sum.keys"].body["terms"])
    member = replace(net.sites["b"].protection.member, sign=lambda content: bytes(64))
    _, forged = protocol.advertise(member, terms, os.urandom)
    return within(request, keys={**request.body["keys"], "b": forged.model_dump()})


def leaves_out_a_share(net: Cheating, request: Request) -> Request:
    if request.kind != "secure_sum.accept":
        return request
    return within(request, shares={name: one for name, one in request.body["shares"].items() if name != "b"})


def replays_a_share(net: Cheating, request: Request) -> Request:
    """b's share for another receiver in the place of the one for a."""
    if request.kind != "secure_sum.accept":
        return request
    shares = request.body["shares"]
    return within(request, shares={**shares, "b": shares["c"]})


def makes_up_a_complaint(net: Cheating, request: Request) -> Request:
    """'a' is to show the shares that it gave to 'b', which has not complained."""
    return within(request, complaints={"b": "0" * 128}) if request.kind == "secure_sum.input" else request


def leaves_out_honest_sites(net: Cheating, request: Request) -> Request:
    """Only 'b' is to share a mask with 'a': with a friend there, the input of 'a' would lie open."""
    return within(request, arrived=["a", "b"]) if request.kind == "secure_sum.input" else request


def brings_back_another(net: Cheating, request: Request) -> Request:
    if request.kind not in ("secure_sum.accept", "secure_sum.input"):
        return request
    shares = {name: one for name, one in request.body.get("shares", {}).items() if name != "e"}
    shorter = within(request, arrived=["a", "b", "c", "d"], **({"shares": shares} if shares else {}))
    return shorter if request.kind == "secure_sum.accept" else request


def another_list_of_masks(net: Cheating, request: Request) -> Request:
    """'a' shares no mask with 'e', the others do: what they sign tells."""
    return within(request, arrived=["a", "b", "c", "d"]) if request.kind == "secure_sum.input" else request


def shrinks_the_list(net: Cheating, request: Request) -> Request:
    return within(request, survivors=["a", "b"]) if request.kind == "secure_sum.check" else request


def shrinks_the_cohort(net: Cheating, request: Request) -> Request:
    if request.kind != "secure_sum.keys":
        return request
    return within(request, terms={**request.body["terms"], "cohort": ["a", "b"]})


def alive_and_dead(net: Cheating, request: Request) -> Request:
    """The others sign that 'e' is in the sum, 'a' that it is not: both of e's secrets would be known."""
    return within(request, survivors=["a", "b", "c", "d"]) if request.kind == "secure_sum.check" else request


def another_round(net: Cheating, request: Request) -> Request:
    """Another number on the envelope, so that the site would remember the sum under it."""
    return replace(request, round_number=9) if request.kind == "secure_sum.check" else request


def another_model(net: Cheating, request: Request) -> Request:
    """Another model than the rest get: what it brings about could be told from the sum (Pasquini et al. 2022)."""
    if request.kind != "secure_sum.input":
        return request
    return replace(request, tensors={name: 1.01 * tensor for name, tensor in request.tensors.items()})


def other_settings(net: Cheating, request: Request) -> Request:
    if request.kind != "secure_sum.input":
        return request
    return within(request, train={**request.body["train"], "seed": 99})


@pytest.mark.parametrize(
    ("cheat", "kind", "said"),
    [
        (another_model, "secure_sum.input", "are not those that all sites of this sum agreed to train with"),
        (other_settings, "secure_sum.input", "are not those that all sites of this sum agreed to train with"),
        (swaps_keys, "secure_sum.shares", "is not signed by 'b'"),
        (replays_a_share, "secure_sum.accept", "is not signed by 'b'"),
        (makes_up_a_complaint, "secure_sum.input", "is not signed by 'b'"),
        (leaves_out_a_share, "secure_sum.accept", "are not those of the sites"),
        (leaves_out_honest_sites, "secure_sum.input", "2 of 5 are left for this sum, 4 are needed"),
        (brings_back_another, "secure_sum.input", "who shares masks does not fit the list before it"),
        (another_list_of_masks, "secure_sum.check", "does not fit the list before it"),
        (shrinks_the_list, "secure_sum.check", "2 of 5 are left for this sum, 4 are needed"),
        (shrinks_the_cohort, "secure_sum.keys", "2 of 2 are left for this sum, 3 are needed"),
        (alive_and_dead, "secure_sum.unmask", "is not signed by"),
        (another_round, "secure_sum.check", "for another round than the terms"),
    ],
)
def test_each_attempt_is_refused(model, start, tmp_path: Path, cheat: Cheat, kind: str, said: str) -> None:
    net = Cheating(model, cheat)
    with contextlib.suppress(ProtectionError):  # the other four are enough, but where they, too, see two lists
        run(tmp_path / "run", net, start, privacy())
    ((asked, reason),) = net.refusals()
    assert asked == kind and said in reason


def test_a_sum_in_which_all_but_one_vanish_is_never_opened(model, start, tmp_path: Path) -> None:
    """Everybody but 'a' gets a model from which nothing is learnt: the sum would be the update of 'a'."""

    class Silencing(Net):
        def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
            dying = {name: replace(one, tensors=dead(one.tensors)) for name, one in requests.items() if name != "a"}
            yield from super().exchange({**requests, **dying}, timeout_seconds=timeout_seconds)

    def dead(tensors: Tensors) -> Tensors:
        return {name: torch.zeros_like(t) if "lora_B" in name else 1e-20 * t for name, t in tensors.items()}

    net = Silencing(model, privacy())
    with pytest.raises(ProtectionError, match="1 of 5 clients sent their input, 4 are needed"):
        run(tmp_path / "run", net, start, privacy())
    assert {failure.client for failure in net.failures} == {"b", "c", "d", "e"}
    assert not [reply for reply in net.seen if reply.kind in ("secure_sum.check", "secure_sum.unmask")]


@pytest.mark.parametrize("protection", ["secure_sum", "he"])
def test_what_the_policy_withholds_is_in_no_sum(model, start, tmp_path: Path, protection: str) -> None:
    """No loss enters a sum under ``metrics = []``."""
    if protection == "he":
        pytest.importorskip("tenseal")
    settings = privacy(protection)
    net = Net(model, settings)
    for site in net.sites.values():
        site.metrics = ()
    run(tmp_path / "run", net, start, settings)
    (row,) = RunFolder(tmp_path / "run").read_rows("clients")
    assert row["loss"] is None and row["num_examples"] == 25


def test_asking_twice_is_refused(model, start, tmp_path: Path) -> None:
    net = Cheating(model, lambda net, request: request)
    run(tmp_path / "run", net, start, privacy())
    for phase in PHASES[1:]:
        net.again(f"secure_sum.{phase}")
    assert [(kind, "out of turn, or twice" in reason) for kind, reason in net.refusals()] == [
        (f"secure_sum.{phase}", True) for phase in PHASES[1:]
    ]
