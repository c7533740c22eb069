"""What a deployment's kit shows: who is connected, which runs wait, how old keys and certificates are, what differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silotune.deploy import coordinator, site
from silotune.deploy.certificates import validity
from silotune.deploy.kits import (
    AUTHORITY,
    CHARTER,
    SERVER_CERTIFICATE,
    CoordinatorKit,
    Kit,
    SiteKit,
    coordinator_folder,
)
from silotune.errors import KitError, SilotuneError
from silotune.record.environment import versions
from silotune.record.files import explained
from silotune.record.printable import one_line
from silotune.report.watched import WatchedRun, inner, word

ASK_SECONDS = 2.0
SOON_DAYS = 30
"""A certificate that ends within so many days is marked."""


def runs_of(kit: Kit) -> Path:
    """Where a coordinator keeps the folders of its runs.

    Raises:
        KitError: The kit is neither a coordinator's nor a site's.
    """
    if isinstance(kit.settings, CoordinatorKit):
        return coordinator_folder(kit) / "runs"
    if isinstance(kit.settings, SiteKit):
        return kit.folder / "runs"
    raise KitError(f"{str(kit.folder)!r} is a submitter's kit: give the coordinator's or a site's")


@dataclass(slots=True)
class Deployment:
    """A coordinator or a site, asked now and then, beside the page.

    Attributes:
        kit: Its kit.
        said: What ``coordinator status`` or ``site status`` says, and of the kit's certificates and members.
        version: Goes up whenever ``said`` has changed.
    """

    kit: Kit
    said: dict[str, Any] = field(default_factory=dict)
    version: int = 0
    _asked: float = 0.0
    _work: threading.Thread | None = None

    def refresh(self, *, waits: bool = False) -> None:
        """Asks again where the last time was a while ago; the answer comes beside the page, unless it is waited for."""
        is_due = time.monotonic() - self._asked >= ASK_SECONDS
        if is_due and (self._work is None or not self._work.is_alive()):
            self._asked = time.monotonic()
            self._work = threading.Thread(target=self._ask, daemon=True)
            self._work.start()
        if waits and self._work is not None:
            self._work.join()

    def differing(self, runs: Mapping[str, WatchedRun]) -> list[tuple[str, str, str, str]]:
        """Run, package, its version in the run and here, where these differ."""
        here = versions()["packages"]
        return [
            (key, word(name), word(version) or "not installed", here[name] or "not installed")
            for key, run in runs.items()
            for name, version in inner(run.document("versions"), "packages").items()
            if name in here and version != here[name]
        ]

    def _ask(self) -> None:
        said = {**_UNSAID, **_status(self.kit), "certificates": _certificates(self.kit), **_members(self.kit)}
        if said != self.said:
            self.said, self.version = said, self.version + 1


_UNSAID: Mapping[str, Any] = {
    "fault": "",
    "site": "",
    "process": None,
    "node": {},
    "trainer": {},
    "sites": {},
    "jobs": [],
}
"""What a status does not say where its process does not run."""


def _status(kit: Kit) -> dict[str, Any]:
    is_site = isinstance(kit.settings, SiteKit)
    try:
        return {"is_site": is_site, **(site.status(kit) if is_site else coordinator.status(kit))}
    except SilotuneError as error:
        return {"is_site": is_site, "process": None, "fault": one_line(str(error))}


def _certificates(kit: Kit) -> list[dict[str, Any]]:
    """Each certificate of the kit: since when, until when, days left."""
    found: list[dict[str, Any]] = []
    for name in (SERVER_CERTIFICATE, AUTHORITY):
        place = kit.path(name)
        if not place.is_file():
            continue
        try:
            with explained(place):
                began, ends = validity(place.read_bytes(), source=str(place))
        except SilotuneError as error:
            found.append({"name": name, "fault": one_line(str(error)), "is_soon": True})
            continue
        left = (ends - datetime.now(UTC)).days
        found.append(
            {
                "name": name,
                "fault": "",
                "since": f"{began:%Y-%m-%d}",
                "until": f"{ends:%Y-%m-%d}",
                "days": left,
                "is_soon": left < SOON_DAYS,
            }
        )
    return found


def _members(kit: Kit) -> dict[str, Any]:
    """The members with the age of their kits, and whether there is a charter."""
    try:
        members = kit.members()
    except SilotuneError as error:
        return {"members": [], "list": "", "members_fault": one_line(str(error)), "charter": False}
    rows = [
        {"name": name, "since": member.since, "days": _days_since(member.since)}
        for name, member in sorted(members.active().items())
    ]
    return {
        "members": rows,
        "list": f"list {members.version} of the federation {members.federation}",
        "members_fault": "",
        "charter": kit.path(CHARTER).is_file(),
    }


def _days_since(text: str) -> int | None:
    try:
        began = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (datetime.now(UTC) - (began if began.tzinfo else began.replace(tzinfo=UTC))).days
