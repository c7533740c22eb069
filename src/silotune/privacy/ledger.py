"""What has been spent: entries of releases, their epsilon, and the refusal of a release that would overspend.

An entry is written before the release it counts is begun; one that turns out cheaper is written again, under the same
identity, once that is certain. A round that was killed has spent: whether anything of it
left the site cannot be known afterwards, so the repeated round is counted in addition to it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from silotune.errors import BudgetError, PrivacyError
from silotune.privacy.accountant import Spend, epsilon
from silotune.settings.privacy import Accountant


@dataclass(frozen=True, slots=True)
class Entry:
    """One release, or the releases of one local round.

    Attributes:
        identity: Random and unique: an entry that two places keep is counted once.
        run: Which run it belongs to.
        round_number: Of the run.
        spend: What is released.
    """

    identity: str
    run: str
    round_number: int
    spend: Spend


@dataclass(frozen=True, slots=True)
class Cap:
    """The most that entries may cost together, and where that limit is written, for the line that refuses."""

    epsilon: float
    key: str


def entry(run: str, round_number: int, spend: Spend) -> Entry:
    """A new entry."""
    return Entry(uuid.uuid4().hex, run, round_number, spend)


def as_row(item: Entry) -> dict[str, Any]:
    """An entry as JSON."""
    return asdict(item)


def from_row(row: Mapping[str, Any]) -> Entry:
    """An entry from JSON.

    Raises:
        PrivacyError: A field is missing or not valid, so what was spent is not known.
    """
    try:
        spend = dict(row["spend"])
        norms = spend.pop("skellam_norms", None)
        made = Spend(
            float(spend.pop("noise_multiplier")),
            float(spend.pop("sampling_rate")),
            int(spend.pop("steps")),
            skellam_norms=None if norms is None else (float(norms[0]), float(norms[1])),
        )
        if spend or not (0 <= made.noise_multiplier < math.inf and 0 < made.sampling_rate <= 1 and made.steps >= 1):
            raise ValueError("its numbers are not those of a release")
        return Entry(str(row["identity"]), str(row["run"]), int(row["round_number"]), made)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PrivacyError(f"a privacy ledger holds an entry that cannot be read ({error}): mend or move it") from None


def union(*kept: Iterable[Entry]) -> list[Entry]:
    """All entries, each once, in the order in which they first appear and with the cost that was written last."""
    return list({item.identity: item for entries in kept for item in entries}.values())


def spent(entries: Iterable[Entry], delta: float, *, accountant: Accountant = "pld", run: str | None = None) -> float:
    """Epsilon of the entries together, or of those of one run."""
    counted = [item.spend for item in entries if run is None or item.run == run]
    return epsilon(counted, delta, accountant=accountant)


def check(entries: Sequence[Entry], delta: float, cap: Cap, *, accountant: Accountant = "pld") -> float:
    """Epsilon of the entries, the next one among them.

    Raises:
        BudgetError: It is above the cap; nothing may be released.
    """
    cost = spent(entries, delta, accountant=accountant)
    if cost > cap.epsilon:
        raise BudgetError(
            f"the round would bring epsilon to {cost:.4g} at delta = {delta:g}, above {cap.key} = {cap.epsilon:g}; "
            "nothing was trained or released"
        )
    return cost
