"""A run's examples as ids, and whether its objective can learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from silotune.config import Config
from silotune.data.rows import Task
from silotune.errors import ConfigError
from silotune.structs import Example
from silotune.training.encode import Encoded
from silotune.training.objectives import OBJECTIVES, Encode

Places = Sequence[range]
"""Of each example, its places among the encoded ones: one, or those of all windows of a long text."""


def encoded_apart(encoder: Encode, examples: Sequence[Example]) -> tuple[list[Encoded], Places]:
    """The examples as ids, and where each of them stands there."""
    made: list[Encoded] = []
    places = []
    for number, example in enumerate(examples, start=1):
        start = len(made)
        made.extend(encoder([example], first=number))
        places.append(range(start, len(made)))
    return made, places


def spread(share: Sequence[int], places: Places) -> tuple[int, ...]:
    """Places of some examples among the encoded ones."""
    return tuple(place for index in share for place in places[index])


def check_objective(config: Config, task: Task) -> None:
    """Raises ``ConfigError`` where the objective cannot learn from the task's examples."""
    name, kind = config.training.objective, "options" if task.options else task.answer
    if kind not in _LEARNABLE[name]:
        instead = next(each for each, kinds in _LEARNABLE.items() if kind in kinds)
        raise ConfigError(
            f"training.objective = {name!r} needs a task with {_KINDS[_LEARNABLE[name][0]]}; {task.name!r} has "
            f"{_KINDS[kind]}: use {instead!r}"
        )
    if OBJECTIVES[name].has_head and task.answer != "label":
        raise ConfigError(
            f"training.objective = {name!r} needs a task with the same classes in every row; {task.name!r} has options "
            "that differ by row: use 'choice'"
        )
    if task.answer == "preference" and config.adapter.kind == "none":
        raise ConfigError(
            f"task {task.name!r} is scored against the model that training began with, which adapter.kind = 'none' "
            "does not keep; use an adapter such as 'lora'"
        )


_LEARNABLE: Mapping[str, tuple[str, ...]] = {
    "sft": ("text", "options", "preference"),
    "choice": ("options",),
    "classify": ("options",),
    "dpo": ("preference",),
    "kto": ("preference",),
    "pretrain": ("document",),
}
"""Objective -> kinds of answer that it learns from."""
_KINDS: Mapping[str, str] = {
    "text": "open answers",
    "options": "a closed set of options",
    "preference": "pairs of answers",
    "document": "plain text",
}
