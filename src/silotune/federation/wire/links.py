"""What compression does on both ends of a link: it packs and unpacks requests and updates.

On the way up a client sends its update; what a biased compression leaves out it keeps and adds to its next update. On
the way down the coordinator sends the model, or with ``delta`` the change to what a client received last: then it
remembers what the clients hold, so that the next round's change corrects an error of this round and errors never add
up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from silotune.errors import MessageError
from silotune.federation.wire.messages import Layout, layout_of
from silotune.methods.compress.pack import is_exact, lost_for_good, pack, pack_update, packed_layout, unpack
from silotune.settings.links import CompressionSection, DownloadSection
from silotune.structs import Reply, Request, SiteState, Tensors
from silotune.tensors import add, all_finite, put_under, subtract, taken_from

CHANGE = "change"
"""Group of the tensors of a request that are added to what the client received last."""


def address(
    requests: Mapping[str, Request],
    settings: DownloadSection,
    *,
    held: Tensors,
    holders: Collection[str],
    seed: int,
) -> tuple[dict[str, Request], Tensors]:
    """Gives the requests with the packed tensors that travel to each client.

    Args:
        requests: By client, with the tensors that the client should have; with ``delta`` the same for all.
        settings: Of compression on the way down.
        held: What ``holders`` received last; empty where nobody holds anything.
        holders: Clients that hold it.
        seed: Of random rounding.

    Returns:
        The requests, with ``tensors`` as the client will unpack them; and what clients that answer hold from now on
        (empty without ``delta``).
    """
    if settings.delta:
        return _as_change(requests, settings, held, holders, seed)
    if is_exact(settings):
        return dict(requests), {}
    known: dict[int, tuple[Tensors, Tensors]] = {}
    made = {}
    for name, request in requests.items():
        key = id(request.tensors)  # clients mostly get the same tensors: they are packed once
        if key not in known:
            packed = pack(request.tensors, settings, seed=seed)
            known[key] = packed, unpack(packed, settings, layout_of(request.tensors))
        made[name] = replace(request, wire=known[key][0], tensors=known[key][1])
    return made, {}


def _as_change(
    requests: Mapping[str, Request], settings: DownloadSection, held: Tensors, holders: Collection[str], seed: int
) -> tuple[dict[str, Request], Tensors]:
    target = next(iter(requests.values())).tensors
    if not any(name in holders for name in requests):
        return {name: replace(request, wire=target) for name, request in requests.items()}, target
    packed = pack(subtract(target, held), settings, seed=seed)
    given = add(held, unpack(packed, settings, layout_of(target)))
    made = {}
    for name, request in requests.items():
        is_holder = name in holders
        made[name] = replace(request, wire=put_under(CHANGE, packed) if is_holder else given, tensors=given)
    return made, given


def open_request(tensors: Tensors, settings: DownloadSection, layout: Layout, *, held: Tensors) -> Tensors:
    """The tensors of a request as they were before they were packed.

    Args:
        tensors: Those that came.
        settings: Of compression on the way down.
        layout: Of what they stand for.
        held: What the client received last; a change is added to it.

    Raises:
        MessageError: The tensors do not fit the layout, or a change came to a client that holds nothing.
    """
    change = taken_from(CHANGE, tensors) if settings.delta else {}
    if not change and (settings.delta or is_exact(settings)):
        return tensors
    came = change or tensors
    if came.keys() != packed_layout(layout, settings).keys():
        raise MessageError("a request's tensors are not the adapter's tensors as federation.download packs them")
    opened = unpack(came, settings, layout)
    if not change:
        return opened
    if not held:
        raise MessageError("a change of the model came to a client that has received no model yet")
    return add(held, opened)


def change_layout(packed: Layout) -> Layout:
    """The layout of a request that carries a change, from the layout of the packed tensors."""
    return {f"{CHANGE}/{name}": entry for name, entry in packed.items()}


def pack_reply(
    update: Tensors, settings: CompressionSection, state: SiteState, *, seed: int
) -> tuple[Tensors, Tensors]:
    """A client's update as it is sent, and the rest that the client keeps."""
    return pack_update(update, state.residual, settings, layout=layout_of(update), seed=seed)


def lost_of_reply(update: Tensors, packed: Tensors, settings: CompressionSection) -> Tensors:
    """What of a client's update neither arrives nor is sent later; empty where all of it arrives at last."""
    return lost_for_good(update, packed, settings, layout=layout_of(update))


def open_reply(reply: Reply, settings: CompressionSection, expected: Layout) -> Reply:
    """A reply with its update as it was before it was packed.

    Raises:
        MessageError: It is not such a message, or holds values that are not finite.
    """
    if is_exact(settings):
        return reply
    opened = unpack(reply.tensors, settings, expected)
    if not all_finite(opened):
        raise MessageError(f"the reply of {reply.client!r} holds values that are not finite")
    return replace(reply, tensors=opened)
