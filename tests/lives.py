"""The process that works on a submitted run, killed where a test says: ``python -m lives KIT``.

Every line of standard input is ``NAME PHASE NUMBER``: a fresh fork of this process works on the run NAME as
``silotune.deploy.queued_run`` does, and gets SIGKILL when it comes to that phase for the NUMBERth time; with phase
``-`` it works to the end. Its wait status is answered in one line.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # every life would import it anew
import torch
import transformers  # noqa: F401

from silotune.deploy.kits import read_kit
from silotune.deploy.queued_run import work_on

PHASES: Mapping[str, tuple[str, str, bool]] = {
    "preparing": ("silotune.experiment.run", "prepare", False),
    "asking": ("silotune.transports.flower:FlowerTransport", "_send", False),
    "waiting": ("silotune.transports.flower:FlowerTransport", "_look", False),
    "receiving": ("silotune.transports.flower:FlowerTransport", "_read", True),
    "scoring": ("silotune.experiment.scoring:Scorer", "__call__", False),
    "recording": ("silotune.federation.coordinator.rounds", "_write", False),
    "before a checkpoint": ("silotune.record.runs:RunFolder", "save_checkpoint", False),
    "after a checkpoint": ("silotune.record.runs:RunFolder", "save_checkpoint", True),
    "concluding": ("silotune.experiment.run", "concludes", True),
    "finished": ("silotune.experiment.results", "summarize", False),
    "closing the trail": ("silotune.experiment.run", "close", False),
    "closing over a manifest": ("silotune.federation.coordinator.audit", "write_manifest", True),
    "countersigning": ("silotune.experiment.run", "countersign", False),
    "countersigned": ("silotune.experiment.run", "countersign", True),
}
"""Phase -> where its function is, its name, and whether it is over with the function rather than begins with it."""


def die_at(phase: str, number: int) -> None:
    place, name, is_after = PHASES[phase]
    module, _, owner = place.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    real: Callable[..., Any] = getattr(holder, name)
    seen = 0

    def counted(*values: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        made = real(*values, **named) if is_after or seen < number else None
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    setattr(holder, name, counted)


def live(kit: Path, name: str, phase: str, number: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if phase != "-":
            die_at(phase, number)
        work_on(read_kit(kit), name)
    except BaseException as error:  # noqa: BLE001  # the fork must never go on with its parent's loop
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        name, phase, number = line.rstrip("\n").split("\t")
        print(live(Path(sys.argv[1]), name, phase, int(number)), flush=True)


if __name__ == "__main__":
    main()
