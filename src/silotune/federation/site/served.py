"""What a site has answered of a run, on its disk before it is answered: no kill, full disk or other spelling undoes it.

Each line of the file is one act: a sum that was opened and over whom, a model that a round was trained with, a model
that was scored. Lines are only ever added, each flushed to the disk before the act, under keys made of checked values.
A state that is put back to an earlier round takes nothing of this back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from silotune.errors import PolicyError
from silotune.record.files import append_line, read_lines, to_line

FILE = "served.jsonl"
RUN, OPENED, TRAINED, SCORED = "run", "opened", "trained", "scored"


class Served:
    """The memory of one site and run.

    Args:
        place: Its file; None to remember for as long as this process lives, as a simulation of one's own does.

    Raises:
        RunFolderError: The file was changed or cannot be read: then nothing is served.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._place = place
        rows = read_lines(place) if place is not None else []
        self._acts: list[tuple[str, str, str]] = [(row["act"], row["of"], row["what"]) for row in rows]

    def begin(self, identity: str) -> None:
        """Binds the memory to the run of a job; another job of the same name finds it taken.

        Raises:
            PolicyError: It belongs to another job.
        """
        known = self.of(RUN, "id")
        if not known:
            self._note(RUN, "id", identity)
        elif identity not in known:
            raise PolicyError("job.run", "another job of this name was served before: a run's name is used once")

    def of(self, act: str, of: str) -> tuple[str, ...]:
        """What is known of an act on a round or sum, in the order in which it happened."""
        return tuple(what for known, place, what in self._acts if (known, place) == (act, of))

    def opened(self, sum_name: str) -> str | None:
        """What a sum was opened over, or the state it is in; None for one that the site knows nothing of."""
        return next(reversed(self.of(OPENED, sum_name)), None)

    def note_opened(self, sum_name: str, over: str) -> None:
        """Remembers a sum, before it is opened."""
        self._note(OPENED, sum_name, over)

    def note(self, act: str, of: str, what: str, *, most: int, rule: str) -> None:
        """Remembers what a round is about to be asked with; what is known already counts once.

        Args:
            act: ``TRAINED`` or ``SCORED``.
            of: The round, or the run.
            what: Digest of what is asked.
            most: Different ones that are allowed.
            rule: Of the policy, that says so.

        Raises:
            PolicyError: There would be more.
        """
        known: Sequence[str] = self.of(act, of)
        if what in known:
            return
        if len(known) >= most:
            raise PolicyError(rule, f"{len(known)} were served before, at most {most} are allowed")
        self._note(act, of, what)

    def _note(self, act: str, of: str, what: str) -> None:
        if self._place is not None:
            append_line(self._place, to_line({"act": act, "of": of, "what": what}))
        self._acts.append((act, of, what))
