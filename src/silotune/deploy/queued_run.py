"""The process that works on one submitted run: Flower's ServerApp around the one server loop.

Run as ``python -m silotune.deploy.queued_run KIT NAME``. It goes on from the run folder's checkpoint, so it can be
killed at any moment and started again.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from silotune.deploy.flower.grid import LocalGrid, flower_run, stop_run
from silotune.deploy.kits import Kit, coordinator_folder, link_socket, read_kit
from silotune.deploy.processes import follow_parent, log_to_stdout
from silotune.deploy.queue import CANNOT_START_AGAIN, Jobs
from silotune.errors import ConfigError, RunFolderError, SilotuneError
from silotune.experiment.engines import Engine
from silotune.experiment.run import Vouched, federate
from silotune.experiment.site import setup_of
from silotune.record.plain_json import sha256
from silotune.settings.sections import FederationSection
from silotune.transports.flower import Ending, Errand, FlowerTransport
from silotune.transports.in_process import codec_of

if TYPE_CHECKING:
    from silotune.config import Config


def over(grid: LocalGrid, sites: Sequence[str], name: str, config: Config, setup: Mapping[str, Any]) -> Engine:
    """The engine that reaches the sites over a Grid; the caller closes the Grid."""
    transport = FlowerTransport(
        grid,
        sites,
        Errand(name, setup),
        codec=codec_of(config.federation),
        ending=ending_of(config.federation),
    )
    return lambda prepared, part, meter, folder: contextlib.nullcontext(transport)


def ending_of(federation: FederationSection) -> Ending:
    """What ends a round of training: enough replies with over-sampling, and the deadline where there is one."""
    clock = federation.clock
    if clock is None:
        return Ending()
    wanted = federation.clients_per_round if clock.over_sampling > 1 else None
    return Ending(wanted, clock.deadline_seconds)


def work_on(kit: Kit, name: str) -> None:
    """Works on a job until it ends, and writes down how it ended."""
    jobs, socket = Jobs(coordinator_folder(kit)), link_socket(kit)
    config, signed = jobs.config(name), jobs.signed(name)
    before = jobs.read(name)
    if before.flower_run:
        stop_run(socket, before.flower_run)
    members = kit.members().active()
    asked = [site for site in sorted(members) if site in signed.job.participants]
    sites = {site: (members[site].signing_public,) for site in asked}
    try:
        setup = setup_of(config)  # only once, because it reads all of the base model for its fingerprint
        if sha256(setup) != signed.job.setup_sha256:
            raise ConfigError("the base model here, or a setting, is not what the run's submitter signed")
        with flower_run(socket, name) as (run_id, grid):
            jobs.change(name, status="running", flower_run=run_id, attempts=before.attempts + 1)
            federate(
                config,
                sites,
                connect=over(grid, tuple(sites), name, config, setup),
                path=jobs.run_path(name),
                vouched=Vouched(signed.job.id, signed),
            )
    except SilotuneError as error:
        logging.getLogger("silotune").error("%s", error)
        with contextlib.suppress(RunFolderError):  # a full disk: the coordinator records it when there is room
            jobs.change(name, status="failed", reason=" ".join(error.told.split()), exit_code=error.exit_code)
        sys.exit(CANNOT_START_AGAIN)
    jobs.change(name, status="finished")


def main() -> None:
    """Works on the job that the arguments name; SIGTERM ends it between two instructions, and it can go on later."""
    follow_parent()
    log_to_stdout()

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    work_on(read_kit(Path(sys.argv[1])), sys.argv[2])


if __name__ == "__main__":
    main()
