"""A site's answers to the requests of an encrypted sum: its weight, its update, and the opening of a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.errors import ProtectionError
from silotune.federation.kinds import TRAIN
from silotune.federation.site.privacy import check_way
from silotune.federation.site.secure_sum import check_alike, protection_of
from silotune.federation.site.state import Protection, Site
from silotune.federation.wire.messages import read_body
from silotune.federation.wire.sum_orders import (
    CELLS,
    FIGURE_PACKING,
    FIGURES_NAME,
    SUM,
    EncryptOrder,
    OpenOrder,
    WeightOrder,
)
from silotune.privacy.encryption import Array, Packing, decrypt, encrypt
from silotune.privacy.figures import to_integers
from silotune.privacy.ring import Scale, quantise, signed
from silotune.seeds import derive
from silotune.structs import Reply, Request

_SENT, _DONE = "sent", "opened"


def encrypt_weight(request: Request, site: Site) -> Reply:
    """``he.weight``: sends a count of one site and its number of examples, encrypted."""
    read_body(WeightOrder, request)
    protection = protection_of(site)
    figures = encrypt(np.array([1, len(site.examples)], np.int64), FIGURE_PACKING, _key(protection))
    _note_sent(site, "weight", request)
    return _reply(request, site, {FIGURES_NAME: figures})


def encrypt_update(request: Request, site: Site, train: Callable[[Request], Reply]) -> Reply:
    """``he.input``: trains, then sends the update and its figures encrypted.

    Raises:
        ProtectionError: The coordinator has chosen other encryption than the run's settings say, or the site has more
            examples than ``privacy.max_examples``.
    """
    order = read_body(EncryptOrder, request)
    privacy = site.settings.privacy
    check_way(privacy, "he")
    check_alike(
        "orders to encrypt",
        {
            "packing": (order.packing, privacy.ciphertexts.packing),
            "bound": (order.bound, privacy.sums.bound),
        },
    )
    protection = protection_of(site)
    key, scale = _key(protection), order.scale()
    update = train(replace(request, kind=TRAIN, body=order.train.body()))
    if int(update.body["num_examples"]) > privacy.sums.max_examples:
        raise ProtectionError(
            f"this site holds more examples than privacy.protection.max_examples = {privacy.sums.max_examples}: "
            "raise this setting"
        )
    values = arithmetic.flatten(update.tensors).float().numpy()
    if len(values) != order.size:
        raise ProtectionError(f"the update has {len(values)} values, but {order.size} are asked for")
    numbers, clipped = _numbers(values, order, scale, update)
    figures = to_integers(update.body, clipped=clipped, clients=order.clients, bits=FIGURE_PACKING.bits)
    counted = np.concatenate([np.ones(1, np.int64), signed(figures)])
    sent = {
        CELLS: encrypt(numbers, order.packed(), key),
        FIGURES_NAME: encrypt(counted, FIGURE_PACKING, key),
    }
    _note_sent(site, "update", request)
    return _reply(request, site, sent)


def open_sum(request: Request, site: Site) -> Reply:
    """``he.open``: decrypts a sum of enough clients.

    In a round, each site opens one sum of each kind, and only a kind that it has sent its own part of.

    The number of clients is summed beside the update. This stops a coordinator that errs, but not one that forges the
    number: whoever holds ciphertexts can change them.

    Raises:
        ProtectionError: Too few clients are in the sum, or this site has already opened such a sum in this round, or
            has sent nothing for it.
    """
    order = read_body(OpenOrder, request)
    protection = protection_of(site)
    which = _which("update" if order.size else "weight", request)
    known = site.served.opened(which)
    if known is None:
        raise ProtectionError(f"this site has sent nothing in round {request.round_number} that could be in this sum")
    if known == _DONE:
        raise ProtectionError(f"this site has opened a sum of round {request.round_number} before")
    site.served.note_opened(which, _DONE)
    figures = decrypt(_array(request, FIGURES_NAME), order.num_figures, FIGURE_PACKING, _key(protection))
    if figures[0] < protection.member.least_clients:
        raise ProtectionError(
            f"{max(0, int(figures[0]))} clients are in the sum, {protection.member.least_clients} are needed"
        )
    opened: dict[str, Array] = {FIGURES_NAME: figures}
    if order.size:
        values = decrypt(_array(request, CELLS), order.size, Packing(order.packing), _key(protection))
        opened[SUM] = values.astype(np.int32)
    return _reply(request, site, opened)


def _which(kind: str, request: Request) -> str:
    return f"he.{kind}:{request.round_number}"


def _note_sent(site: Site, kind: str, request: Request) -> None:
    """Allows this site to open the round's sum once, unless it was allowed to already."""
    if site.served.opened(_which(kind, request)) is None:
        site.served.note_opened(_which(kind, request), _SENT)


def _numbers(values: Array, order: EncryptOrder, scale: Scale, update: Reply) -> tuple[Array, int]:
    """The integers that are encrypted, and how many values were cut off."""
    num_examples = int(update.body["num_examples"])
    drawn = derive(order.train.seed, "rounding", round_number=update.round_number, client=update.client)
    made, clipped = quantise(values, num_examples, scale, bits=64, generator=np.random.default_rng(drawn))
    return signed(made), clipped


def _key(protection: Protection) -> bytes:
    if protection.he_key is None:
        raise ProtectionError(f"{protection.member.name!r} has no key for encrypted sums: use the key of its kit")
    return protection.he_key


def _array(request: Request, name: str) -> Array:
    if name not in request.tensors or request.tensors[name].ndim != 2:
        raise ProtectionError(f"a {request.kind} request has no ciphertexts named {name!r}")
    return request.tensors[name].numpy()


def _reply(request: Request, site: Site, arrays: dict[str, Array]) -> Reply:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Reply(request.kind, request.round_number, site.name, tensors)
