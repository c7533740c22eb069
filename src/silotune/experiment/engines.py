"""Where clients run when all is in one place, this process or Flower's simulation on Ray, and their keys for sums."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from silotune.config import Config
from silotune.errors import require
from silotune.experiment.parts import Part, settings_of
from silotune.experiment.prepare import Prepared
from silotune.experiment.site import Holdings, Resident, SiteDesk, setup_of
from silotune.experiment.split import split_in_process, split_of
from silotune.federation.coordinator.privacy import LEDGER
from silotune.federation.simulation.attack import Attacked, Simulated, attackers, with_flipped_labels
from silotune.federation.simulation.clocked import Clocked
from silotune.federation.simulation.pace import paces
from silotune.federation.site.ledger import Budget
from silotune.federation.site.served import Served
from silotune.federation.site.state import Protection, Site
from silotune.federation.wire.transport import Transport
from silotune.privacy.encryption import new_key
from silotune.privacy.secure_sum.terms import Member
from silotune.record.cost import Meter
from silotune.record.plain_json import sha256
from silotune.record.runs import RunFolder
from silotune.settings.attacks import Malicious
from silotune.settings.privacy import EncryptedSum, SecureSum, SumSettings
from silotune.settings.sections import PrivacySection
from silotune.transports.frames import Frame, work_frame
from silotune.transports.in_process import InProcess, codec_of, workers_for
from silotune.transports.trainer_host import TrainerHost

SERVED = "served"
"""Folder of what simulated clients remember of the sums that they have opened, in a part of a run."""
Engine = Callable[[Prepared, Part, Meter, RunFolder], AbstractContextManager[Transport]]


@contextlib.contextmanager
def in_process(prepared: Prepared, part: Part, meter: Meter, folder: RunFolder) -> Iterator[Transport]:
    """The clients of a part, on this machine; only what really travels is encoded, takes time, and may be attacked."""
    settings, adapted = settings_of(prepared, part), prepared.adapted
    federation = settings.federation
    attack = federation.attack
    malicious = attackers(attack, tuple(part.clients), seed=prepared.config.seed)
    keys = members(part.clients, prepared.config.privacy) if part.sends_updates else {}
    budget = _budget(prepared.config, part, folder)
    sites = {}
    for name, examples in part.clients.items():
        is_flipped = isinstance(attack, Malicious) and attack.flips_labels and name in malicious
        own = with_flipped_labels(examples, len(adapted.base.labels)) if is_flipped else examples
        sites[name] = Site(name, own, adapted, meter=meter, budget=budget, initial=prepared.initial, settings=settings)
        if name in keys:
            sites[name].served = Served(folder.path / SERVED / f"{sha256(name)[:16]}.jsonl")
        sites[name].protection = keys.get(name)
    split = split_of(prepared, part)
    if split is not None:
        yield split_in_process(prepared, part, split, sites)
        return
    sampled = part.clients_per_round or len(sites)
    workers = workers_for(adapted, sampled, side_by_side=prepared.threads.side_by_side, asked=federation.workers)
    encodes = federation.encode and part.sends_updates
    transport: Simulated = InProcess(sites, encode=encodes, workers=workers, links=federation)
    if isinstance(attack, Malicious) and malicious:
        transport = Attacked(transport, attack, malicious)
    if federation.clock is not None:
        told = paces(federation.clock, tuple(sites), seed=prepared.config.seed)
        transport = Clocked(transport, told, settings=federation.clock, wanted=sampled, now=_simulated_seconds(folder))
    yield transport


def _simulated_seconds(folder: RunFolder) -> float:
    """The simulated time from which the clock of a run goes on."""
    checkpoint = folder.load_checkpoint()
    return checkpoint[0].simulated_seconds if checkpoint is not None else 0.0


def _budget(config: Config, part: Part, folder: RunFolder) -> Budget:
    """Where the clients of a part keep their ledgers: only what leaves a site counts over runs."""
    shared = config.privacy.ledger if part.sends_updates else None
    return Budget(shared or folder.path / LEDGER)


@contextlib.contextmanager
def ray(prepared: Prepared, part: Part, meter: Meter, folder: RunFolder) -> Iterator[Transport]:
    """The clients of the federated part as actors of Ray; parts of one client stay in this process.

    What clients keep between rounds lies in the run folder: on a cluster it must be one that all machines see.
    """
    if not part.sends_updates:
        with in_process(prepared, part, meter, folder) as transport:
            yield transport
        return
    require("ray", extra="ray")
    from silotune.transports.flower import Errand, FlowerTransport, by_number, simulated_grid

    config, names = prepared.config, tuple(part.clients)
    ledger = _budget(config, part, folder).folder or folder.path
    work = functools.partial(actor_work, str((folder.path / "states").absolute()), str(ledger.absolute()))
    settings = config.federation
    with simulated_grid(work, clients=len(names), cpus=settings.ray_cpus, gpus=settings.ray_gpus) as grid:
        yield FlowerTransport(
            grid,
            names,
            Errand("run", setup_of(config, is_simulated=True), is_simulated=True),
            codec=codec_of(settings),
            name=by_number(names),
        )


ENGINES: Mapping[str, Engine] = {"in_process": in_process, "ray": ray}
"""``federation.engine`` -> how the clients of a part are reached."""


def actor_work(states: str, ledger: str, envelope: Mapping[str, str], setup: bytes, data: bytes) -> Frame:
    """What an actor does with a request: the same as a site's trainer, for whichever client the request names."""
    return _host(states, ledger, envelope.get("client", "")).answer(work_frame(envelope.get("job", ""), setup, data))


@functools.cache  # Ray unpickles the ClientApp for every message, so what must outlive a message is kept in the process
def _host(states: str, ledger: str, client: str) -> TrainerHost:
    budget = Budget(Path(ledger))
    desk = SiteDesk(
        Holdings(client, is_simulated=True),
        lambda site, config: replace(site, budget=budget),
        resident=_resident(),
    )
    return TrainerHost(desk, Path(states) / client)


@functools.cache
def _resident() -> Resident:
    return Resident()


def members(names: Iterable[str], privacy: PrivacySection) -> dict[str, Protection]:
    """Fresh keys for sites that live in one process; real sites have theirs from their kits.

    Returns:
        Site -> its keys; empty where nothing is protected.
    """
    protection = privacy.protection
    if not isinstance(protection, SumSettings):
        return {}
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = {name: Ed25519PrivateKey.generate() for name in names}
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    he_key = new_key() if isinstance(protection, EncryptedSum) else None
    threshold = protection.threshold if isinstance(protection, SecureSum) else SecureSum().threshold
    return {
        name: Protection(
            Member(name, key.sign, public, protection.least_clients, threshold),
            is_required=True,
            he_key=he_key,
        )
        for name, key in private.items()
    }
