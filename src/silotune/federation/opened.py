"""What a site remembers of the sums that it has helped to open, so that no round is opened in two ways.

It stands in the site's state, and so in every checkpoint. A state can be put back to an earlier round; a site that does
not trust who asks for that keeps a file as well, which only grows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from silotune.record.files import append_line, read_lines, to_line
from silotune.structs import SiteState

OPENED = "opened"
"""Key of ``SiteState.data``: which sum -> what is remembered of it."""


class Keeper(Protocol):
    """Of a site, what its memory needs."""

    state: SiteState


def remembered(site: Keeper, which: str, *, file: Path | None) -> str | None:
    """What the site knows of a sum; None for one that it has not opened.

    Raises:
        RunFolderError: The file is damaged.
    """
    found = {str(row["sum"]): str(row["over"]) for row in (read_lines(file) if file is not None else ())}
    known: str | None = {**found, **site.state.data.get(OPENED, {})}.get(which)
    return known


def remember(site: Keeper, which: str, over: str, *, file: Path | None) -> None:
    """Notes a sum before it is opened; the file is flushed to the disk."""
    if file is not None:
        append_line(file, to_line({"sum": which, "over": over}))
    kept = {**site.state.data.get(OPENED, {}), which: over}
    site.state = replace(site.state, data={**site.state.data, OPENED: kept})
