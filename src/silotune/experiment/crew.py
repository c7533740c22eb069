"""When clients of a run train in processes beside this one, and those processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from silotune.config import Config
from silotune.data.tasks import resolve
from silotune.errors import SilotuneError
from silotune.models.fingerprint import folder_of
from silotune.models.load import pick_device
from silotune.record.environment import memory
from silotune.record.family import Family
from silotune.training.local import steps_in_round
from silotune.transports.in_process import LARGEST_SIDE_BY_SIDE
from silotune.transports.worker_processes import WorkerProcess

MODULE = "silotune.experiment.worker_process"
LONG = 5000
"""Examples that the federated mode puts through its model from which on processes pay: one takes ten seconds to start,
on a core that would mostly rest meanwhile."""
ROOM = 1 << 30
"""Bytes of free memory for a process, so that half of it stays free beside a small base."""
_BYTES_A_VALUE = 2
"""Of a base's file at least."""


@dataclass
class Crew:
    """The worker processes of a run: none until `begin`, which may be asked several times."""

    config: Config
    family: Family
    _workers: list[WorkerProcess] = field(default_factory=list)

    def begin(self, sizes: Sequence[int]) -> Sequence[WorkerProcess]:
        """The processes, started if there are none yet and a run over clients of these sizes is worth them.

        Args:
            sizes: Training examples of each client.
        """
        federation, cores = self.config.federation, self.config.training.threads or torch.get_num_threads()
        at_once = min(federation.workers or cores, federation.clients_per_round or len(sizes), len(sizes))
        count = at_once - 1 if self._is_wanted(sizes) else 0
        opening = {"config": self.config.model_dump(mode="json"), "threads": max(1, cores // at_once)}
        if not self._workers:
            begun = range(min(count, _room()))
            self._workers = [WorkerProcess(MODULE, opening, family=self.family) for _ in begun]
        return self._workers[:count]

    def close(self) -> None:
        """Ends them."""
        for worker in self._workers:
            worker.close()

    def _is_wanted(self, sizes: Sequence[int]) -> bool:
        asked = self.config.federation.worker_processes
        wanted = asked if asked is not None else planned_examples(self.config, sizes) >= LONG
        return wanted and _is_possible(self.config)


@contextmanager
def crew_of(config: Config, family: Family) -> Iterator[Crew]:
    """The crew of a run. What can be known before data and model are read is begun with, so that both load at once."""
    crew = Crew(config, family)
    try:
        if _is_known_small(config) and (sizes := _sizes_ahead(config)):
            crew.begin(sizes)
        yield crew
    finally:
        crew.close()


def planned_examples(config: Config, sizes: Sequence[int]) -> int:
    """Examples that the federated mode puts through the model in training, each time counted.

    In the other modes one client trains at a time.
    """
    training, federation = config.training, config.federation
    asked = min(federation.clients_per_round or len(sizes), len(sizes))
    steps = sum(steps_in_round(size, training) for size in sizes) * asked / max(1, len(sizes))
    a_step = training.batch_size * training.gradient_accumulation
    return int(federation.rounds * steps * a_step) if "federated" in federation.modes else 0


def _is_possible(config: Config) -> bool:
    """Whether a client's round is the same in another process: no secrets kept in memory, no ledger, no GPU.

    Dropout draws from the process's one generator, and quantised weights cannot be trained by two (`workers_for`).
    """
    return (
        sys.platform == "linux"  # where another process's cost can be read
        and config.federation.engine == "in_process"
        and config.federation.encode  # what is plain JSON can pass to another process
        and not config.privacy.protection.is_sum
        and not config.privacy.dp.is_promised
        and config.model.precision != "int4"
        and not config.adapter.draws
        and pick_device(config.model.device).type == "cpu"
    )


def _is_known_small(config: Config) -> bool:
    """Whether the base's files say that it is one whose clients train side by side."""
    try:
        folder = folder_of(config.model)
    except SilotuneError:
        return False
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return bool(files) and sum(file.stat().st_size for file in files) <= LARGEST_SIDE_BY_SIDE * _BYTES_A_VALUE


def _sizes_ahead(config: Config) -> list[int]:
    """About how many examples each client will have; empty where only the data say so."""
    data = config.data
    if data.num_train is None or data.partition.scheme in ("field", "file") or not resolve(data).embedded:
        return []
    return [max(1, data.num_train // data.partition.clients)] * data.partition.clients


def _room() -> int:
    """Processes that there is memory for."""
    return (memory()["available"] or 0) // ROOM
