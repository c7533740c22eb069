"""The process that holds a site's base model and trains: ``python -m silotune.deploy.trainer KIT``."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from types import FrameType

from silotune.config import Config
from silotune.deploy.charter import read_charter
from silotune.deploy.kits import (
    CHARTER,
    HE_KEY,
    NOTES,
    POLICY,
    SIGNING_KEY,
    Kit,
    read_kit,
    site_folder,
    site_settings,
    trainer_socket,
)
from silotune.deploy.processes import follow_parent, log_to_stdout
from silotune.experiment.site import Holdings, SiteDesk
from silotune.federation.site.admission import Gate, Membership
from silotune.federation.site.guard import Guard
from silotune.federation.site.ledger import Budget
from silotune.federation.site.policy import read_policy
from silotune.federation.site.state import Protection, Site
from silotune.federation.wire.run_setup import without_hub
from silotune.models.fingerprint import fingerprint
from silotune.models.load import nano_folder
from silotune.privacy.secure_sum.terms import Member
from silotune.record.audit import FILE, Trail
from silotune.record.files import write_json
from silotune.record.signatures import raw_public, read_key, read_secret
from silotune.settings.sections import PrivacySection
from silotune.transports.frames import listen
from silotune.transports.trainer_host import TrainerHost


def holdings_of(kit: Kit) -> Holdings:
    """The model, data and task that a site's kit names."""
    settings = site_settings(kit)
    model, data = settings.model, settings.data
    folder = model.path if model.path == "nano" else str(kit.folder / model.path)
    return Holdings(
        name=settings.site,
        model=folder,
        device=model.device,
        fingerprint=model.sha256,
        task=data.task,
        definition=data.definition and without_hub(data.definition),
        columns=data.columns,
        train=None if data.train is None else kit.folder / data.train,
        files=data,
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
        notify=lambda event, fields: write_json(site_folder(kit) / NOTES, fields),
    )

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    import peft  # noqa: F401  # the longest import of all: it must not slow down the first request

    host.serve(listen(trainer_socket(kit)))


LEDGER = "ledger"
"""Folder in the site's state folder that records what the site has spent over all runs."""


def guard_of(kit: Kit, holdings: Holdings) -> Guard:
    """What the site puts around every request: its policy, its key, its own audit trail.

    Raises:
        SignatureError: The kit's signing key cannot be used.
    """
    key = read_key(kit.path(SIGNING_KEY))
    own = fingerprint(nano_folder() if holdings.model == "nano" else Path(str(holdings.model)))
    gate = Gate(
        holdings.name,
        kit.path(POLICY),
        partial(_membership, kit),
        task=holdings.task,
        base_sha256=own,
        charter=partial(_charter_of, kit),
    )
    return Guard(gate, key, Trail(site_folder(kit) / FILE, key, actor=holdings.name))


def _membership(kit: Kit) -> Membership:
    """Whose signatures are valid now, and who takes part, by the list that the authority signed."""
    members = kit.members()
    return Membership((members.coordinator_now(),), members.submitter_keys(), tuple(members.active()))


def equip(kit: Kit, guard: Guard, site: Site, config: Config) -> Site:
    """The site of a run with its own ledger and keys; the list of members is read anew for every run.

    Raises:
        PolicyError: The policy cannot be read, so everything is refused.
        SignatureError: The list of members is not signed by the authority, or a key may be read by others.
    """
    made = replace(site, budget=Budget(site_folder(kit) / LEDGER))
    made.protection = protection_of(kit, guard, config.privacy, name=site.name)
    return made


def protection_of(kit: Kit, guard: Guard, privacy: PrivacySection, *, name: str) -> Protection | None:
    """The site's part in protected sums; None where the run protects nothing.

    The other sites come from the list that the authority signed, never from a message. The policy sets the least
    number of sites and the least threshold; a run may ask for more, but not for less.
    """
    if not privacy.protection.is_sum:
        return None
    policy, members = read_policy(guard.gate.policy), kit.members().active()
    public = {other: raw_public(member.signing_public) for other, member in members.items()}
    least = max(privacy.sums.least_clients, policy.least_participants or 0, policy.least_cohort or 0)
    own = Member(name, guard.key.private.sign, public, least, policy.least_threshold)
    he_key = _secret(kit, HE_KEY) if _has(kit, HE_KEY) else None
    return Protection(own, is_required=True, he_key=he_key)


def _has(kit: Kit, file: str) -> bool:
    return kit.path(file).is_file()


def _secret(kit: Kit, file: str) -> bytes:
    return read_secret(kit.path(file))


def _charter_of(kit: Kit) -> tuple[str, date] | None:
    """Hash and last day of the kit's charter."""
    if not kit.path(CHARTER).is_file():
        return None
    charter, digest = read_charter(kit.path(CHARTER))
    return digest, charter.until


if __name__ == "__main__":
    main()
