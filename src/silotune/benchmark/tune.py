"""Chooses settings of a single configuration as a grid chooses its own: on the selection set, with another seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from silotune.benchmark.expand import Changes
from silotune.benchmark.run import Tally, Work, tuned
from silotune.benchmark.schema import Choice, Grid, PartitionChoice, Tune
from silotune.config import from_mapping, parse_override
from silotune.errors import ConfigError
from silotune.record.grids import GridFolder
from silotune.settings.sections import Mode

MOST_TRIALS: Final = 100
_SEED_APART: Final = 1000
"""What is chosen on the configuration's own seed would be reported on it."""


def candidates_of(texts: Sequence[str], rate: float) -> dict[str, tuple[Any, ...]]:
    """What is to be tried of each setting.

    Args:
        texts: As ``section.key=value,value``; a value with a comma in it stands as in TOML: ``key=["a,b", "c"]``.
        rate: The configuration's learning rate; without texts a third of it, it, and three times it are tried.

    Raises:
        ConfigError: A text is of another form, or there are more combinations than ``MOST_TRIALS``.
    """
    if not texts:
        return {"training.learning_rate": (*(float(f"{rate * factor:.3g}") for factor in (1 / 3, 1, 3)),)}
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        listed = parse_override(f"x={values}")[1] if values.strip().startswith("[") else values.split(",")
        if not separator or not values.strip() or not isinstance(listed, list):
            raise ConfigError(f"--try {text!r} is not of the form section.key=value,value")
        read = (parse_override(f"x={each}")[1] if isinstance(each, str) else each for each in listed)
        found[key.strip()] = (*found.get(key.strip(), ()), *read)
    number = 1
    for values_of_key in found.values():
        number *= len(values_of_key)
    if number > MOST_TRIALS:
        raise ConfigError(f"--try: {number} combinations, at most {MOST_TRIALS} are tried: name fewer values")
    return found


def tune(
    document: Mapping[str, Any],
    asked: Sequence[str],
    path: Path,
    work: Work,
    *,
    mode: Mode = "federated",
    seed: int | None = None,
    rounds: int | None = None,
) -> tuple[dict[str, Any], Tally]:
    """Tries every combination and keeps the trials, so that the same call goes on after a kill.

    Args:
        document: The configuration, as its file says it.
        asked: What to try (``candidates_of``).
        path: Folder of the trials; it is made when it is not there.
        work: How to work on them.
        mode: The mode whose figure decides.
        seed: Of the trials; default: a thousand above the configuration's.
        rounds: Of the trials; default: as many as the configuration has.

    Returns:
        What ``tuning.json`` holds, and how many trials were done.

    Raises:
        ConfigError: The configuration of a trial holds faults, or its selection set is the one that is reported.
        RunFolderError: The folder belongs to something else, or is in use.
    """
    config = from_mapping(document)
    chosen = Tune(
        seed=config.seed + _SEED_APART if seed is None else seed,
        candidates=candidates_of(asked, config.training.learning_rate),
        rounds=rounds,
    )
    grid = Grid(
        name="tune",
        modes=(mode,),
        seeds=(config.seed,),
        tasks=(Choice(name=config.data.task),),
        models=(Choice(name=config.model.name),),
        adapters=(Choice(name=config.adapter.type),),
        algorithms=(Choice(name=config.federation.algorithm.type),),
        partitions=(PartitionChoice(name="as configured"),),
        tune=chosen,
        base=dict(document),
    )
    folder, tally = GridFolder.make(path), Tally()
    with folder.lock():
        tuned(grid, Changes(), folder, work, tally)
    return folder.tuning() or {}, tally
