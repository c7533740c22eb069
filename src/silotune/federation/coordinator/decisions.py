"""What becomes of a round with fewer usable replies than ``federation.min_replies``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from silotune.errors import BudgetError, FederationError
from silotune.federation.coordinator.privacy import over_budget
from silotune.structs import Observer

MOST_TRIES = 20
"""Of one round, with ``below_minimum = 'wait'``; each is bounded by ``timeout_seconds``."""


class TooFewRepliesError(FederationError):
    """A round with fewer usable replies than it needs; ``incoming`` holds what came and what did not."""

    def __init__(self, message: str, incoming: Any) -> None:
        super().__init__(message)
        self.incoming = incoming


def _stop(error: TooFewRepliesError, number: int, tries: int, notify: Observer) -> bool:
    raise error


def _wait(error: TooFewRepliesError, number: int, tries: int, notify: Observer) -> bool:
    """The same round again: sites that answered do their work once more, to the same bits.

    Raises:
        BudgetError: A client's budget does not allow the round, nor will it later; each try costs the others.
        FederationError: It was tried often enough.
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
    """The same round again without the clients that made it fail, whatever else a round with too few replies does.

    Each such try leaves out one more, so there are no more of them than clients.
    """
    names = ", ".join(map(repr, sorted(error.incoming.excluded)))
    notify("note", {"text": f"round {number} is done again without {names}: {error}"})
    return False


SHORTFALLS: Mapping[str, Callable[[TooFewRepliesError, int, int, Observer], bool]] = {
    "stop": _stop,
    "wait": _wait,
    "skip": _skip,
}
"""``federation.below_minimum`` -> (error, round, tries, observer) to whether the round is passed over; may raise."""
