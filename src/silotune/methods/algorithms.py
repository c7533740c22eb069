"""The table of federated algorithms: each name is a combination of small values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from silotune.methods.aggregate import weighted_mean
from silotune.methods.corrections import Correction, proximal
from silotune.methods.server_step import ServerStep, plain_step
from silotune.sections import Algorithm, FederationSection
from silotune.structs import ClientUpdate, Tensors


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        aggregate: Updates, one at a time, to one delta.
        step: Weights, delta and memory to new weights and memory.
        correction: Term added to a client's gradient; None for no term.
    """

    aggregate: Callable[[Iterable[ClientUpdate]], Tensors]
    step: ServerStep
    correction: Correction | None = None


def _fedavg(section: FederationSection) -> Method:
    """McMahan et al. 2017: example-weighted mean, plain step."""
    return Method(weighted_mean, plain_step(section.server_learning_rate))


def _fedprox(section: FederationSection) -> Method:
    """Li et al. 2020: FedAvg whose clients are pulled towards the received model."""
    return Method(weighted_mean, plain_step(section.server_learning_rate), proximal(section.proximal_mu))


ALGORITHMS: Mapping[Algorithm, Callable[[FederationSection], Method]] = {
    "fedavg": _fedavg,
    "fedprox": _fedprox,
}
"""Name -> builder; the names are those of ``sections.Algorithm`` (a test compares them)."""


def method(section: FederationSection) -> Method:
    """The method that a ``[federation]`` section names."""
    return ALGORITHMS[section.algorithm](section)
