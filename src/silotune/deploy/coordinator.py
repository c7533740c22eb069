"""Runs a coordinator: keeps the SuperLink up, registers the members' nodes, and works on submitted runs one by one."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

from silotune.deploy.flower.grid import node_key, nodes, register, wait_for_link
from silotune.deploy.kits import (
    MEMBERS,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    Kit,
    check_start,
    coordinator_folder,
    coordinator_settings,
    link_socket,
    log_of,
)
from silotune.deploy.processes import Child, follow_parent, holder, only_one, told_to_stop
from silotune.deploy.queue import CANNOT_START_AGAIN, ENDED, Jobs
from silotune.errors import FederationError, KitError, RunFolderError
from silotune.structs import Observer

LINK_SECONDS = 180.0
LOOK_SECONDS = 0.2
MEMBERS_SECONDS = 5.0
MOST_CRASHES = 5
"""A job fails for good when its process has died this often without an error of silotune's."""


def public_keys(kit: Kit) -> dict[str, bytes]:
    """Site -> its node's public key in PEM, of the members that take part now."""
    return {name: node_key(member.auth_public) for name, member in kit.members().active().items()}


def start(kit: Kit, *, notify: Observer = lambda event, fields: None) -> None:
    """Runs until SIGTERM or SIGINT; an unfinished run goes on from its checkpoint at the next start.

    Raises:
        FederationError: Another coordinator holds the folder, or the SuperLink does not start.
        KitError: A file of the kit is missing, or a key is not valid or may be read by others; nothing was started.
    """
    folder = coordinator_folder(kit)
    settings = coordinator_settings(kit)
    check_start(kit)
    check_server(kit)
    follow_parent()
    with only_one(folder, "the coordinator"), told_to_stop() as stopped:
        link = Child("superlink", ("silotune.deploy.flower.superlink", str(kit.folder)), log_of(folder, "superlink"))
        keeper = _Keeper(kit, folder, link, notify)
        try:
            link.start()
            keeper.ready()
            place = f"{settings.address.host}:{settings.address.fleet_port}"
            notify("coordinator_started", {"place": place, "sites": sorted(public_keys(kit))})
            while not stopped:
                keeper.once_there_is_room()
                time.sleep(LOOK_SECONDS)
        finally:
            keeper.stop()


def check_server(kit: Kit) -> None:
    """Checks that the server's certificate and key can be used together.

    Raises:
        KitError: One of them is not valid, or they are not a pair.
    """
    certificate, key = kit.path(SERVER_CERTIFICATE), kit.path(SERVER_KEY)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError:
        raise KitError(
            f"{str(certificate)!r} and {str(key)!r} are not a certificate and its key: unpack the kit again, or ask "
            "for 'provision rotate coordinator'"
        ) from None


class _Keeper:
    """The state of a coordinator's loop."""

    def __init__(self, kit: Kit, folder: Path, link: Child, notify: Observer) -> None:
        self._kit, self._folder, self._link, self._notify = kit, folder, link, notify
        self._jobs = Jobs(folder)
        self._job: tuple[str, Child] | None = None
        self._crashes: dict[str, int] = {}
        self._members: tuple[float, float] = (0.0, 0.0)
        self._cannot_write = ""

    def ready(self) -> None:
        """Waits for the SuperLink, and registers the nodes."""
        try:
            wait_for_link(link_socket(self._kit), limit_seconds=LINK_SECONDS)
        except FederationError as error:
            raise FederationError(f"{error}; its log ends: {self._link.last_line()}") from None
        register(link_socket(self._kit), public_keys(self._kit))

    def once_there_is_room(self) -> None:
        """Does one step of the loop; on a full disk, says so once and tries again, while sites stay connected."""
        try:
            self.once()
            self._cannot_write = ""
        except RunFolderError as error:
            if str(error) != self._cannot_write:
                self._cannot_write = str(error)
                self._notify("coordinator_waits", {"reason": str(error)})

    def once(self) -> None:
        """Looks after the SuperLink, the list of members, and the jobs."""
        if self._link.keep_up():
            self._notify("superlink_restarted", {"starts": self._link.starts})
            self.ready()
        self._look_at_members()
        if self._job is not None:
            self._look_at_job(*self._job)
        if self._job is None:
            self._begin_next()

    def stop(self) -> None:
        """Ends the processes; the job's first, so that it ends Flower's run."""
        if self._job is not None:
            self._job[1].stop()
        self._link.stop(limit_seconds=5.0)

    def _look_at_members(self) -> None:
        """Registers and revokes nodes when the list of members has changed."""
        looked, changed = self._members
        if time.monotonic() - looked < MEMBERS_SECONDS:
            return
        now = self._kit.path(MEMBERS).stat().st_mtime
        if changed and now != changed:
            register(link_socket(self._kit), public_keys(self._kit))
            self._notify("members_changed", {"sites": sorted(public_keys(self._kit))})
        self._members = (time.monotonic(), now)

    def _look_at_job(self, name: str, child: Child) -> None:
        if child.is_running:
            child.shorten_log()
            if self._jobs.read(name).status == "cancelled":
                child.stop()
            else:
                return
        state, code = self._jobs.read(name), child.code
        if state.status in ENDED:
            self._notify("job_ended", {"name": name, "status": state.status, "reason": state.reason})
        elif code == CANNOT_START_AGAIN or self._crashes.get(name, 0) >= MOST_CRASHES:
            reason = self._cannot_write or f"its process ended with status {code}: {child.last_line()}"
            self._jobs.change(name, status="failed", reason=reason[:500], exit_code=1)
            self._notify("job_ended", {"name": name, "status": "failed", "reason": reason})
        else:
            self._crashes[name] = self._crashes.get(name, 0) + 1
            self._notify("job_crashed", {"name": name, "status": code})
        self._job = None

    def _begin_next(self) -> None:
        for name in self._jobs.names():
            if self._jobs.read(name).status not in ENDED:
                arguments = ("silotune.deploy.queued_run", str(self._kit.folder), name)
                child = Child(f"job {name}", arguments, log_of(self._folder, f"job-{name}"))
                child.start()
                self._job = (name, child)
                self._notify("job_started", {"name": name})
                return


def status(kit: Kit) -> dict[str, Any]:
    """What a coordinator does: its process, its nodes, its runs; plain JSON."""
    folder = coordinator_folder(kit)
    process = holder(folder)
    jobs = Jobs(folder)
    said: dict[str, Any] = {
        "process": process,
        "sites": {},
        "jobs": [dict(jobs.progress(name)) for name in jobs.names()],
    }
    if process is not None:
        try:
            known = nodes(link_socket(kit))
        except FederationError as error:
            return {**said, "fault": str(error)}
        now = time.time()
        said["sites"] = {
            name: "connected" if node["status"] == "online" and node["online_until"] > now else "away"
            for name, node in known.items()
        }
    return said
