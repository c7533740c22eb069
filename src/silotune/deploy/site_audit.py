"""What a site measured of a run's final model on its own examples, signed by the site, for its owner and for others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.deploy.kits import POLICY, SIGNING_KEY, Kit, site_folder, site_settings
from silotune.errors import PolicyError, RunFolderError
from silotune.federation.kinds import LEAKAGE
from silotune.federation.site.policy import read_policy
from silotune.federation.site.served import FILE as SERVED
from silotune.federation.site.served import Served
from silotune.record.audit import FILE
from silotune.record.chain import Entry, verify_chain
from silotune.record.files import write_bytes
from silotune.record.plain_json import canonical
from silotune.record.runs import checked_name
from silotune.record.signatures import read_key


def site_report(kit: Kit, run: str) -> dict[str, Any]:
    """The figures of a run at this site, from its own trail and memory, with the site's signature of them.

    Args:
        kit: The site's.
        run: Name of the run.

    Raises:
        RunFolderError: The site measured no model of this run.
        AuditError: The site's trail was changed.
    """
    settings, folder, key = site_settings(kit), site_folder(kit), read_key(kit.path(SIGNING_KEY))
    served = _served(folder, run)
    advantage = served.leaked
    trail = folder / FILE
    keys = {settings.site: (key.public,)}
    entries = verify_chain(trail, keys=keys, is_open_allowed=True).entries if trail.is_file() else ()
    found = [entry for entry in entries if _is_measure(entry, run)]
    if not found or advantage is None:
        raise RunFolderError(
            f"site {settings.site!r} measured no model of a run {run!r}: that is done at the end of a run with "
            "audit.leakage = true, at the site while it takes part"
        )
    entry = found[-1]
    most = read_policy(kit.path(POLICY)).largest_membership_advantage
    said = {
        "site": settings.site,
        "run": run,
        "round": entry.fields["round"],
        "entry": entry.index,
        "entry_hash": entry.hash,
        "time": entry.time,
        "model": served.leaked_model,
        "figures": entry.fields["body"],
        "advantage": advantage,
        "largest_membership_advantage": most,
        "holds": most is None or advantage <= most,
        "key": key.public,
    }
    return {**said, "signature": key.sign("leakage", canonical(said))}


def _served(folder: Path, run: str) -> Served:
    """What the site wrote down for its policy, which no run's guarantee withholds from its owner."""
    place = folder / "rounds" / checked_name(run) / SERVED
    return Served(place if place.is_file() else None)


def _is_measure(entry: Entry, run: str) -> bool:
    return entry.event == "reply" and entry.fields.get("kind") == LEAKAGE and entry.fields.get("run") == run


def write_site_report(report: Mapping[str, Any], out: Path) -> None:
    """Writes the signed report as JSON."""
    write_bytes(out, json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def check_site_report(report: Mapping[str, Any]) -> None:
    """Raises ``PolicyError`` where the model gives away more than the site's policy allows."""
    if not report["holds"]:
        raise PolicyError(
            "largest_membership_advantage",
            f"run {report['run']!r}: the membership advantage of its model is {report['advantage']:.3g}, at most "
            f"{report['largest_membership_advantage']:.3g} is allowed; its end is not signed",
        )
