"""Simulated clients that work against the others, to see what an aggregation rule withstands.

This is for simulations in one process only: no request mentions an attack, so no client of a deployment can be told to
    attack.
An attack changes an update after its client has made it. With flipped labels, the client trains on wrong labels, and
its update is then made larger, as in model replacement (Bagdasaryan et al. 2020).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from silotune.errors import ConfigError
from silotune.federation.wire.transport import Transport
from silotune.seeds import derive
from silotune.settings.attacks import AttackSettings, Malicious
from silotune.structs import Failure, Reply, Request, SiteState
from silotune.tensors import scale
from silotune.training.encode import Encoded


def attackers(section: AttackSettings, clients: Sequence[str], *, seed: int) -> frozenset[str]:
    """The malicious clients, drawn by the run's seed; none without an attack.

    Raises:
        ConfigError: No honest client would be left.
    """
    if not isinstance(section, Malicious):
        return frozenset()
    if section.clients >= len(clients):
        raise ConfigError(
            f"federation.attack.clients = {section.clients} leaves no honest one of {len(clients)} clients"
        )
    generator = random.Random(derive(seed, "attack"))  # noqa: S311
    return frozenset(generator.sample(sorted(clients), section.clients))


def with_flipped_labels(examples: Sequence[Encoded], num_classes: int) -> list[Encoded]:
    """The examples, each with the next class's label, the first one's after the last.

    Args:
        examples: Of one client.
        num_classes: Of a classifier; 0 where the examples have options.

    Raises:
        ConfigError: An example has no label.
    """
    return [_flipped(example, num_classes) for example in examples]


def _flipped(example: Encoded, num_classes: int) -> Encoded:
    number = num_classes or len(example.options)
    if example.label < 0 or number < 2:
        raise ConfigError("federation.attack = 'label-flip' needs a closed-ended task: use another attack")
    label = (example.label + 1) % number
    if not example.options:
        return replace(example, label=label)
    end = example.answer[len(example.options[example.label]) :]  # the end of sequence, where the option has none
    return replace(example, label=label, answer=(*example.options[label], *end))


class Simulated(Transport, Protocol):
    """A transport whose clients live in this process, so that their states can be restored."""

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept; those not named start afresh."""


@dataclass(frozen=True)
class Attacked:
    """A transport in one process, some of whose clients change their updates before anybody sees them."""

    inner: Simulated
    section: Malicious
    malicious: frozenset[str]

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""
        return self.inner.clients()

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, as they arrive."""
        factor = self.section.sign * self.section.factor

        def changed(reply: Reply | Failure) -> Reply | Failure:
            if isinstance(reply, Failure) or reply.client not in self.malicious:
                return reply
            return replace(reply, tensors=scale(reply.tensors, factor))

        return map(changed, self.inner.exchange(requests, timeout_seconds=timeout_seconds))

    def states(self) -> dict[str, SiteState]:
        """What every client keeps between rounds."""
        return self.inner.states()

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept; those not named start afresh."""
        self.inner.restore(states)
