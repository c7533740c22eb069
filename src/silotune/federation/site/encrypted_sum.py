"""A site's answers to the requests of an encrypted sum: its weight, its update, and the opening of a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.errors import ProtectionError
from silotune.federation.site.noised_sum import settings_of
from silotune.federation.site.privacy import check_way
from silotune.federation.site.secure_sum import Seat, check_alike, protection_of
from silotune.federation.site.state import Protection
from silotune.federation.wire.messages import read_body
from silotune.federation.wire.sum_orders import (
    _SUM_TYPES,
    CELLS,
    FIGURE_PACKING,
    FIGURES_NAME,
    PLAIN,
    SUM,
    EncryptOrder,
    OpenOrder,
    WeightOrder,
    packing_of,
    places,
)
from silotune.privacy.encryption import Array, Packing, decrypt, encrypt
from silotune.privacy.figures import to_integers
from silotune.privacy.ring import Scale, quantise, signed
from silotune.seeds import derive
from silotune.settings.protections import HeScheme
from silotune.structs import Reply, Request

_SENT, _DONE = "sent", "opened"


class EncryptedSeat(Seat, Protocol):
    """The part of a site that these answers use."""

    examples: Sequence[Any]


def encrypt_weight(request: Request, site: EncryptedSeat) -> Reply:
    """``he.weight``: this site, and its number of examples, encrypted."""
    read_body(WeightOrder, request)
    protection = protection_of(site)
    figures = encrypt(np.array([1, len(site.examples)], np.int64), FIGURE_PACKING, _key(protection, "bfv"))
    _note_sent(site, "weight", request)
    return _reply(request, site, {FIGURES_NAME: figures})


def encrypt_update(request: Request, site: EncryptedSeat, train: Callable[[Request], Reply]) -> Reply:
    """``he.input``: trains, then sends the update and its figures encrypted.

    Raises:
        ProtectionError: The coordinator has chosen how to encrypt, and not the run's settings; or the site has more
            examples than a weight may say.
    """
    order = read_body(EncryptOrder, request)
    privacy, _ = settings_of(order.train)
    check_way(privacy, "he")
    check_alike(
        "orders to encrypt",
        {
            "fraction": (order.fraction, privacy.ciphertexts.he_fraction),
            "scheme": (order.scheme, privacy.ciphertexts.he_scheme),
            "packing": (order.packing, packing_of(privacy).values),
            "bound": (order.bound, privacy.sums.bound),
        },
    )
    protection = protection_of(site)
    key, figures_key = _key(protection, order.scheme), _key(protection, "bfv")
    scale = order.scale()
    update = train(replace(request, kind="train", body=order.train))
    if int(update.body["num_examples"]) > privacy.sums.max_examples:
        raise ProtectionError(
            f"this site holds more examples than privacy.protection.max_examples = {privacy.sums.max_examples}: "
            "raise it"
        )
    values = arithmetic.flatten(update.tensors).float().numpy()
    hidden = places({name: request.tensors[name] for name in update.tensors}, order.fraction)
    if (len(hidden), int(hidden.sum())) != (order.size, order.hidden):
        raise ProtectionError(f"the update has {len(hidden)} values, {order.size} are asked for")
    numbers, clipped = _numbers(values[hidden], order, scale, update)
    clear, beyond = _within(values[~hidden], order.bound)
    figures = to_integers(update.body, clipped=clipped + beyond, clients=order.clients, bits=FIGURE_PACKING.bits)
    counted = np.concatenate([np.ones(1, np.int64), signed(figures)])
    sent = {
        CELLS: encrypt(numbers, order.packed(), key),
        FIGURES_NAME: encrypt(counted, FIGURE_PACKING, figures_key),
    }
    _note_sent(site, "update", request)
    if order.fraction < 1:
        weight = int(update.body["num_examples"]) / order.num_examples
        sent[PLAIN] = (clear * weight).astype(np.float32)
    return _reply(request, site, sent)


def open_sum(request: Request, site: EncryptedSeat) -> Reply:
    """``he.open``: decrypts a sum, if it is one of enough clients; each site opens one of each kind a round, and of no
    round in which it has sent nothing.

    The number of clients is summed beside the update. It stops a coordinator that errs, not one that forges it:
    ciphertexts can be changed by whoever holds them.

    Raises:
        ProtectionError: Too few clients are in the sum, this site has opened one in this round, or sent nothing.
    """
    order = read_body(OpenOrder, request)
    protection = protection_of(site)
    which = _which("update" if order.size else "weight", request)
    known = site.served.opened(which)
    if known is None:
        raise ProtectionError(f"this site has sent nothing in round {request.round_number} that a sum could hold")
    if known == _DONE:
        raise ProtectionError(f"this site has opened a sum of round {request.round_number} before")
    site.served.note_opened(which, _DONE)
    figures = decrypt(_array(request, FIGURES_NAME), order.num_figures, FIGURE_PACKING, _key(protection, "bfv"))
    if figures[0] < protection.member.least_clients:
        raise ProtectionError(
            f"{max(0, int(figures[0]))} clients are in the sum, {protection.member.least_clients} are needed"
        )
    opened: dict[str, Array] = {FIGURES_NAME: figures}
    if order.size:
        packing = Packing(order.scheme, order.packing)
        values = decrypt(_array(request, CELLS), order.size, packing, _key(protection, order.scheme))
        opened[SUM] = values.astype(_SUM_TYPES[order.scheme][0])
    return _reply(request, site, opened)


def _which(kind: str, request: Request) -> str:
    return f"he.{kind}:{request.round_number}"


def _note_sent(site: EncryptedSeat, kind: str, request: Request) -> None:
    """Allows this site one opening of the round's sum, unless it had that."""
    if site.served.opened(_which(kind, request)) is None:
        site.served.note_opened(_which(kind, request), _SENT)


def _numbers(values: Array, order: EncryptOrder, scale: Scale, update: Reply) -> tuple[Array, int]:
    """What is encrypted: integers for BFV, weighted values for CKKS; and how many values were cut off."""
    num_examples = int(update.body["num_examples"])
    if order.scheme == "ckks":
        within, clipped = _within(values, order.bound)
        return within * (scale.factor(num_examples) * order.bound), clipped
    drawn = derive(int(order.train.get("seed", 0)), "rounding", round_number=update.round_number, client=update.client)
    made, clipped = quantise(values, num_examples, scale, bits=64, generator=np.random.default_rng(drawn))
    return signed(made), clipped


def _within(values: Array, bound: float) -> tuple[Array, int]:
    """The values in float64, cut off at the bound, and how many that were."""
    return np.clip(values, -bound, bound).astype(np.float64), int((np.abs(values) > bound).sum())


def _key(protection: Protection, scheme: HeScheme) -> bytes:
    if scheme not in protection.he_keys:
        raise ProtectionError(f"{protection.member.name!r} has no key for {scheme}: its kit brings it")
    return protection.he_keys[scheme]


def _array(request: Request, name: str) -> Array:
    if name not in request.tensors or request.tensors[name].ndim != 2:
        raise ProtectionError(f"a {request.kind} request has no ciphertexts named {name!r}")
    return request.tensors[name].numpy()


def _reply(request: Request, site: EncryptedSeat, arrays: dict[str, Array]) -> Reply:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Reply(request.kind, request.round_number, site.name, tensors)
