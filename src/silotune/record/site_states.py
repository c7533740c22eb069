"""What a site keeps between the rounds of a run, on its own disk, so that any round can be asked for again.

After each round the state is written as a folder of its own. A coordinator that was killed asks for a round once more:
the site then goes on from the state before that round, and gives the same bits.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from silotune.record import checkpoints
from silotune.record.files import explained, remove_temporary, sync_folder, temporary_beside
from silotune.structs import ServerState, SiteState

_SITE = "site"


def load_before(folder: Path, round_number: int) -> SiteState:
    """The newest state of an earlier round; a fresh one where there is none.

    Raises:
        RunFolderError: The state was damaged.
    """
    return _load(folder, [number for number in _rounds(folder) if number < round_number])


def load_newest(folder: Path) -> SiteState:
    """The newest state; a fresh one where there is none.

    Raises:
        RunFolderError: The state was damaged.
    """
    return _load(folder, _rounds(folder))


def _load(folder: Path, rounds: list[int]) -> SiteState:
    if not rounds:
        return SiteState()
    found = checkpoints.load(folder / str(max(rounds)))
    return found[1].get(_SITE, SiteState()) if found else SiteState()


def save_after(folder: Path, round_number: int, state: SiteState, *, keep: int) -> None:
    """Writes the state after a round; only those of the last ``keep`` rounds before it stay.

    An empty state is not written: a site that keeps nothing has no files. The new state is whole on the disk before
    the states that it undoes are removed, and in its place after that: a kill in between leaves the states of the
    rounds before it, from which the same round is done again.

    Raises:
        RunFolderError: The disk is full, or the folder may not be written; what was there is there still.
    """
    with explained(folder):
        remove_temporary(folder)
        made = temporary_beside(folder / str(round_number))
        if not state.is_empty:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            checkpoints.save(made, ServerState(round_number, {}), {_SITE: state})
        _remove(
            folder, [number for number in _rounds(folder) if number >= round_number or number < round_number - keep]
        )
        if made.is_dir():
            made.rename(folder / str(round_number))
            sync_folder(folder)


def _remove(folder: Path, rounds: list[int]) -> None:
    """Removes states, each renamed first, so that a kill leaves no partial state where a whole one is expected."""
    for number in rounds:
        aside = temporary_beside(folder / str(number))
        (folder / str(number)).rename(aside)
        shutil.rmtree(aside)


def _rounds(folder: Path) -> list[int]:
    """Rounds after which a whole state was written; a folder without one was left by a kill and is ignored."""
    found = folder.iterdir() if folder.is_dir() else ()
    numbered = [path for path in found if path.name.isascii() and path.name.isdigit()]
    return sorted(int(path.name) for path in numbered if checkpoints.newest(path))
