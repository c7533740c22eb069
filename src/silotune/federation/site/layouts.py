"""What the tensors of a request must look like at a site, by its kind and the run's settings, not by what it claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from silotune import lora
from silotune.errors import MessageError
from silotune.federation.kinds import KINDS
from silotune.federation.wire import links
from silotune.federation.wire.messages import Expected, Header, Layout, layout_of
from silotune.methods.algorithms import LORA_RULES, method
from silotune.methods.compress.pack import packed_layout
from silotune.methods.schedule import outgoing
from silotune.settings.sections import FederationSection
from silotune.structs import Tensors


@dataclass(frozen=True)
class Known:
    """What a site knows of a run before a request comes: settings, the adapter's first tensors, its own rank."""

    federation: FederationSection
    initial: Tensors
    rank: int | None


def expected_of(federation: FederationSection, initial: Tensors, *, rank: int | None = None) -> Mapping[str, Expected]:
    """Kind of request -> function that gives the layout that its tensors must have.

    Args:
        federation: The run's ``[federation]`` section.
        initial: The adapter's tensors at their full rank.
        rank: Of this site, where it has one of its own.
    """
    known = Known(federation, initial, rank)
    return {name: partial(kind.carries, known) for name, kind in KINDS.items()}


def model(known: Known, header: Header, claimed: Layout) -> Layout:
    """The round's part of the model, without compression."""
    made = method(known.federation)
    down = outgoing(made.sent(known.initial, {}), made.schedule(header.round_number), known.rank)
    return _with_residuals(known, layout_of(down), claimed)


def linked_model(known: Known, header: Header, claimed: Layout) -> Layout:
    """The same as it is packed for its link: the model, or the change to what this site received last."""
    download, whole = known.federation.download, model(known, header, claimed)
    packed = packed_layout(whole, download)
    if not download.delta:
        return packed
    change = links.change_layout(packed)
    return change if claimed.keys() == change.keys() else whole


def whole(known: Known, header: Header, claimed: Layout) -> Layout:
    """The whole adapter, which the site is to score."""
    return _with_residuals(known, layout_of(known.initial), claimed)


def _with_residuals(known: Known, layout: Layout, claimed: Layout) -> Layout:
    """The layout with the claimed residuals, where the rule makes residuals; the sender chooses only their rank.

    Raises:
        MessageError: A residual has no rank, or a larger one than its module's width.
    """
    if LORA_RULES[type(known.federation.lora)].fold is None:
        return layout
    made = dict(layout)
    for module in lora.modules(known.initial):
        if module + lora.RESIDUAL_A not in claimed:
            continue
        a, b = known.initial[module + lora.A], known.initial[module + lora.B]
        dtype = layout_of({"a": a})["a"][0]
        width, (_, shape) = min(b.shape[0], a.shape[1]), claimed[module + lora.RESIDUAL_A]
        if not shape or type(shape[0]) is not int or not 1 <= shape[0] <= width:
            raise MessageError(f"the residual of {module!r} came with a rank that is not one of 1 to {width}")
        made[module + lora.RESIDUAL_A] = (dtype, (shape[0], a.shape[1]))
        made[module + lora.RESIDUAL_B] = (dtype, (b.shape[0], shape[0]))
    return made
