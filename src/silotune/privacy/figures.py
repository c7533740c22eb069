"""What a client reports of its round, as integers that are summed with its update, so that the coordinator sees no
client's own figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from silotune.errors import ProtectionError
from silotune.privacy.ring import Integers, signed

_FINE = 1 << 20
FIGURES: Mapping[str, int] = {
    "num_examples": 1,
    "weight": 1,
    "with_loss": 1,
    "weighted_loss": _FINE,
    "steps": 1,
    "tokens": 1,
    "timed": 1,
    "seconds": _FINE,
    "core_seconds": _FINE,
    "joules": _FINE,
    "measured": 1,
    "estimated": 1,
    "clipped": 1,
}
"""Figure -> integers a unit."""
FIGURE_BITS = 64


def to_integers(
    report: Mapping[str, Any], *, clipped: int, clients: int, weight: int | None = None, bits: int = FIGURE_BITS
) -> Integers:
    """The figures of a ``train`` reply's body as integers of the ring [figures].

    Args:
        report: num_examples, loss, steps, tokens, seconds, core_seconds, joules, energy_source; None where a client
            withholds one.
        clipped: Values of the update beyond the bound.
        clients: At most so many are added up.
        weight: What the update counts in the sum; None for its examples.
        bits: That the sum may take, its sign among them.

    Raises:
        ProtectionError: A figure is so large that the sum could wrap.
    """
    source = report["energy_source"] if report["joules"] is not None else "unavailable"
    has_loss, is_timed = report["loss"] is not None, None not in (report["seconds"], report["core_seconds"])
    values = {
        **{name: report[name] or 0 for name in ("num_examples", "steps", "tokens")},
        **{name: report[name] or 0.0 for name in ("seconds", "core_seconds", "joules")},
        "weight": report["num_examples"] if weight is None else weight,
        "with_loss": report["num_examples"] if has_loss else 0,
        "weighted_loss": report["loss"] * report["num_examples"] if has_loss else 0.0,
        "timed": is_timed,
        "measured": source == "measured",
        "estimated": source == "estimated",
        "clipped": clipped,
    }
    made = [round(values[name] * unit) for name, unit in FIGURES.items()]
    if any(abs(value) > ((1 << (bits - 1)) - 1) // clients for value in made):
        raise ProtectionError("a figure of this round is too large to be summed under protection")
    return np.array(made, np.int64).view("<u8")


@dataclass(frozen=True)
class Limits:
    """What a sum of figures can be.

    Attributes:
        clients: In the sum.
        max_examples: Most that a client weighs, and has, unless it ``is_capped``.
        size: Values of an update.
        is_capped: A client with more examples weighs ``max_examples``.
    """

    clients: int
    max_examples: int
    size: int
    is_capped: bool = False


def impossible(what: str) -> ProtectionError:
    """The error for a sum that honest sites cannot have made. It names no site, since the sum hides who sent what."""
    return ProtectionError(
        f"the opened sum cannot be true: {what}; the protected input of one of its sites is false, "
        "and nobody can tell which"
    )


def from_integers(total: Integers, limits: Limits) -> dict[str, Any]:
    """The figures of all clients together: sums, and the loss as a mean over examples.

    Times and joules are None where any client did not say its own, the loss where none did; ``clipped`` counts values
    that were cut off, ``weight`` is what the sum of the updates is to be divided by.

    Raises:
        ProtectionError: Honest clients cannot have sent figures with this sum.
    """
    sums = {name: int(value) / unit for (name, unit), value in zip(FIGURES.items(), signed(total), strict=True)}
    clients = limits.clients
    _check_possible(sums, limits)
    known = sums["measured"] + sums["estimated"] == clients
    source = "measured" if sums["measured"] == clients else "estimated" if known else "unavailable"
    return {
        **{name: int(sums[name]) for name in ("num_examples", "weight", "steps", "tokens", "clipped")},
        **{name: sums[name] if sums["timed"] == clients else None for name in ("seconds", "core_seconds")},
        "loss": sums["weighted_loss"] / sums["with_loss"] if sums["with_loss"] else None,
        "joules": sums["joules"] if known else None,
        "energy_source": source,
    }


def _check_possible(sums: Mapping[str, float], limits: Limits) -> None:
    """Raises ``ProtectionError`` where no honest clients can have sent these sums."""
    clients, examples = limits.clients, sums["num_examples"]
    most_nats = math.inf if sums["with_loss"] else 0
    between: dict[str, tuple[float, float]] = {
        "num_examples": (clients, math.inf if limits.is_capped else clients * limits.max_examples),
        "weight": (clients if limits.is_capped else examples, min(examples, clients * limits.max_examples)),
        "with_loss": (0, examples),
        "weighted_loss": (-most_nats, most_nats),
        "steps": (clients, math.inf),
        "clipped": (0, clients * limits.size),
        **dict.fromkeys(("timed", "measured"), (0, clients)),
        "estimated": (0, clients - sums["measured"]),
        **dict.fromkeys(("tokens", "seconds", "core_seconds", "joules"), (0, math.inf)),
    }
    for name, (least, most) in between.items():
        if not least <= sums[name] <= most:
            raise impossible(f"its {name} is {sums[name]:g}, and {clients} sites send {least:g} to {most:g}")
