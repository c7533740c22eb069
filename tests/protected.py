"""Five sites behind a wire that a test can watch and cut, and rounds over it under any protection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import tiny
from acting import ORDER, acting
from silotune.experiment.engines import members
from silotune.federation.coordinator.privacy import central_privacy
from silotune.federation.coordinator.protection import PROTECTIONS
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.client import client_round
from silotune.federation.site.ledger import Budget
from silotune.federation.site.served import Served
from silotune.federation.site.state import Protection, Site
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings.sections import FederationSection, PrivacySection
from silotune.structs import Failure, Observer, Reply, Request, ServerState, Tensors
from silotune.transports.in_process import InProcess

PHASES = ("keys", "shares", "accept", "input", "check", "unmask")
NAMES = ("a", "b", "c", "d", "e")
EXAMPLES = {name: tiny.encoded(tiny.closed(3 + place)) for place, name in enumerate((*NAMES, "f"))}
TRAINING = tiny.training(max_steps=1)


class Net(InProcess):
    """Sites in this process behind a wire that keeps what the coordinator sees, and loses what a test wants lost."""

    def __init__(
        self,
        model,
        privacy: PrivacySection,
        lost: Callable[[str, str], bool] = lambda kind, client: False,
        budget: Budget | None = None,
        names: Sequence[str] = NAMES,
        memory: Path | None = None,
    ) -> None:
        keys = members(names, privacy)
        self.sites = {
            name: Site(
                name, EXAMPLES[name], model, protection=keys.get(name), budget=budget or Budget(),
                settings=acting(TRAINING, privacy=privacy),
            )
            for name in names
        }  # fmt: skip
        if memory is not None:  # what sites have served lies on their disks
            for name, site in self.sites.items():
                site.served = Served(memory / f"{name}.jsonl")
        super().__init__(self.sites)
        self.lost = lost
        self.keys = {name: (public_line(own.member.public_keys[name]),) for name, own in keys.items()}
        self.seen: list[Reply] = []
        self.failures: list[Failure] = []

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for reply in super().exchange(requests, timeout_seconds=timeout_seconds):
            kind = next(iter(requests.values())).kind
            if self.lost(kind, reply.client):
                yield Failure(reply.client, reply.round_number, kind, "lost")
                continue
            (self.seen if isinstance(reply, Reply) else self.failures).append(reply)
            yield reply


LIAR = "b"
Lie = Callable[["Lying", Request, Reply], "Reply | None"]
"""What the liar's answer becomes; None for no answer."""


class Lying(Net):
    """Sites of which one changes its answers before they leave it; keeps what the coordinator books and notes."""

    def __init__(self, model, settings: PrivacySection, lie: Lie, names: Sequence[str], liar: str = LIAR) -> None:
        super().__init__(model, settings, names=names)
        self.lie, self.who = lie, liar
        self.booked, self.told = list[tuple[str, str]](), list[str]()

    @property
    def liar(self) -> Protection:
        protection = self.sites[self.who].protection
        assert protection is not None
        return protection

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for name, request in requests.items():
            before = self.liar.stage
            for reply in super().exchange({name: request}, timeout_seconds=timeout_seconds):
                if name != self.who or isinstance(reply, Failure):
                    yield reply
                    continue
                self.before = before
                changed = self.lie(self, request, reply)
                yield changed or Failure(name, request.round_number, request.kind, "lost")

    def notify(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "client_failed":
            self.booked.append((fields["client"], fields["reason"]))
        if event == "note":
            self.told.append(fields["text"])


def public_line(raw: bytes) -> str:
    """A public key as lists of members have it."""
    public = Ed25519PublicKey.from_public_bytes(raw)
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def privacy(protection: str = "secure_sum", **changes) -> PrivacySection:
    return PrivacySection(**tiny.sorted_privacy({"protection": protection, "max_examples": 64, **changes}))


def run(
    folder: Path, net: Net, start: Tensors, settings: PrivacySection, *, rounds: int = 1,
    state: ServerState | None = None, notify: Observer = lambda event, fields: None, **federation,
) -> ServerState:  # fmt: skip
    """Rounds from the first, or from ``state``, under a coordinator that keeps the account of noise in shares."""
    section = FederationSection(rounds=rounds, **federation)
    acts = acting(TRAINING, privacy=settings, section=section)
    for site in net.sites.values():
        site.settings = acts
    is_noised = settings.dp.is_in_shares
    sizes = {name: len(site.examples) for name, site in net.sites.items()}
    plan = Plan(
        rounds=rounds, method=method(section, TRAINING), body={**ORDER, "run": "r"}, seed=3, settings=acts,
        protected=PROTECTIONS[type(settings.protection)](settings, net.keys), below_minimum=section.below_minimum,
        privacy=central_privacy(settings, section, sizes, run="r") if is_noised else None,
    )  # fmt: skip
    return run_rounds(plan, net, state or ServerState(0, start), RunFolder(folder), notify=notify)


def asked(net: Net, name: str, kind: str, body: dict, tensors: Tensors | None = None, number: int = 1) -> Reply:
    return client_round(Request(kind, number, name, tensors or {}, body), net.sites[name])
