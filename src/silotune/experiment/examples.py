"""A run's examples as ids, and whether its objective can learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from silotune.config import Config
from silotune.data.rows import Task
from silotune.errors import ConfigError, DataError
from silotune.settings.objectives import OBJECTIVES
from silotune.settings.sections import Truncate
from silotune.structs import Example
from silotune.training.encode import Encoded, marks_note, truncation_note
from silotune.training.objectives import Encode

Places = Sequence[range]
"""Of each example, its places among the encoded ones: one, or those of all windows of a long text."""


def encoded_apart(encoder: Encode, examples: Sequence[Example]) -> tuple[list[Encoded], Places]:
    """The examples as ids, and where each of them stands there: nowhere, if it is a pair that was left out.

    Raises:
        DataError: An example cannot be encoded, or all of them were left out.
    """
    made: list[Encoded] = []
    places = []
    for number, example in enumerate(examples, start=1):
        start = len(made)
        made.extend(encoder([example], first=number))
        places.append(range(start, len(made)))
    if examples and not made:
        raise DataError(f"the two answers of all {len(examples)} pairs are the same up to model.max_length; raise it")
    return made, places


def notes_of(encoded: Sequence[Encoded], places: Places, what: str, *, truncate: Truncate) -> list[str]:
    """What a reader should know of examples as ids: how many were cut, left out, or spell control marks."""
    cut = truncation_note(encoded, what, truncate=truncate)
    return [note for note in (cut, left_out_note(places, what), marks_note(encoded, what)) if note]


def left_out_note(places: Places, what: str) -> str | None:
    """One line that counts the pairs that were left out; None where none was."""
    count = sum(not own for own in places)
    if not count:
        return None
    return f"{what}: {count} of {len(places)} pairs were left out: both answers are the same up to model.max_length"


def spread(share: Sequence[int], places: Places) -> tuple[int, ...]:
    """Places of some examples among the encoded ones."""
    return tuple(place for index in share for place in places[index])


def check_objective(config: Config, task: Task) -> None:
    """Raises ``ConfigError`` where the objective cannot learn from the task's examples."""
    objective, kind = config.training.objective, "options" if task.options else task.answer
    name = objective.type
    if kind not in objective.learns_from:
        instead = next(each for each in OBJECTIVES if kind in OBJECTIVES[each].learns_from)
        raise ConfigError(
            f"training.objective = {name!r} needs a task with {_KINDS[objective.learns_from[0]]}; {task.name!r} has "
            f"{_KINDS[kind]}: use {instead!r}"
        )
    if objective.has_head and task.answer != "label":
        raise ConfigError(
            f"training.objective = {name!r} needs a task with the same classes in every row; {task.name!r} has options "
            "that differ by row: use 'choice'"
        )
    if task.answer == "preference" and config.adapter.is_whole:
        raise ConfigError(
            f"task {task.name!r} is scored against the model that training began with, which adapter.type = 'none' "
            "does not keep; use an adapter such as 'lora'"
        )


_KINDS: Mapping[str, str] = {
    "text": "open answers",
    "options": "a closed set of options",
    "preference": "pairs of answers",
    "document": "plain text",
}
