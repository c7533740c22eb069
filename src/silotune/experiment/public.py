"""What a Python program calls, as ``silotune.run`` and so on: takes dictionaries or files, prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.config import Config
from silotune.data.chats import asked_in
from silotune.evaluation.generate import Sampling, stream_answer
from silotune.experiment import tuned
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.quiet import hushed
from silotune.record.runs import RunFolder
from silotune.shipped import asked
from silotune.structs import Observer, Row


def run(
    config: Config | Mapping[str, Any] | str | Path, changes: Sequence[str] = (), *, progress: Observer | None = None
) -> RunFolder:
    """Runs an experiment, as ``silotune run`` does.

    Args:
        config: A dictionary of sections, a TOML file, a name from ``silotune configs list``, or a read configuration.
        changes: Values to change, as ``--set`` takes them: ``"federation.rounds=3"``.
        progress: Called as ``progress(event, fields)`` whenever something happens; docs/python.md lists the events.

    Returns:
        The run folder: ``path`` is its place, ``read_json("summary")`` gives the comparison of the modes.

    Raises:
        SilotuneError: Whatever went wrong, in one line.
    """
    with hushed():
        return run_experiment(asked(config, changes), observer=progress)


def resume(folder: str | Path, *, progress: Observer | None = None) -> RunFolder:
    """Goes on with a run that was stopped, from its newest checkpoint; the result is the same to the bit.

    Args:
        folder: The run folder.
        progress: As of ``run``.

    Raises:
        SilotuneError: Whatever went wrong, in one line.
    """
    with hushed():
        return resume_experiment(folder, observer=progress)


def evaluate(
    folder: str | Path,
    *,
    mode: str = "federated",
    split: str = "test",
    data: str | Path | Sequence[Row] | None = None,
    scoring: str | None = None,
) -> dict[str, Any]:
    """Scores the model of a run on a split of its data, or on other examples of the same task.

    Args:
        folder: The run folder.
        mode: ``federated``, ``centralized`` or ``isolated/<client>``.
        split: ``train``, ``validation`` or ``test``.
        data: A file, or rows as dictionaries, instead of a split.
        scoring: ``likelihood`` or ``generation``; default: the run's own.

    Returns:
        The figures by name, such as ``accuracy``, and ``notes``: how a file was read, and what was cut.

    Raises:
        SilotuneError: Run, adapter, split or file are not there, or a row does not fit the task.
    """
    with hushed():
        return tuned.evaluate(folder, mode=mode, split=split, data=data, scoring=scoring)


def generate(
    source: str | Path,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    mode: str = "federated",
    base: bool = False,
    sampling: Sampling | None = None,
) -> str:
    """The answer of a tuned model, or of its base.

    Args:
        source: A run folder, a model's folder, a Hub id or ``nano``.
        prompt: The user's turn, or a chat: dictionaries with ``role`` and ``content``.
        mode: ``federated``, ``centralized`` or ``isolated/<client>``.
        base: Ask the base model, without the adapter.
        sampling: How tokens are picked; greedy by default.

    Raises:
        SilotuneError: The run, its adapter or the model are not there, or the prompt is too long.
    """
    turns = asked_in({"prompt": prompt}, "silotune.generate")
    with hushed():
        adapted = tuned.load_tuned(source, mode=mode, base=base)
        return "".join(stream_answer(adapted, turns, sampling or Sampling()))


def export(folder: str | Path, out: str | Path, *, merge: bool = False, mode: str = "federated") -> Path:
    """Writes the adapter of a run for peft, or with ``merge`` a whole model for plain transformers.

    Args:
        folder: The run folder.
        out: A folder that does not exist yet.
        merge: Work the adapter into the base's weights.
        mode: ``federated``, ``centralized`` or ``isolated/<client>``.

    Returns:
        The new folder.

    Raises:
        SilotuneError: ``out`` exists, or the run has no such adapter; nothing is left behind.
    """
    with hushed():
        return tuned.export(folder, out, merge=merge, mode=mode)
