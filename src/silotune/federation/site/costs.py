"""What serving a request costs a site: the facts behind its policy's rules about steps, size and epsilon, and the bound
on the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

from silotune.errors import PolicyError, PrivacyError
from silotune.federation.kinds import KINDS
from silotune.federation.site import noised_sum
from silotune.federation.site.admission import Facts
from silotune.federation.site.ledger import cost_of, kept_noise
from silotune.federation.site.secure_sum import terms_of
from silotune.federation.site.state import Site
from silotune.federation.wire.orders import read_order
from silotune.privacy.accountant import Spend
from silotune.privacy.ledger import entry
from silotune.settings.limits import faults
from silotune.settings.sections import Sections
from silotune.structs import Request
from silotune.tensors import count
from silotune.training.local import steps_in_round
from silotune.training.release import release_of

Item = TypeVar("Item")


def facts_of(site: Site, request: Request) -> Facts:
    """What serving a request would cost, but for privacy."""
    values = count(site.initial or request.tensors)
    if not KINDS[request.kind].trains:
        return Facts(values)
    return Facts(values, steps_in_round(len(site.examples), site.settings.training))


def priced(site: Site, request: Request, delta: float) -> tuple[float, float] | None:
    """Epsilon of the request's run and of all runs of the site, once the request is served.

    Args:
        site: Whose ledger counts.
        request: What is asked.
        delta: The site's own. A delta of the run's choice would let the run decide what an epsilon means.

    Returns:
        None where no update is sent, or where the site adds no noise, so that nothing bounds what is given away.

    Raises:
        PrivacyError: The request's settings do not go together under its guarantee.
    """
    if not KINDS[request.kind].sends_update or not site.examples:
        return None
    settings = site.settings
    privacy = settings.privacy
    if not privacy.dp.costs_sites:
        return None
    asked = Sections(privacy=privacy, federation=settings.federation, training=settings.training)
    if found := faults(asked, "guarantees"):
        raise PrivacyError(found[0])
    spend = _release(site)
    if spend is None:
        return None
    new = entry(read_order(request).run, request.round_number, spend)
    return cost_of(site.name, site.state, site.budget, new, delta=delta, accountant=privacy.guarantee.accountant)


class Timed(Sequence[Item], Generic[Item]):
    """A sequence that raises once its time is over; every batch of training and of scoring takes its examples from it.

    Args:
        items: The sequence.
        seconds: From now on.
        clock: Seconds that only grow.
    """

    def __init__(self, items: Sequence[Item], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._items, self._seconds, self._clock = items, seconds, clock
        self._end = clock() + seconds

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        if self._clock() > self._end:
            raise PolicyError("most_seconds", f"the work took longer than {self._seconds:g} s and was broken off")
        return self._items[place]


def _release(site: Site) -> Spend | None:
    """What the update gives away; for noise in shares, by the terms that every site of the sum has signed."""
    settings = site.settings
    if settings.privacy.dp.is_at_site:
        rounds, noise = settings.federation.rounds, kept_noise(site.state)
        return release_of(
            settings.privacy, settings.training, num_examples=len(site.examples), rounds=rounds, noise=noise
        )
    terms = terms_of(site)
    return None if terms is None else noised_sum.price_of(terms)
