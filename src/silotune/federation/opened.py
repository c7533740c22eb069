"""What a site remembers of the sums that it has helped to open, so that no round is opened in two ways.

It stands in the site's state, and so in every checkpoint, and is not put back with a state when a round is asked for
again: a coordinator that asks for an earlier round with fewer clients finds what the site knows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from silotune.structs import SiteState

OPENED = "opened"
"""Key of ``SiteState.data``: which sum -> what is remembered of it."""


class Keeper(Protocol):
    """Of a site, what its memory needs."""

    state: SiteState


def remembered(site: Keeper, which: str) -> str | None:
    """What the site knows of a sum; None for one that it has not opened."""
    known: str | None = site.state.data.get(OPENED, {}).get(which)
    return known


def remember(site: Keeper, which: str, over: str) -> None:
    """Notes a sum before it is opened."""
    kept = {**site.state.data.get(OPENED, {}), which: over}
    site.state = replace(site.state, data={**site.state.data, OPENED: kept})


def put_back(earlier: SiteState, newest: SiteState) -> SiteState:
    """The state that a round goes on from, with what the newest one remembers of opened sums."""
    if OPENED not in newest.data:
        return earlier
    return replace(earlier, data={**earlier.data, OPENED: newest.data[OPENED]})
