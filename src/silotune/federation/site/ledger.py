"""What a site does before it trains under differential privacy: fits the noise, checks and writes down the cost.

The site's own file counts, and so do the entries that its last checkpoint kept, so that nothing becomes unspent when
the file is lost or replaced by an older one.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from silotune.errors import PrivacyError
from silotune.privacy.accountant import Spend
from silotune.privacy.ledger import Cap, Entry, as_row, check, entry, from_row, spent, union
from silotune.record.files import append_line, explained, mend, read_lines, to_line
from silotune.settings.base import NAME, NAME_RULE
from silotune.settings.privacy import Accountant
from silotune.settings.sections import PrivacySection
from silotune.structs import SiteState

_ENTRIES, _NOISE = "privacy_entries", "noise_multiplier"
LOCK_SECONDS = 60.0
"""Longest wait for the lock of a ledger; another process holds it only while it adds a line."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Where a site keeps its ledger; the most that its owner allows over all runs stands in the site's policy.

    Attributes:
        folder: Of the ledgers, one file a site; None where only checkpoints keep the entries.
    """

    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A round whose cost is written down: its entry, what may be released, the run's epsilon, the state to keep."""

    identity: str
    spend: Spend
    epsilon: float
    state: SiteState


def open_round(
    name: str, state: SiteState, budget: Budget, privacy: PrivacySection, *, run: str, round_number: int,
    release: Callable[[float | None], Spend],
) -> Opened:  # fmt: skip
    """Writes a round's cost to the site's ledger, or refuses the round.

    Args:
        name: The site's.
        state: What it keeps; its entries are counted, too.
        budget: Its ledger.
        privacy: The run's ``[privacy]`` section.
        run: The run's identity.
        round_number: The round.
        release: Function from the noise multiplier that the state keeps, or None, to what the round releases.

    Raises:
        BudgetError: The round would pass the run's epsilon; nothing is written, nothing is to be trained.
        PrivacyError: The ledger is damaged, or the site's name cannot be the name of a file.
    """
    planned = release(kept_noise(state))
    with _ledger(budget.folder, name) as (rows, append):
        known = _known(rows, state)
        new = entry(run, round_number, planned)
        own = [item for item in (*known, new) if item.run == run]
        dp = privacy.guarantee
        if dp.epsilon is not None:
            cost = check(own, dp.delta, Cap(dp.epsilon, "privacy.dp.epsilon"), accountant=dp.accountant)
        else:
            cost = spent(own, dp.delta, accountant=dp.accountant)
        append(as_row(new))
    kept = {**state.data, _ENTRIES: [as_row(item) for item in own], _NOISE: planned.noise_multiplier}
    return Opened(new.identity, planned, cost, replace(state, data=kept))


def settle_round(name: str, state: SiteState, budget: Budget, *, identity: str, spend: Spend) -> SiteState:
    """Corrects the cost of an entry that turned out cheaper; gives the state to keep.

    An entry that is not in this state stays charged as it was written.
    """
    kept = {item.identity: item for item in map(from_row, state.data.get(_ENTRIES, ()))}
    if identity not in kept:
        return state
    settled = {**kept, identity: replace(kept[identity], spend=spend)}
    with _ledger(budget.folder, name) as (_, append):
        append(as_row(settled[identity]))
    return replace(state, data={**state.data, _ENTRIES: [as_row(item) for item in settled.values()]})


def cost_of(name: str, state: SiteState, budget: Budget, new: Entry, **counted: Any) -> tuple[float, float]:
    """Epsilon of the entry's run and of all runs of a site, the entry counted in; nothing is written.

    Args:
        name: The site's.
        state: What it keeps.
        budget: Its ledger.
        new: The release that is asked for.
        counted: ``delta`` and ``accountant``.

    Raises:
        PrivacyError: The ledger is damaged.
    """
    with _ledger(budget.folder, name) as (rows, _):
        known = _known(rows, state)
    every = [*known, new]
    total = spent(every, **counted)
    return (total if all(item.run == new.run for item in known) else spent(every, run=new.run, **counted)), total


def spent_in(folder: Path, *, delta: float, accountant: Accountant = "pld") -> dict[str, dict[str, Any]]:
    """What the ledgers of a folder say that each site spent, on all runs together and on each.

    Args:
        folder: Folder with one file a site, as in ``privacy.dp.ledger`` and in a site's state.
        delta: The delta at which epsilon is computed.
        accountant: How it is counted.

    Returns:
        Site -> ``epsilon`` of all its releases together, ``releases``, and ``runs``: run -> its own ``epsilon`` and
        ``releases``.

    Raises:
        PrivacyError: The folder holds no ledger, or a damaged one.
    """
    places = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not places:
        raise PrivacyError(f"{str(folder)!r} holds no privacy ledger (one SITE.jsonl a site)")
    found = {}
    for place in places:
        entries = union(map(from_row, read_lines(place)))
        runs = {item.run: [other for other in entries if other.run == item.run] for item in entries}
        each = {run: _told(own, delta, accountant) for run, own in runs.items()}
        found[place.stem] = {**_told(entries, delta, accountant), "runs": each}
    return found


def _told(entries: Sequence[Entry], delta: float, accountant: Accountant) -> dict[str, Any]:
    return {"epsilon": spent(entries, delta, accountant=accountant), "releases": len(entries)}


def _known(rows: Iterable[Mapping[str, Any]], state: SiteState) -> list[Entry]:
    """The entries of the ledger's file and of a checkpoint, each once."""
    return union(map(from_row, rows), map(from_row, state.data.get(_ENTRIES, ())))


def kept_noise(state: SiteState) -> float | None:
    """The noise multiplier that the run's first round settled on; None before that round."""
    return state.data.get(_NOISE)


def has_spent(state: SiteState) -> bool:
    """Whether the site has released anything under a guarantee in this run."""
    return bool(state.data.get(_ENTRIES))


@contextmanager
def _ledger(
    folder: Path | None, name: str
) -> Iterator[tuple[list[dict[str, Any]], Callable[[Mapping[str, Any]], None]]]:
    """Locks a site's file, and gives its rows and a function that adds one."""
    if folder is None:
        yield [], lambda row: None
        return
    if not NAME.fullmatch(name):
        raise PrivacyError(f"{name!r} cannot name a ledger: {NAME_RULE}")
    place = folder / f"{name}.jsonl"
    with explained(place):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{name}.lock").open("w")
    with lock:
        _hold(lock.fileno(), place)
        if note := mend(place):  # the charge was not on the disk when the process stopped: its round had not begun
            logging.getLogger("silotune").warning("%s: the charge of a round that had not begun", note)
        yield read_lines(place), lambda row: append_line(place, to_line(row))


def _hold(lock: int, place: Path) -> None:
    """Waits for the lock of a ledger, within a limit."""
    limit = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > limit:
                raise PrivacyError(
                    f"{str(place)!r} was held by another process for {LOCK_SECONDS:g} s: end it, then start again"
                ) from None
            time.sleep(0.02)
