"""A site as its client function sees it, and what it keeps between rounds: its own tensors, its keys for sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from silotune import lora
from silotune.errors import MessageError
from silotune.federation.site.ledger import Budget
from silotune.federation.site.served import Served
from silotune.models.adapters import Adapted
from silotune.privacy.secure_sum import stages
from silotune.privacy.secure_sum.terms import Member
from silotune.record.cost import Meter
from silotune.settings.guarantees import DpSettings, NoGuarantee
from silotune.settings.protections import HeScheme
from silotune.structs import SiteState, Tensors
from silotune.training.encode import Encoded

PREFIX = "personal/"


def own_tensors(state: SiteState) -> Tensors:
    """A client's personal tensors, by their names in the adapter; empty before it has any."""
    return {name[len(PREFIX) :]: tensor for name, tensor in state.tensors.items() if name.startswith(PREFIX)}


def without_own(state: SiteState) -> SiteState:
    """The rest of what a client keeps, such as its optimiser's moments."""
    return SiteState({name: value for name, value in state.tensors.items() if not name.startswith(PREFIX)}, state.data)


def with_own(state: SiteState, own: Tensors) -> SiteState:
    """What a client keeps, with these personal tensors."""
    return SiteState({**without_own(state).tensors, **{PREFIX + name: own[name] for name in own}}, state.data)


def completed(request: Tensors, like: Mapping[str, object], *, initial: Tensors, own: Tensors) -> Tensors:
    """The adapter that a client works with, at the resident model's rank, residuals included.

    Args:
        request: What the coordinator sent, at the client's rank.
        like: The resident model's trained tensors; only their names count.
        initial: First values, drawn from the run's seed: they stand in for what is never sent.
        own: Personal tensors, which are used where the coordinator sent none.

    Raises:
        MessageError: A tensor is in none of them.
    """
    sent = lora.without_residuals(request)
    rest = {name: own.get(name, initial.get(name)) for name in like if name not in sent}
    missing = [name for name, tensor in rest.items() if tensor is None]
    if missing:
        raise MessageError(f"adapter tensor {missing[0]!r} was neither sent nor is it known to the client")
    found = {name: tensor for name, tensor in rest.items() if tensor is not None}
    full = lora.rank_of(initial or sent)
    whole = lora.padded({**lora.cut(found, lora.rank_of(sent)), **sent}, full)
    return {**whole, **{name: tensor for name, tensor in request.items() if lora.is_residual(name)}}


@dataclass
class Protection:
    """What a site needs for protected sums, and the stage of the one that is going on.

    ``is_required`` refuses whatever would show the coordinator this site alone.
    ``he_keys`` are the secret keys that all sites share, by scheme. ``charged`` is the ledger's entry of the noised sum
    that is going on.
    """

    member: Member
    stage: stages.Stage | None = None
    charged: str | None = None
    is_required: bool = False
    he_keys: Mapping[HeScheme, bytes] = field(default_factory=dict, repr=False)


@dataclass
class Site:
    """One data holder: examples, the resident model it trains on, what it keeps between rounds, keys, and its meter.

    ``budget`` is what it may spend of privacy, ``served`` what it has answered before. ``initial`` is the adapter as
    drawn from the run's seed: a coordinator need not send what no client ever trains. ``dp`` is the guarantee that the
    run was opened with: no request gets anything under another. ``metrics`` are the figures that may enter a sum, None
    for all.
    """

    name: str
    examples: Sequence[Encoded]
    adapted: Adapted
    state: SiteState = field(default_factory=SiteState)
    protection: Protection | None = None
    meter: Meter = field(default_factory=Meter)
    budget: Budget = Budget()
    served: Served = field(default_factory=Served)
    initial: Tensors = field(default_factory=dict)
    dp: DpSettings = NoGuarantee()
    metrics: tuple[str, ...] | None = None
