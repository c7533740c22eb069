"""Which clients take part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence

from silotune.errors import FederationError
from silotune.seeds import derive


def sample_clients(clients: Sequence[str], count: int | None, *, seed: int, round_number: int) -> tuple[str, ...]:
    """A uniform sample without replacement, in the order of ``clients``; all of them when ``count`` is None.

    Raises:
        FederationError: More clients are asked for than there are.
    """
    if count is None or count == len(clients):
        return tuple(clients)
    if count > len(clients):
        raise FederationError(
            f"federation.clients_per_round = {count}, but there are {len(clients)} clients; ask for at most that many"
        )
    generator = random.Random(derive(seed, "sample-clients", round_number=round_number))  # noqa: S311
    chosen = set(generator.sample(range(len(clients)), count))
    return tuple(name for place, name in enumerate(clients) if place in chosen)


def offered_clients(clients: Sequence[str], count: int | None, *, seed: int, round_number: int) -> tuple[str, ...]:
    """All clients, in the order in which an asynchronous round offers them work; ``count`` bounds those at work."""
    generator = random.Random(derive(seed, "sample-clients", round_number=round_number))  # noqa: S311
    return tuple(generator.sample(list(clients), len(clients)))
