"""What a coordinator decides: who takes part in a round, what becomes of one that falls short, when a run ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from silotune.errors import BudgetError, FederationError
from silotune.federation.coordinator.privacy import over_budget
from silotune.seeds import derive
from silotune.settings.sections import BudgetSection
from silotune.structs import Observer, ServerState

MOST_TRIES = 20
"""The most tries of one round under ``below_minimum = 'wait'``; ``timeout_seconds`` bounds each of them."""


class TooFewRepliesError(FederationError):
    """A round had fewer usable replies than it needs; ``incoming`` holds its replies and its failures."""

    def __init__(self, message: str, incoming: Any) -> None:
        super().__init__(message)
        self.incoming = incoming


def _stop(error: TooFewRepliesError, number: int, tries: int, notify: Observer) -> bool:
    raise error


def _wait(error: TooFewRepliesError, number: int, tries: int, notify: Observer) -> bool:
    """Asks for the same round again: sites that answered repeat their work, with bit-identical results.

    Raises:
        BudgetError: A client's budget does not allow the round and never will, while each try costs the other clients.
        FederationError: The round was tried ``MOST_TRIES`` times.
    """
    for failure in over_budget(error.incoming.failures)[:1]:
        raise BudgetError(
            f"round {number} waits in vain for {failure.client!r}, whose privacy budget does not allow it: "
            f"{failure.reason}"
        ) from error
    if tries >= MOST_TRIES:
        raise FederationError(f"round {number} was tried {tries} times: {error}") from error
    notify("round_waits", {"round": number, "tries": tries, "reason": str(error)})
    return False


def _skip(error: TooFewRepliesError, number: int, tries: int, notify: Observer) -> bool:
    return True


def again_without_liars(error: TooFewRepliesError, number: int, tries: int, notify: Observer) -> bool:
    """Asks for the same round again without the clients that made it fail, whatever ``below_minimum`` says.

    Each such try leaves out at least one client more, so there are no more tries than clients.
    """
    names = ", ".join(map(repr, sorted(error.incoming.excluded)))
    notify("note", {"text": f"round {number} is done again without {names}: {error}"})
    return False


SHORTFALLS: Mapping[str, Callable[[TooFewRepliesError, int, int, Observer], bool]] = {
    "stop": _stop,
    "wait": _wait,
    "skip": _skip,
}
"""``federation.below_minimum`` -> function of (error, round, tries, observer) that says whether the round is skipped,
or raises."""


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


def note_of_still(clients: Sequence[str]) -> str:
    """What is said of clients whose updates move nothing, in a run that goes on."""
    names = ", ".join(map(repr, clients))
    return f"the update of {names} holds zeros alone: {_STILL}"


_STILL = "there is nothing left to learn, or training.learning_rate is too small to be felt"


def why_stop(
    before: ServerState, after: ServerState, *, target: float | None, budget: BudgetSection, is_still: bool = False
) -> str:
    """Why the run stops after a round; empty where it goes on.

    The run stops when another round like this one would pass a budget. Only the cost of the first round is not known
    beforehand.

    Args:
        before: The state before the round.
        after: The state after it.
        target: Selection metric that is good enough, the higher the better; None for none.
        budget: What the rounds may spend.
        is_still: Whether all clients took part, no update moved anything, and the model is as it was before the round.
    """
    if is_still:
        return f"no client's update moved the model: {_STILL}"
    if target is not None and after.best_metric is not None and after.best_metric >= target:
        return f"the selection metric reached evaluation.target = {abs(target):g}"
    spent, before_it = after.bytes_up + after.bytes_down, before.bytes_up + before.bytes_down
    if budget.bytes is not None and 2 * spent - before_it > budget.bytes:
        return f"another round would pass federation.budget.bytes = {budget.bytes}: {spent} are spent"
    if budget.joules is None:
        return ""
    if after.joules is None or before.joules is None:
        return "a client's joules are not known, so federation.budget.joules cannot be kept"
    if 2 * after.joules - before.joules > budget.joules:
        return f"another round would pass federation.budget.joules = {budget.joules:g}: {after.joules:.0f} are spent"
    return ""
