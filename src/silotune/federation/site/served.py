"""What a site has answered in a run. It is on the site's disk before the answer leaves, so that a kill cannot undo it.

Each line of the file is one act: a sum that was opened and over whom, a model that a round was trained with, a model
that was scored. Lines are only ever added, each flushed to the disk before the act, under keys made of checked values.
Restoring a state of an earlier round does not remove any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from silotune.errors import PolicyError
from silotune.record.files import append_line, read_lines, to_line

FILE = "served.jsonl"
RUN, OPENED, TRAINED, SCORED, MEASURED, LEAKED = (
    "run", "opened", "trained", "scored", "measured", "leaked"
)  # fmt: skip


class Served:
    """The memory of one site and run.

    Args:
        place: Its file; None to remember only while this process lives, as a simulation does.

    Raises:
        RunFolderError: The file was changed or cannot be read, so nothing is served.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._place = place
        rows = read_lines(place) if place is not None else []
        self._acts: list[tuple[str, str, str]] = [(row["act"], row["of"], row["what"]) for row in rows]

    def begin(self, identity: str) -> None:
        """Binds the memory to the run of a job, so that another job of the same name is refused.

        Raises:
            PolicyError: The memory belongs to another job.
        """
        known = self.of(RUN, "id")
        if not known:
            self._note(RUN, "id", identity)
        elif identity not in known:
            raise PolicyError("job.run", "another job of this name was served before: give this run another name")

    def of(self, act: str, of: str) -> tuple[str, ...]:
        """What is known of an act on a round or sum, in the order in which it happened."""
        return tuple(what for known, place, what in self._acts if (known, place) == (act, of))

    def opened(self, sum_name: str) -> str | None:
        """The clients that a sum was opened over, or the sum's state; None for a sum that the site does not know."""
        return next(reversed(self.of(OPENED, sum_name)), None)

    def note_opened(self, sum_name: str, over: str) -> None:
        """Writes a sum down before it is opened."""
        self._note(OPENED, sum_name, over)

    def note_leaked(self, model: str, advantage: float) -> None:
        """Writes down what a model, by its digest, was found to give away."""
        self._note(LEAKED, model, f"{advantage:.6f}")

    @property
    def leaked(self) -> float | None:
        """The membership advantage of the model that was measured last; None where none was."""
        return next((float(what) for act, _, what in reversed(self._acts) if act == LEAKED), None)

    @property
    def leaked_model(self) -> str:
        """The digest of that model; empty where none was."""
        return next((of for act, of, _ in reversed(self._acts) if act == LEAKED), "")

    def note(self, act: str, of: str, what: str, *, most: int, rule: str) -> None:
        """Writes down what is about to be trained or scored; what is known already does not count again.

        Args:
            act: ``TRAINED``, ``SCORED`` or ``MEASURED``.
            of: The round, or the run.
            what: Digest of what is asked.
            most: How many different digests are allowed.
            rule: The policy's rule with this limit.

        Raises:
            PolicyError: There would be more than ``most``.
        """
        known: Sequence[str] = self.of(act, of)
        if what in known:
            return
        if len(known) >= most:
            raise PolicyError(rule, f"{len(known)} different models were served before, at most {most} are allowed")
        self._note(act, of, what)

    def _note(self, act: str, of: str, what: str) -> None:
        if self._place is not None:
            append_line(self._place, to_line({"act": act, "of": of, "what": what}))
        self._acts.append((act, of, what))
