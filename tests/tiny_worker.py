"""A worker process around the tests' tiny model."""

from __future__ import annotations

import sys
from typing import Any

import torch

import tiny
from silotune.models.adapters import Adapted
from silotune.transports.worker_processes import serve


def load(opening: dict[str, Any]) -> Adapted:
    """The model; none for an opening with ``of``."""
    if "of" in opening:
        raise ValueError(f"no model of {opening['of']}")
    return tiny.adapted(**opening)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(int(sys.argv[1]), load)
