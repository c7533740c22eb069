"""What a client's update counts in a weighted mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from silotune.errors import FederationError
from silotune.methods.aggregate import Rule
from silotune.methods.products import Weigh
from silotune.settings.aggregation import QFFL, ByExamples, Capped, Uniform, WeightingSettings
from silotune.structs import ClientUpdate, Tensors

_LEAST_LOSS = 1e-10


def _by_examples(settings: ByExamples) -> Weigh:
    """The client's examples (McMahan et al. 2017)."""
    return lambda update: update.num_examples


def _uniform(settings: Uniform) -> Weigh:
    """Every client the same."""
    return lambda update: 1.0


def _q_ffl(settings: QFFL) -> Weigh:
    """Examples times loss^q: a client that is served worse counts for more (q-FFL, Li et al. 2020, equation 2).

    The gradient of q-FFL's objective weighs a client's gradient by p_k F_k^q. F_k is the client's mean training loss
    over its round, in place of that of the received model, which would take another pass. The weights are made to
    sum to one; the step size that q-FedAvg estimates from the updates' norms is left to the server's learning rate.
    """

    def weigh(update: ClientUpdate) -> float:
        loss = max(_loss_of(update), _LEAST_LOSS)
        try:
            return float(update.num_examples * loss**settings.fairness_q)
        except OverflowError:
            power = f"federation.weighting.fairness_q = {settings.fairness_q:g}"
            raise FederationError(
                f"client {update.client!r} reported a loss of {loss:.3g}: too large for {power}"
            ) from None

    return weigh


def _loss_of(update: ClientUpdate) -> float:
    if update.loss is None:
        raise FederationError(
            f"client {update.client!r} withholds its loss, which federation.weighting = 'q-ffl' needs"
        )
    return update.loss


def _capped(settings: Capped) -> Weigh:
    """Examples, up to a cap (McMahan et al. 2018, w_k = min(n_k / cap, 1)): bounds what one client can say."""
    return lambda update: min(update.num_examples, settings.cap)


WEIGHTINGS: Mapping[type[WeightingSettings], Callable[[Any], Weigh]] = {
    ByExamples: _by_examples,
    Uniform: _uniform,
    QFFL: _q_ffl,
    Capped: _capped,
}
"""Settings -> builder of what an update weighs."""


def weighed(rule: Rule, weigh: Weigh) -> Rule:
    """The rule over updates that count what ``weigh`` says."""

    def aggregate(updates: Iterable[ClientUpdate]) -> Tensors:
        return rule(map(lambda update: replace(update, weight=weigh(update)), updates))

    return aggregate
