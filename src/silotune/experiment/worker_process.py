"""What a worker process runs: ``python -m silotune.experiment.worker_process`` with its end of a socket."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import Any

import peft  # noqa: F401  # the longest import of all: it is to be over when the parent has something to do
import torch

from silotune.config import from_mapping
from silotune.data.tasks import resolve
from silotune.experiment.prepare import adapted_of
from silotune.models.adapters import Adapted
from silotune.transports.worker_processes import serve


def load(opening: Mapping[str, Any]) -> Adapted:
    """The run's base with its adapter, for so many threads."""
    config = from_mapping(opening["config"])
    torch.set_num_threads(opening["threads"])
    return adapted_of(config, resolve(config.data))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its workers
    serve(int(sys.argv[1]), load)
