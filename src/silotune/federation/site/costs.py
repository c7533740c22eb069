"""What serving a request would cost a site: the facts behind its policy's rules about steps, size and epsilon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from silotune.errors import PrivacyError
from silotune.federation.kinds import KINDS
from silotune.federation.site import noised_sum
from silotune.federation.site.admission import Facts
from silotune.federation.site.ledger import cost_of, kept_noise
from silotune.federation.site.secure_sum import terms_of
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import read_body
from silotune.federation.wire.orders import TrainOrder
from silotune.federation.wire.signed_job import WITHIN
from silotune.privacy.accountant import Spend
from silotune.privacy.ledger import entry
from silotune.settings.limits import privacy_faults
from silotune.settings.sections import EvaluationSection, RecordSection
from silotune.structs import Request
from silotune.tensors import count
from silotune.training.local import steps_in_round
from silotune.training.release import release_of


def facts_of(site: Site, request: Request) -> Facts:
    """What serving a request would cost, but for privacy."""
    values = count(site.initial or request.tensors)
    if not KINDS[request.kind].trains:
        return Facts(values)
    return Facts(values, steps_in_round(len(site.examples), _order(request).training))


def priced(site: Site, request: Request, delta: float) -> tuple[float, float] | None:
    """Epsilon of the request's run and of all runs of the site, once the request is served.

    Args:
        site: Whose ledger counts.
        request: What is asked.
        delta: The site's own: with that of the run, the run would say what an epsilon means.

    Returns:
        None where no update is sent, or the site adds no noise: then nothing bounds what is given away.

    Raises:
        PrivacyError: The request's settings do not go together under its guarantee.
    """
    if not KINDS[request.kind].sends_update or not site.examples:
        return None
    order = _order(request)
    if not order.privacy.dp.costs_sites:
        return None
    faults = privacy_faults(order.privacy, order.federation, order.training, EvaluationSection(), RecordSection())
    if faults:
        raise PrivacyError(faults[0])
    spend = _release(site, order)
    if spend is None:
        return None
    new = entry(order.run, request.round_number, spend)
    return cost_of(site.name, site.state, site.budget, new, delta=delta, accountant=order.privacy.guarantee.accountant)


def _order(request: Request) -> TrainOrder:
    within = request.body.get(WITHIN)
    return read_body(TrainOrder, replace(request, body=within) if isinstance(within, Mapping) else request)


def _release(site: Site, order: TrainOrder) -> Spend | None:
    """What the update gives away; of noise in shares, as the terms say that every site of the sum has signed."""
    if order.privacy.dp.is_at_site:
        noise = kept_noise(site.state)
        return release_of(
            order.privacy, order.training, num_examples=len(site.examples), rounds=order.rounds, noise=noise
        )
    terms = terms_of(site)
    return None if terms is None else noised_sum.price_of(terms)
