"""The process that holds a site's base model and trains: ``python -m silotune.deploy.trainer KIT``."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType

from silotune.deploy.equipment import equip, guard_of
from silotune.deploy.kits import Kit, read_kit
from silotune.deploy.places import site_folder, site_settings, trainer_socket
from silotune.deploy.processes import follow_parent, log_to_stdout
from silotune.experiment.site import Holdings, SiteDesk
from silotune.transports.frames import listen
from silotune.transports.trainer_host import TrainerHost


def holdings_of(kit: Kit) -> Holdings:
    """What a site's kit says that the site has."""
    settings = site_settings(kit)
    model, data = settings.model, settings.data
    folder = model.path if model.path == "nano" else str(kit.folder / model.path)
    return Holdings(
        name=settings.site,
        model=folder,
        device=model.device,
        fingerprint=model.sha256,
        task=data.task,
        definition=data.definition,
        train=None if data.train is None else kit.folder / data.train,
        threads=settings.trainer.threads,
    )


def main() -> None:
    """Serves until told to stop; the heavy imports are done before the first request."""
    follow_parent()
    log_to_stdout()
    kit = read_kit(Path(sys.argv[1]))
    holdings = holdings_of(kit)
    guard, trainer = guard_of(kit, holdings), site_settings(kit).trainer
    host = TrainerHost(
        SiteDesk(holdings, partial(equip, kit, guard)),
        site_folder(kit) / "rounds",
        guard=guard,
        idle_seconds=trainer.idle_seconds,
        max_bytes=trainer.largest_message_mb << 20,
    )

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    import peft  # noqa: F401  # the longest import of all: it must not fall into the first request

    host.serve(listen(trainer_socket(kit)))


if __name__ == "__main__":
    main()
