"""A site's answers to the requests of a secure sum: messages in, one phase of the protocol, messages out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.errors import ProtectionError
from silotune.federation.kinds import TRAIN
from silotune.federation.site import noised_sum
from silotune.federation.site.state import Protection, Site
from silotune.federation.wire.messages import read_body
from silotune.federation.wire.run_setup import RunSettings
from silotune.federation.wire.sum_orders import (
    FIGURES_NAME,
    VALUES,
    AcceptOrder,
    CheckOrder,
    InputOrder,
    KeysOrder,
    SharesOrder,
    SharesReport,
    UnmaskOrder,
    UnmaskReport,
    work_digest,
    written,
)
from silotune.privacy.figures import to_integers
from silotune.privacy.ring import Integers, quantise
from silotune.privacy.secure_sum import site as protocol
from silotune.privacy.secure_sum import stages
from silotune.privacy.secure_sum.sharing import FalseSharing, check_proof
from silotune.privacy.secure_sum.terms import Terms
from silotune.seeds import derive
from silotune.structs import Reply, Request

_Stage = TypeVar("_Stage", stages.Advertised, stages.Shared, stages.Held, stages.Masked, stages.Consistent)


def advertise_keys(request: Request, site: Site) -> Reply:
    """``secure_sum.keys``: begins a sum, and forgets one that was not finished."""
    terms = read_body(KeysOrder, request).terms
    protection = protection_of(site)
    if terms.round_number != request.round_number:
        raise ProtectionError("the terms of a sum are for another round")
    protection.stage, keys = protocol.advertise(protection.member, terms, os.urandom)
    return _reply(request, site, keys.model_dump())


def share_keys(request: Request, site: Site) -> Reply:
    """``secure_sum.shares``."""
    protection, stage = _taken(site, stages.Advertised, request)
    keys = read_body(SharesOrder, request).keys
    protection.stage, sealed, sharing = protocol.share(protection.member, stage, keys, os.urandom)
    shares = {peer: written(one) for peer, one in sealed.items()}
    return _reply(request, site, SharesReport(shares=shares, sharing=sharing).model_dump())


def accept_shares(request: Request, site: Site) -> Reply:
    """``secure_sum.accept``."""
    protection, stage = _taken(site, stages.Shared, request)
    order = read_body(AcceptOrder, request)
    relayed = {owner: one.read() for owner, one in order.shares.items()}
    protection.stage, complaints = protocol.accept(protection.member, stage, order.arrived, relayed)
    return _reply(request, site, {"complaints": complaints})


def masked_input(request: Request, site: Site, train: Callable[[Request], Reply]) -> Reply:
    """``secure_sum.input``: trains, then sends the update and its figures as masked integers.

    Args:
        request: With the adapter's tensors.
        site: Whose stage moves on.
        train: Answers the ``train`` request that the order holds.
    """
    protection, stage = _taken(site, stages.Held, request)
    order = read_body(InputOrder, request)
    confirmed = protocol.confirm(protection.member, stage, order.arrived)
    answers = protocol.answer(protection.member, stage, order.complaints)
    terms = stage.terms
    if (order.size, order.bits) != (terms.size, terms.bits):
        raise ProtectionError("size and ring are not those of the terms that this site agreed to")
    if work_digest(order.train, request.tensors) != terms.work:
        raise ProtectionError("model and settings are not those that all sites of this sum agreed to train with")
    check_terms(terms, site.settings)
    share = noised_sum.begin(terms, order.train, site)
    protection.charged = None if share is None else share.entry
    update = train(replace(request, kind=TRAIN, body=order.train.body()))
    if arithmetic.count(update.tensors) != terms.size:
        raise ProtectionError(f"the update has {arithmetic.count(update.tensors)} values, the terms say {terms.size}")
    arrays, noise = integers_of(update, terms, share, seed=order.train.seed)
    protocol.mask(protection.member, confirmed, arrays, noise=noise)
    protection.stage = confirmed
    tensors = {name: torch.from_numpy(array.view(_signed(array))) for name, array in zip(_NAMES, arrays, strict=True)}
    shown = {holder: {"seed": of_seed.hex(), "key": of_key.hex()} for holder, (of_seed, of_key) in answers.items()}
    return Reply(request.kind, request.round_number, site.name, tensors, {"answers": shown} if shown else {})


def check_terms(terms: Terms, settings: RunSettings) -> None:
    """Compares the terms that this site has signed with the settings that it trains under, which a submitter signed.

    Raises:
        ProtectionError: A coordinator has chosen other terms than the run's settings say.
    """
    privacy, federation = settings.privacy, settings.federation
    noised_sum.check_noise(terms, privacy)
    check_alike(
        "terms of the sum",
        {
            "bits": (terms.bits, privacy.masks.ring_bits),
            "bound": (terms.bound, privacy.sums.bound),
            "max_examples": (terms.max_examples, noised_sum.largest_weight(privacy, federation)),
            "threshold": (terms.threshold, privacy.masks.threshold),
        },
    )


def check_alike(where: str, said: Mapping[str, tuple[object, object]]) -> None:
    """Raises ``ProtectionError`` at the first name whose two values (what was asked, what the settings say) differ."""
    for name, (asked, agreed) in said.items():
        if asked != agreed:
            raise ProtectionError(f"the {where} say {name} = {asked}, the settings of the order to train say {agreed}")


def integers_of(
    update: Reply, terms: Terms, share: noised_sum.Share | None, *, seed: int
) -> tuple[list[Integers], list[Integers]]:
    """The values and figures of a ``train`` reply as integers before masking, and the noise on the values.

    The rounding is drawn from the run's seed, so that a repeated round gives the same sum; it hides nothing.
    """
    drawn = derive(seed, "rounding", round_number=update.round_number, client=update.client)
    generator, clients = np.random.default_rng(drawn), len(terms.cohort)
    if share is not None:
        values, noise, weight = noised_sum.noised(update, terms, share, generator=generator)
        return [values, to_integers(update.body, clipped=0, clients=clients, weight=weight)], [noise]
    quantised, clipped = quantise(
        arithmetic.flatten(update.tensors).float().numpy(),
        int(update.body["num_examples"]),
        terms.scale(),
        bits=terms.bits,
        generator=generator,
    )
    return [quantised, to_integers(update.body, clipped=clipped, clients=clients)], []


def check_survivors(request: Request, site: Site) -> Reply:
    """``secure_sum.check``."""
    protection, stage = _taken(site, stages.Masked, request)
    order = read_body(CheckOrder, request)
    agreed, signature = protocol.agree(protection.member, stage, order.survivors)
    _check_same_clients(site, request, agreed, order.liars)
    protection.stage = agreed
    return _reply(request, site, {"signature": signature})


def _check_same_clients(
    site: Site, request: Request, agreed: stages.Consistent, liars: Mapping[str, FalseSharing]
) -> None:
    """Refuses a round that this site has helped to open before, unless it was over the same clients.

    Clients that have provably lied may be missing now. The two sums then reveal only the inputs of these liars, and
    nobody can make such a proof against an honest client. Over the same clients as last time nothing has to be proven,
    so that a try that was cut short can be repeated.

    Raises:
        ProtectionError: It was over other clients, and a missing client is not proven to have lied.
    """
    noted = site.served.opened(_which(request))
    if noted is None:
        return
    before, members = set(json.loads(noted)), protection_of(site).member.public_keys
    missing = before - set(agreed.survivors)
    if not missing <= liars.keys() or not before >= set(agreed.survivors):
        raise ProtectionError(
            f"round {request.round_number} was opened before, over other clients: the difference of two sums would "
            "show single updates"
        )
    for name in sorted(missing):
        if name not in members:
            raise ProtectionError(f"{name!r} is said to have lied, but is no longer a member of the federation")
        check_proof(liars[name], name, members[name])


def reveal_shares(request: Request, site: Site) -> Reply:
    """``secure_sum.unmask``: reveals shares; the site remembers with which clients it has opened this round."""
    protection, stage = _taken(site, stages.Consistent, request)
    signatures = read_body(UnmaskOrder, request).signatures
    shares = protocol.reveal(protection.member, stage, signatures)
    noised_sum.settle(stage.terms, len(stage.survivors), site, protection.charged)
    site.served.note_opened(_which(request), json.dumps(sorted(stage.survivors)))
    kinds = {
        kind: {owner: text.hex() for owner, (of, text) in shares.items() if of == kind} for kind in ("seed", "key")
    }
    return _reply(request, site, UnmaskReport(**kinds).model_dump())


def _which(request: Request) -> str:
    return f"secure_sum:{request.round_number}"


_NAMES = (VALUES, FIGURES_NAME)


def _signed(array: np.ndarray[Any, Any]) -> str:
    """torch has few unsigned types: the same bits travel as signed numbers."""
    return str(array.dtype.str).replace("u", "i")


def protection_of(site: Site) -> Protection:
    """The site's keys; ``ProtectionError`` where it has none."""
    if site.protection is None:
        raise ProtectionError(f"{site.name!r} has no keys for protected sums: use the keys of its kit")
    return site.protection


def terms_of(site: Site) -> Terms | None:
    """The terms of the current sum, which this site signed with its keys; None where no sum is going on."""
    stage = site.protection.stage if site.protection is not None else None
    return None if stage is None or isinstance(stage, stages.Closed) else stage.terms


def is_amid_sum(site: Site) -> bool:
    """Whether the site holds secrets of a sum that has not ended; they exist only in its memory."""
    return terms_of(site) is not None


def _taken(site: Site, kind: type[_Stage], request: Request) -> tuple[Protection, _Stage]:
    """Takes away the stage that a request needs; if the request fails, this sum is over for the site."""
    protection = protection_of(site)
    stage, protection.stage = protection.stage, stages.Closed()
    if not isinstance(stage, kind):
        raise ProtectionError(f"{request.kind} is asked out of turn, or twice: this sum is closed")
    if request.round_number != stage.terms.round_number:
        raise ProtectionError(
            f"{request.kind} is asked for another round than the terms of this sum: the sum is closed"
        )
    return protection, stage


def _reply(request: Request, site: Site, body: Mapping[str, Any]) -> Reply:
    return Reply(request.kind, request.round_number, site.name, {}, body)
