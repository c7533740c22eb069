"""The modes of a run as federations of different clients, so that one loop serves all and only the data differ.

``federated``: every institution is a client. ``centralized``: one client holds everybody's examples; where there is one
institution alone, it has that one's name, and so its seeds: FedAvg of one client is central training, bit for bit.
``isolated``: as many federations as institutions, each with that institution alone. All start from the same
adapter, see the same examples, and do the same number of optimiser steps in total. The settings that the clients of
each mode get follow from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.experiment.budget import lone_training, pooled_training
from silotune.experiment.exposure import Exposed, exposed_by, exposure_lines
from silotune.experiment.prepare import Prepared
from silotune.federation.coordinator.rounds import Plan, exchange
from silotune.federation.kinds import EVALUATE, LEAKAGE
from silotune.federation.wire.run_setup import RunSettings, check_scorable
from silotune.federation.wire.transport import Transport
from silotune.methods.algorithms import method, plain
from silotune.settings.attacks import NoAttack
from silotune.settings.links import CompressionSection, DownloadSection
from silotune.settings.privacy import NoProtection
from silotune.settings.sections import BudgetSection, FederationSection, TrainingSection
from silotune.structs import Reply, Request, Tensors
from silotune.training.encode import Encoded


@dataclass(frozen=True)
class Part:
    """One run of rounds: its place in the run folder, its clients, and their settings.

    ``text_bytes`` is what the mode sends outside of messages: the examples themselves, when they are pooled.
    """

    mode: str
    names: tuple[str, ...]
    clients: Mapping[str, Sequence[Encoded]]
    training: TrainingSection
    clients_per_round: int | None = None
    text_bytes: int = 0

    @property
    def sends_updates(self) -> bool:
        """Whether adapter tensors travel between institutions."""
        return self.mode == "federated"


def _federated(prepared: Prepared) -> list[Part]:
    sampled = prepared.config.federation.clients_per_round
    return [Part("federated", ("federated",), prepared.clients, prepared.config.training, sampled)]


def _centralized(prepared: Prepared) -> list[Part]:
    pooled = [example for examples in prepared.clients.values() for example in examples]
    settings = pooled_training(prepared.config, tuple(prepared.sizes.values()))
    name = next(iter(prepared.clients)) if len(prepared.clients) == 1 else "pooled"
    return [Part("centralized", ("centralized",), {name: pooled}, settings, text_bytes=prepared.text_bytes)]


def _isolated(prepared: Prepared) -> list[Part]:
    return [
        Part("isolated", ("isolated", name), {name: examples}, lone_training(prepared.config))
        for name, examples in prepared.clients.items()
    ]


MODES: Mapping[str, Callable[[Prepared], list[Part]]] = {
    "federated": _federated,
    "isolated": _isolated,
    "centralized": _centralized,
}


def federation_of(prepared: Prepared, part: Part) -> FederationSection:
    """The ``[federation]`` section of a part: where nothing travels, one client trains all of the adapter, plainly."""
    federation = prepared.config.federation
    if part.sends_updates:
        return federation
    alone = {
        "upload": CompressionSection(),
        "download": DownloadSection(),
        "clock": None,
        "budget": BudgetSection(),
        "attack": NoAttack(),
    }
    return plain(federation).model_copy(update=alone)


def trained_of(prepared: Prepared, section: FederationSection) -> Tensors:
    """The adapter's tensors that move in any round."""
    both = [method(section).schedule(number) for number in (1, 2)]
    return {name: value for name, value in prepared.initial.items() if any(parts.trains(name) for parts in both)}


def exposed_of(prepared: Prepared) -> Exposed | None:
    """What updates of the federated mode show of what the model reads; None where all weights are trained."""
    if prepared.config.adapter.is_whole:
        return None
    return exposed_by(trained_of(prepared, prepared.config.federation))


def forecast_of(prepared: Prepared) -> list[str]:
    """What the run's updates can show, beside how many distinct tokens its clients hold."""
    held = {
        name: len({token for example in examples for token in (*example.prompt, *example.answer)})
        for name, examples in prepared.clients.items()
    }
    return exposure_lines(prepared.config, exposed_of(prepared), held)


def settings_of(prepared: Prepared, part: Part) -> RunSettings:
    """The settings that the clients of a part act by; they score their own examples as the gold-standard set is
    scored. Where nothing travels, there is no sum to hide an update in."""
    config, federation = prepared.config, federation_of(prepared, part)
    alone = config.privacy.model_copy(update={"protection": NoProtection()})
    privacy = config.privacy if part.sends_updates else alone
    return RunSettings(part.training, federation, privacy, config.evaluation, tuple(prepared.gold.labels))


def leaked_by_clients(
    plan: Plan, transport: Transport, weights: Tensors, round_number: int
) -> dict[str, Mapping[str, Any]]:
    """What the model gives away of each client's examples, as the client measures it; it stands in the trail, too."""
    requests = {name: Request(LEAKAGE, round_number, name, weights, plan.body) for name in transport.clients()}
    replies = exchange(plan, transport, requests)
    return {
        reply.client: dict(reply.body) if isinstance(reply, Reply) else {"failed": reply.reason} for reply in replies
    }


def scored_by_clients(
    plan: Plan, transport: Transport, weights: Tensors, round_number: int
) -> dict[str, Mapping[str, Any]]:
    """Scores of the model on each client's own examples; the requests stand in the audit trail, as all others.

    Raises:
        ConfigError: The task has more options, or longer ones, than clients score over.
    """
    check_scorable(plan.settings.labels)
    requests = {name: Request(EVALUATE, round_number, name, weights, plan.body) for name in transport.clients()}
    replies = exchange(plan, transport, requests)
    return {
        reply.client: dict(reply.body) if isinstance(reply, Reply) else {"failed": reply.reason} for reply in replies
    }
