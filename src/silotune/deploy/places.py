"""Where a coordinator and a site keep what: folders, sockets and logs, from their kits; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from silotune.deploy.kits import CoordinatorKit, Kit, SiteKit, SubmitterKit
from silotune.errors import KitError
from silotune.transports.frames import socket_path


def site_settings(kit: Kit) -> SiteKit:
    """The settings of a site's kit.

    Raises:
        KitError: It is another one.
    """
    if not isinstance(kit.settings, SiteKit):
        raise KitError(f"{str(kit.folder)!r} is {_owner(kit)}: give a site's")
    return kit.settings


def coordinator_settings(kit: Kit) -> CoordinatorKit:
    """The settings of a coordinator's kit.

    Raises:
        KitError: It is another one.
    """
    if not isinstance(kit.settings, CoordinatorKit):
        raise KitError(f"{str(kit.folder)!r} is {_owner(kit)}: give the coordinator's")
    return kit.settings


def submitter_settings(kit: Kit) -> SubmitterKit:
    """The settings of a submitter's kit.

    Raises:
        KitError: It is another one.
    """
    if not isinstance(kit.settings, SubmitterKit):
        raise KitError(f"{str(kit.folder)!r} is {_owner(kit)}: give a submitter's")
    return kit.settings


def _owner(kit: Kit) -> str:
    """Whose kit it is, in words."""
    if isinstance(kit.settings, SiteKit):
        return f"the kit of site {kit.settings.site!r}"
    if isinstance(kit.settings, SubmitterKit):
        return f"the kit of submitter {kit.settings.submitter!r}"
    return "the coordinator's kit"


def site_folder(kit: Kit) -> Path:
    """Where a site keeps its state; mode 0700."""
    return kit.folder / site_settings(kit).trainer.folder


def coordinator_folder(kit: Kit) -> Path:
    """Where a coordinator keeps its state; mode 0700."""
    return kit.folder / coordinator_settings(kit).folder


def trainer_socket(kit: Kit) -> Path:
    """Where a site's trainer listens."""
    return socket_path(site_folder(kit), "trainer.sock")


def link_socket(kit: Kit) -> Path:
    """Where the coordinator's own processes reach the SuperLink."""
    return socket_path(coordinator_folder(kit), "superlink.sock")


def log_of(folder: Path, name: str) -> Path:
    """Where a process writes what it prints."""
    return folder / "logs" / f"{name}.log"
