"""How clients' updates become one delta: what each counts, the weighted mean, and what can be put around a rule.

A rule takes updates as they arrive and gives one delta. Those in this file keep nothing of an update; the rules in
``robust`` that must see all updates at once say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from silotune.errors import FederationError
from silotune.methods.products import Weigh
from silotune.settings.aggregation import QFFL, ByExamples, Capped, Uniform, WeightingSettings
from silotune.structs import ClientUpdate, Tensors
from silotune.tensors import check_alike, put_under, scale, taken_from, without

Rule: TypeAlias = Callable[[Iterable[ClientUpdate]], Tensors]

CONTROL = "control"
"""Group of the tensors that a method sends beside the adapter's, in requests and in replies: ``control/<name>``."""
COUNTED = "counted"
"""Name of what a round's updates count in all, [1] in float64, beside the delta of a method that keeps a mean over all
clients."""
_CHUNK = 1 << 17
"""Values that are turned to float64 at one time: they stay in the processor's cache."""


class RunningMean:
    """A weighted mean of tensors that come one by one; sums are kept in float64, nothing else is kept.

    Besides the sums (two float32 updates in size) it needs memory for some thousand values.
    """

    def __init__(self) -> None:
        self._total: Tensors = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._scratch: Tensors = {}
        self._weight = 0.0

    def add(self, tensors: Tensors, weight: float) -> None:
        """Counts ``tensors`` with ``weight``.

        Raises:
            MessageError: Names or shapes are not those of the first ones.
        """
        if not self._dtypes:
            self._begin(tensors)
        check_alike(self._total, tensors)
        for name, total in self._total.items():
            scratch = self._scratch[name]
            if scratch.shape == total.shape:
                total.add_(scratch.copy_(tensors[name]), alpha=weight)
            else:
                pieces = tensors[name].reshape(-1).split(_CHUNK)
                for part, values in zip(total.view(-1).split(_CHUNK), pieces, strict=True):
                    part.add_(scratch[: len(values)].copy_(values), alpha=weight)
        self._weight += weight

    def _begin(self, tensors: Tensors) -> None:
        """Sums of zero, and for each device one buffer; every tensor that fits in it has its view, made once."""
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        buffers: dict[torch.device, torch.Tensor] = {}
        for name, tensor in tensors.items():
            self._total[name] = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
            if tensor.device not in buffers:
                buffers[tensor.device] = torch.empty(_CHUNK, dtype=torch.float64, device=tensor.device)
            buffer = buffers[tensor.device]
            fits = tensor.numel() <= _CHUNK
            self._scratch[name] = buffer[: tensor.numel()].view(tensor.shape) if fits else buffer

    def result(self) -> Tensors:
        """The mean, in the dtypes of the first tensors; the sums are used up.

        Raises:
            FederationError: Nothing was added, or the weights sum to zero.
        """
        if self._weight <= 0:
            raise FederationError("there is nothing to aggregate: no update with at least one example")
        names = list(self._total)
        return {name: self._total.pop(name).div_(self._weight).to(self._dtypes[name]) for name in names}


def weighted_mean(updates: Iterable[ClientUpdate]) -> Tensors:
    """Mean of the deltas by what each counts (McMahan et al. 2017, Algorithm 1); keeps no update.

    Raises:
        FederationError: There is no update, or the weights sum to zero.
        MessageError: Names or shapes differ between updates.
    """
    mean = RunningMean()
    for update in updates:
        mean.add(update.delta, update.counts)
        del update  # otherwise it would stay in memory until the next one arrives
    return mean.result()


def per_step(rule: Rule) -> Rule:
    """A rule over updates made equal in local work, scaled back by the mean work (FedNova).

    Wang et al. 2020, equation 5, with a_i = (1, ..., 1), the case of plain local steps: the mean of delta_i / steps_i
    times the weighted mean of the steps. Steps are taken relative to those of the first update, so that equal work
    changes no bit.
    """

    def aggregate(updates: Iterable[ClientUpdate]) -> Tensors:
        first, work, weight = 0, 0.0, 0.0

        def normalised(update: ClientUpdate) -> ClientUpdate:
            nonlocal first, work, weight
            first = first or update.steps
            relative = update.steps / first
            work, weight = work + update.counts * relative, weight + update.counts
            return update if relative == 1 else replace(update, delta=scale(update.delta, 1 / relative))

        delta = rule(map(normalised, updates))  # a generator would hold each update until the next one is there
        return delta if work == weight else scale(delta, work / weight)

    return aggregate


def beside_counts(rule: Rule) -> Rule:
    """A rule that also says what the updates count in all, for a mean over all clients (SCAFFOLD, FedDyn)."""

    def aggregate(updates: Iterable[ClientUpdate]) -> Tensors:
        total = 0.0

        def counted(update: ClientUpdate) -> ClientUpdate:
            nonlocal total
            total += update.counts
            return update

        delta = rule(map(counted, updates))
        return {**delta, COUNTED: torch.tensor([total], dtype=torch.float64)}

    return aggregate


def beside_controls(rule: Rule) -> Rule:
    """A rule over the adapter's tensors; the change of the control, sent beside them, is a weighted mean (SCAFFOLD).

    Karimireddy et al. 2020, Algorithm 1, line 17, where all clients count the same. Here a client's control counts what
    its update counts, so that both are of one objective.
    """

    def aggregate(updates: Iterable[ClientUpdate]) -> Tensors:
        controls = RunningMean()

        def split(update: ClientUpdate) -> ClientUpdate:
            controls.add(taken_from(CONTROL, update.delta), update.counts)
            return replace(update, delta=without(CONTROL, update.delta))

        delta = rule(map(split, updates))
        return {**delta, **put_under(CONTROL, controls.result())}

    return aggregate


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
