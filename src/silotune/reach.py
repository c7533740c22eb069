"""What cannot be done where clients are not in this process: one table for Ray and for the sites of a deployment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from silotune.settings.sections import (
    AdapterSection,
    DataSection,
    Engine,
    FederationSection,
    PrivacySection,
    TrainingSection,
)

Way = Literal[Engine, "sites"]
"""How clients are reached: an engine, or ``silotune submit`` to sites that are elsewhere."""


class Asked(Protocol):
    """The sections of a run that the table looks at."""

    @property
    def adapter(self) -> AdapterSection: ...
    @property
    def data(self) -> DataSection: ...
    @property
    def training(self) -> TrainingSection: ...
    @property
    def federation(self) -> FederationSection: ...
    @property
    def privacy(self) -> PrivacySection: ...


@dataclass(frozen=True)
class Limit:
    """Something that a run may ask for, where it cannot be done, and why.

    Attributes:
        what: The settings, as they are written.
        ways: Where it cannot be done.
        why: In one line, with what to do.
        is_asked: Whether a run asks for it.
    """

    what: str
    ways: tuple[Way, ...]
    why: str
    is_asked: Callable[[Asked], bool]


def limits(way: Way, run: Asked) -> list[str]:
    """What of a run cannot be done this way, one line each."""
    return [f"{limit.what}: {limit.why}" for limit in LIMITS if way in limit.ways and limit.is_asked(run)]


def _has_simulated_pace(run: Asked) -> bool:
    """Whether a clock is set for more than how a round ends."""
    clock = run.federation.clock
    if clock is None:
        return False
    plain = type(clock)(over_sampling=clock.over_sampling, deadline_seconds=clock.deadline_seconds)
    return clock != plain


def _needs_start_at_sites(run: Asked) -> bool:
    is_kept = run.federation.lora != "factors" or run.training.objective in ("dpo", "kto")
    return run.adapter.start is not None and is_kept


LIMITS: tuple[Limit, ...] = (
    Limit(
        "federation.modes",
        ("sites",),
        "must name 'federated' to be submitted: sites' examples are not pooled",
        lambda run: "federated" not in run.federation.modes,
    ),
    Limit(
        "federation.attack",
        ("ray", "sites"),
        "attacks are simulated in one process: leave it out, or use 'silotune run' with engine = 'in_process'",
        lambda run: run.federation.attack.kind != "none",
    ),
    Limit(
        "federation.clock",
        ("ray",),
        "a clock is simulated in one process: leave it out, or use engine = 'in_process'",
        lambda run: run.federation.clock is not None,
    ),
    Limit(
        "federation.clock",
        ("sites",),
        "sites take real time: of this section only over_sampling and deadline_seconds, which is real seconds here",
        _has_simulated_pace,
    ),
    Limit(
        "federation.personalization, or lora = 'share-a'",
        ("ray", "sites"),
        "a client's own model stays where it is trained, and is not scored there: use 'silotune run' with engine = "
        "'in_process'",
        lambda run: run.federation.personalization != "none" or run.federation.lora == "share-a",
    ),
    Limit(
        "privacy.protection",
        ("ray",),
        "the secrets of a sum lie in one process's memory, and Ray's actors share their clients: use engine = "
        "'in_process'",
        lambda run: run.privacy.protection != "none",
    ),
    Limit(
        "federation.policies",
        ("sites",),
        "the sites' policies are at the sites: give federation.ranks or memory_mb",
        lambda run: bool(run.federation.policies),
    ),
    Limit(
        "privacy.ledger",
        ("sites",),
        "every site keeps a ledger of its own over all runs: leave it out",
        lambda run: run.privacy.ledger is not None,
    ),
    Limit(
        "federation.weighting = 'capped' with privacy.dp = 'client'",
        ("sites",),
        "the noise depends on the sites' numbers of examples, which are known only when they reply: use 'uniform'",
        lambda run: run.privacy.dp == "client" and run.federation.weighting == "capped",
    ),
    Limit(
        "adapter.start",
        ("sites",),
        "sites get it as the first round's model, and keep no copy, which training.objective = 'dpo' or 'kto' and "
        "every federation.lora but 'factors' need: use 'silotune run'",
        _needs_start_at_sites,
    ),
)
"""Everything that one process does and another way does not."""
