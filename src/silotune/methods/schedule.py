"""Which tensors of an adapter train, go up and go down in a round: values that a method is combined with.

Everything else of an adapter is either frozen at its first values, which every site draws from the run's seed, or
personal: it is trained, stays with the client, and is found there again in the next round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from silotune.lora import cut, is_a, is_b, is_residual
from silotune.structs import Tensors

Chooses: TypeAlias = Callable[[str], bool]


@dataclass(frozen=True)
class AdapterParts:
    """What becomes of each tensor in one round, by its name.

    Attributes:
        trains: Moves at the clients.
        rises: Its delta is sent to the coordinator.
        descends: The coordinator sends it to the clients.
    """

    trains: Chooses
    rises: Chooses
    descends: Chooses

    def is_personal(self, name: str) -> bool:
        """Whether a tensor is trained and kept by the client."""
        return self.trains(name) and not self.rises(name)


Schedule: TypeAlias = Callable[[int], AdapterParts]
"""``schedule(round_number)``; rounds count from 1."""


def whole(round_number: int) -> AdapterParts:
    """All of the adapter, in every round."""
    return AdapterParts(_all, _all, _all)


def without_a(round_number: int) -> AdapterParts:
    """A stays as it was drawn, at every site the same: B alone is trained and sent (FFA-LoRA, Sun et al. 2024)."""
    return AdapterParts(_not_a, _not_a, _not_a)


def in_turns(round_number: int) -> AdapterParts:
    """B in odd rounds, A in even ones (RoLoRA, Chen et al. 2025).

    Both come down, so that a client that sat out a round needs to remember nothing.
    """
    moving = _not_a if round_number % 2 else _not_b
    return AdapterParts(moving, moving, _all)


def without_own_b(round_number: int) -> AdapterParts:
    """All is trained; B never leaves its client (FedSA-LoRA, Guo et al. 2025)."""
    return AdapterParts(_all, _not_b, _not_b)


def outgoing(weights: Tensors, parts: AdapterParts, rank: int | None = None) -> Tensors:
    """What the coordinator sends of the global model to a client of this rank (None: the adapter's own)."""
    return cut({name: tensor for name, tensor in weights.items() if parts.descends(name)}, rank)


def returned(tensors: Tensors, parts: AdapterParts) -> Tensors:
    """Those of a request's tensors whose delta is to come back: same names, shapes and dtypes."""
    return {name: tensor for name, tensor in tensors.items() if parts.rises(name) and not is_residual(name)}


def _all(name: str) -> bool:
    return True


def _not_a(name: str) -> bool:
    return not is_a(name)


def _not_b(name: str) -> bool:
    return not is_b(name)
