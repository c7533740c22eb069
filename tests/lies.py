"""How a site may lie in a secure sum: each lie changes the site's answers before they are signed and sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from parties import false_shares, spoilt
from protected import Lie, Lying
from silotune.federation.wire.sum_orders import SealedShares, SharesOrder, SharesReport, written
from silotune.privacy.secure_sum.sharing import SignedSharing, complaint_content
from silotune.privacy.secure_sum.terms import SignedKeys, survivors_content
from silotune.structs import Reply, Request


def at(kind: str, **changes: Callable[[Lying, Request, Any], Any]) -> Lie:
    """Changes fields of the body of the answers to one kind of request."""

    def lie(net: Lying, request: Request, reply: Reply) -> Reply:
        if request.kind != kind:
            return reply
        made = {name: change(net, request, reply.body.get(name)) for name, change in changes.items()}
        return replace(reply, body={**reply.body, **made})

    return lie


def zeros(net: Lying, request: Request, value: Any) -> str:
    return "0" * len(value)


def another_s_keys(net: Lying, request: Request, reply: Reply) -> Reply:
    if request.kind != "secure_sum.keys":
        return reply
    other = next(seen for seen in net.seen if seen.kind == request.kind and seen.client != net.who)
    return replace(reply, body=other.body)


def no_keys(net: Lying, request: Request, reply: Reply) -> Reply:
    """A mask key with which every secret is zero, properly signed: the others would notice when they have trained."""
    if request.kind != "secure_sum.keys":
        return reply
    made = SignedKeys.model_validate({**reply.body, "mask": "0" * 64})
    signature = net.liar.member.sign(made.content(net.liar.stage.terms, net.who)).hex()
    return replace(reply, body={**made.model_dump(), "signature": signature})


def garbage_shares(*, to_all: bool) -> Lie:
    """Sealed shares that do not open, signed by their owner."""

    def shares(net: Lying, request: Request, sealed: Mapping[str, Any]) -> dict[str, Any]:
        spoils = sealed if to_all else [min(sealed)]
        return {peer: _spoilt(net, one, peer) if peer in spoils else one for peer, one in sealed.items()}

    return at("secure_sum.shares", shares=shares)


def _spoilt(net: Lying, sealed: Mapping[str, Any], peer: str) -> dict[str, Any]:
    made = spoilt(net.liar.member, net.liar.stage, SealedShares.model_validate(dict(sealed)).read(), peer)
    return written(made).model_dump()


def unsigned_garbage(net: Lying, request: Request, sealed: Mapping[str, Any]) -> dict[str, Any]:
    return {peer: {**one, "text": os.urandom(82).hex()} for peer, one in sealed.items()}


def commits_to_something_else(net: Lying, request: Request, reply: Reply) -> Reply:
    """Than it has sealed: to the coordinator and to the holders alike, properly signed."""
    if request.kind != "secure_sum.shares":
        return reply
    member, stage = net.liar.member, net.liar.stage
    sharing = SignedSharing.model_validate({**reply.body["sharing"], "key": dict.fromkeys(stage.given, "0" * 64)})
    sharing = sharing.model_copy(update={"signature": member.sign(sharing.content(stage.roster, net.who)).hex()})
    sealed = {
        peer: replace(SealedShares.model_validate(one).read(), key="0" * 64)
        for peer, one in reply.body["shares"].items()
    }
    signed = {
        peer: replace(one, signature=member.sign(one.content(stage.roster, net.who, peer)).hex())
        for peer, one in sealed.items()
    }
    report = SharesReport(shares={peer: written(one) for peer, one in signed.items()}, sharing=sharing)
    return replace(reply, body=report.model_dump())


def frames_a_holder(net: Lying, request: Request, sealed: Mapping[str, Any]) -> dict[str, Any]:
    """Another commitment to a holder than to the coordinator, so that what the holder reveals looks wrong."""
    peer = min(sealed)
    made = replace(SealedShares.model_validate(sealed[peer]).read(), seed="0" * 64)
    content = made.content(net.liar.stage.roster, net.who, peer)
    made = replace(made, signature=net.liar.member.sign(content).hex())
    return {**sealed, peer: written(made).model_dump()}


def complains(*, of: Callable[[Lying, list[str]], list[str]]) -> Lie:
    """Signed complaints about others whose shares are fine."""

    def complaints(net: Lying, request: Request, value: Any) -> dict[str, str]:
        about = of(net, sorted(request.body["shares"]))
        contents = {owner: complaint_content(net.liar.stage.before.roster, owner, net.who) for owner in about}
        return {owner: net.liar.member.sign(content).hex() for owner, content in contents.items()}

    return at("secure_sum.accept", complaints=complaints)


complains_of_one, complains_of_all = complains(of=lambda net, names: names[:1]), complains(of=lambda net, names: names)


def reveals(change: Callable[[dict[str, str]], dict[str, str]]) -> Lie:
    return at("secure_sum.unmask", seed=lambda net, request, shares: change(shares))


def moved(shares: dict[str, str]) -> dict[str, str]:
    """Others' shares under the wrong names."""
    names = sorted(shares)
    return dict(zip(names, (shares[name] for name in (*names[1:], names[0])), strict=True))


def as_keys(net: Lying, request: Request, reply: Reply) -> Reply:
    """Shares of mask keys in place of those of seeds."""
    if request.kind != "secure_sum.unmask":
        return reply
    held = net.before.before.held
    return replace(reply, body={"seed": {}, "key": {owner: pair[1].hex() for owner, pair in held.items()}})


def signs_another_list(net: Lying, request: Request, value: Any) -> str:
    shared = net.liar.stage.before.before
    arrived = net.liar.stage.before.arrived
    return net.liar.member.sign(survivors_content(shared.roster, arrived, arrived[:-1])).hex()


def malformed(kind: str) -> Lie:
    def lie(net: Lying, request: Request, reply: Reply) -> Reply:
        if request.kind != kind:
            return reply
        return replace(reply, body={"what": 1}, tensors={name: one[:1] for name, one in reply.tensors.items()})

    return lie


def another_round(kind: str) -> Lie:
    return lambda net, request, reply: replace(reply, round_number=9) if request.kind == kind else reply


LIES: dict[str, tuple[Lie, str, bool]] = {
    "wrong keys": (at("secure_sum.keys", mask=zeros), "its keys are not signed by it", False),
    "keys of another": (another_s_keys, "its keys are not signed by it", False),
    "keys that are none": (no_keys, "one of its keys is not valid", False),
    "a mangled signature of keys": (at("secure_sum.keys", signature=zeros), "its keys are not signed by it", False),
    "too few shares": (
        at("secure_sum.shares", shares=lambda net, request, sealed: dict(list(sealed.items())[1:])),
        "its shares are not one for each of the others", False,
    ),
    "garbage shares to all": (garbage_shares(to_all=True), "in dispute over shares", False),
    "unsigned garbage": (at("secure_sum.shares", shares=unsigned_garbage), "is not signed by it", False),
    "unsigned commitments": (
        at("secure_sum.shares", sharing=lambda net, request, said: {**said, "commitment": "0" * 64}),
        "is not signed by it", False,
    ),
    "another threshold of shares": (
        at("secure_sum.shares", sharing=lambda net, request, said: {**said, "least": 1}), "are agreed on", False,
    ),
    "wrong commitments": (commits_to_something_else, "in dispute over shares", False),
    "two commitments": (at("secure_sum.shares", shares=frames_a_holder), "are not those for the coordinator", False),
    "complaints about all": (complains_of_all, "in dispute over shares", False),
    "complaints about strangers": (complains(of=lambda net, names: ["ghost"]), "that it was not sent", False),
    "complaints about itself": (complains(of=lambda net, names: [net.who]), "that it was not sent", False),
    "an unsigned complaint": (
        at("secure_sum.accept", complaints=lambda net, request, value: {min(request.body["shares"]): "0" * 128}),
        "its complaint is not signed", False,
    ),
    "answers to nobody": (
        at("secure_sum.input", answers=lambda net, request, value: {net.who: {"seed": "0" * 66, "key": "0" * 66}}),
        "its answer to a complaint is not", False,
    ),
    "a wrong signature": (at("secure_sum.check", signature=zeros), "its signature is not over the list", True),
    "a signature of another list": (at("secure_sum.check", signature=signs_another_list), "not over the list", True),
    "wrong shares revealed": (reveals(lambda shares: dict.fromkeys(shares, "0" * 66)), "revealed other shares", True),
    "one wrong share revealed": (
        reveals(lambda shares: {**shares, min(shares): "0" * 66}), "revealed other shares", True,
    ),
    "shares moved": (reveals(moved), "revealed other shares", True),
    "no shares revealed": (reveals(lambda shares: {}), "revealed other shares", True),
    "shares of strangers": (reveals(lambda shares: {**shares, "ghost": "0" * 66}), "revealed other shares", True),
    "shares of keys": (as_keys, "revealed other shares", True),
    **{
        f"a malformed {phase}": (malformed(f"secure_sum.{phase}"), "", phase in ("check", "unmask"))
        for phase in ("keys", "shares", "accept", "input", "check", "unmask")
    },
    "an answer to another round": (another_round("secure_sum.accept"), "answers no request of round 1", False),
}  # fmt: skip
"""Lie -> how the liar answers, what it is booked with, whether its input is in the sum all the same."""


def complains_of_one_and_keeps_to_it(net: Lying, request: Request, reply: Reply) -> Reply:
    reply = complains_of_one(net, request, reply)
    return reveals(lambda shares: {owner: shares[owner] for owner in sorted(shares)[1:]})(net, request, reply)


def gives_false_shares(secret: str, *, then_vanishes: bool = False) -> Lie:
    """Shares that fit their commitments and do not give the secret."""

    def lie(net: Lying, request: Request, reply: Reply) -> Reply | None:
        if then_vanishes and request.kind == "secure_sum.input":
            return None
        if request.kind != "secure_sum.shares":
            return reply
        keys = SharesOrder.model_validate(dict(request.body)).keys
        net.liar.stage, sealed, sharing = false_shares(net.liar.member, net.before, keys, secret)
        report = SharesReport(shares={peer: written(one) for peer, one in sealed.items()}, sharing=sharing)
        return replace(reply, body=report.model_dump())

    return lie


def spoils_a_share_and_answers(answer: Callable[[Mapping[str, Any]], Any]) -> Lie:
    """The complaint of the one whose share it has spoilt."""
    spoils = garbage_shares(to_all=False)
    answers = at("secure_sum.input", answers=lambda net, request, value: answer(value or {}))
    return lambda net, request, reply: answers(net, request, spoils(net, request, reply))


def spoils_a_share_and_reveals_nothing(net: Lying, request: Request, reply: Reply) -> Reply:
    """It answers, and keeps back its own share of its seed."""
    return reveals(lambda shares: {})(net, request, garbage_shares(to_all=False)(net, request, reply))


def spoils_a_share_and_vanishes(net: Lying, request: Request, reply: Reply) -> Reply | None:
    return None if request.kind == "secure_sum.input" else garbage_shares(to_all=False)(net, request, reply)


def sends_garbage(tensor: str, change: Callable[[torch.Tensor], None]) -> Lie:
    def lie(net: Lying, request: Request, reply: Reply) -> Reply:
        if request.kind == "secure_sum.input":
            change(reply.tensors[tensor])
        return reply

    return lie
