"""The table of federated algorithms: each name is a combination of small values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from silotune.methods.aggregate import weighted_mean
from silotune.methods.corrections import Anchored, Correction, proximal, towards
from silotune.methods.lora_rules import LORA_RULES
from silotune.methods.products import Fold
from silotune.methods.schedule import Schedule, whole
from silotune.methods.server_step import ServerStep, plain_step
from silotune.sections import Algorithm, FederationSection, Personalization
from silotune.structs import ClientUpdate, Tensors


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        aggregate: Updates, one at a time, to one delta.
        step: Weights, delta and memory to new weights and memory.
        correction: Term added to a client's gradient; None for no term.
        schedule: Which parts of the adapter train and travel in a round.
        fold: What a LoRA-aware rule does to the model after the server step; None for nothing.
        personal: Term that pulls a client's own model towards the global one in every round; None for no own model.
    """

    aggregate: Callable[[Iterable[ClientUpdate]], Tensors]
    step: ServerStep
    correction: Correction | None = None
    schedule: Schedule = whole
    fold: Fold | None = None
    personal: Anchored | None = None


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

PERSONAL_TERMS: Mapping[Personalization, Callable[[FederationSection], Anchored | None]] = {
    "none": lambda section: None,
    "ditto": lambda section: towards(section.ditto_lambda),
    "fine-tune": lambda section: None,  # after the last round, not in it
}


def method(section: FederationSection) -> Method:
    """The method that a ``[federation]`` section names."""
    rule = LORA_RULES[section.lora]
    return replace(
        ALGORITHMS[section.algorithm](section),
        schedule=rule.schedule,
        fold=rule.fold,
        personal=PERSONAL_TERMS[section.personalization](section),
    )
