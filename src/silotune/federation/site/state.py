"""A site as its client function sees it, with what it keeps between rounds: its own tensors and its keys for sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from silotune import lora
from silotune.errors import MessageError
from silotune.federation.site.ledger import Budget
from silotune.federation.site.served import Served
from silotune.federation.wire.run_setup import RunSettings
from silotune.models.adapters import Adapted
from silotune.privacy.secure_sum import stages
from silotune.privacy.secure_sum.terms import Member
from silotune.record.cost import Meter
from silotune.structs import SiteState, Tensors
from silotune.training.encode import Encoded


def completed(request: Tensors, like: Mapping[str, object], *, initial: Tensors, own: Tensors) -> Tensors:
    """The adapter that a client works with, at the resident model's rank, residuals included.

    Args:
        request: What the coordinator sent, at the client's rank.
        like: The resident model's trained tensors; only their names count.
        initial: First values, drawn from the run's seed; they replace tensors that are never sent.
        own: Personal tensors, which are used where the coordinator sent none.

    Raises:
        MessageError: A tensor is in none of these.
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

    With ``is_required`` the site refuses whatever would show the coordinator its own values alone.
    ``he_key`` is the secret key of encrypted sums, which all sites share. ``charged`` is the ledger's entry of the
    noised sum that is going on.
    """

    member: Member
    stage: stages.Stage | None = None
    charged: str | None = None
    is_required: bool = False
    he_key: bytes | None = field(default=None, repr=False)


@dataclass
class Site:
    """One data holder: examples, the resident model it trains on, what it keeps between rounds, keys, and its meter.

    ``budget`` is where it keeps its privacy ledger, ``served`` what it has answered
    before. ``initial`` is the adapter as
    drawn from the run's seed: a coordinator need not send what no client ever trains. ``settings``
    are those that the run was opened with; no request is served
    under other settings. ``metrics`` are the figures that may enter a sum, None
    for all. ``members`` are trained on and ``reserve`` is not: what a
    model gives away is measured by the two.
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
    settings: RunSettings = RunSettings()
    metrics: tuple[str, ...] | None = None
    members: Sequence[Encoded] = ()
    reserve: Sequence[Encoded] = ()
