"""A federation of functions with real keys, policies and trails, for the tests of governance; no model in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from silotune.errors import PolicyError
from silotune.federation.guard import Guard, guarded
from silotune.federation.jobs import Job, SignedJob, order_digest, sign_job
from silotune.federation.server import Plan, run_rounds
from silotune.federation.witness import Audit, close, concludes
from silotune.methods.algorithms import method
from silotune.record.audit import FILE, Trail
from silotune.record.runs import RunFolder
from silotune.record.signatures import SigningKey, new_key
from silotune.sections import FederationSection
from silotune.structs import Failure, Reply, Request, ServerState, SiteState

NAMES = ("bank-a", "bank-b")
START = {"w": torch.tensor([1.0, -2.0, 0.5]), "b": torch.zeros(2)}
BODY = {"training": {"objective": "sft"}, "rounds": 3}
NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)  # a Wednesday
Answer = Callable[[Request], Reply]


def report(examples: int) -> dict[str, Any]:
    return {"num_examples": examples, "loss": 0.5, "steps": 1, "tokens": 10, "seconds": 0.1}


def work(request: Request) -> Reply:
    """Moves half-way to the client's own target."""
    if request.kind != "train":
        return Reply(request.kind, request.round_number, request.client, {})
    place = float(NAMES.index(request.client))
    delta = {name: 0.5 * (place - tensor) for name, tensor in request.tensors.items()}
    return Reply("train", request.round_number, request.client, delta, report(10 + int(place)))


def job(key: SigningKey, *, body: Mapping[str, Any] = BODY, **changes: Any) -> SignedJob:
    made = {
        "run": "demo", "config_sha256": "0" * 64, "task": "finance-news", "participants": NAMES, "rounds": 3,
        "orders": {"train": order_digest(body)}, "expires": NOW + timedelta(hours=1),
    }  # fmt: skip
    return sign_job(Job(**{**made, **changes}), key)


@dataclass
class Federation:
    """Sites with guards behind a transport of function calls; ``meddle`` changes replies on their way."""

    folder: Path
    policy: str = "format = 1\n"
    coordinator: SigningKey = field(default_factory=new_key)
    keys: dict[str, SigningKey] = field(default_factory=lambda: {name: new_key() for name in NAMES})
    meddle: Callable[[Reply], Reply] = lambda reply: reply
    work: Answer = work
    kept: dict[str, SiteState] = field(default_factory=dict)

    def guard(self, name: str, **changes: Any) -> Guard:
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "policy.toml").write_text(self.policy)
        trail = Trail(place / FILE, self.keys[name], actor=name)
        known = {"coordinators": (self.coordinator.public,), "task": "finance-news", "clock": lambda: NOW}
        return Guard(place / "policy.toml", self.keys[name], trail, **{**known, **changes})

    def clients(self) -> Sequence[str]:
        return NAMES

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for name, request in requests.items():
            try:
                yield self.meddle(guarded(request, self.guard(name), self.work))
            except PolicyError as error:
                yield Failure(name, request.round_number, request.kind, str(error), rule=error.rule)

    def states(self) -> dict[str, SiteState]:
        return self.kept

    def audit(self, **changes: Any) -> Audit:
        trail = Trail(self.folder / "run" / FILE, self.coordinator, actor="coordinator")
        keys = {name: (key.public,) for name, key in self.keys.items()}
        return Audit(trail, RunFolder(self.folder / "run"), keys, **changes)

    def plan(self, *, rounds: int = 2, **changes: Any) -> Plan:
        made = method(FederationSection())
        return Plan(rounds=rounds, method=made, body=BODY, seed=7, audit=self.audit(**changes))

    def run(self, *, rounds: int = 2, state: ServerState | None = None, **changes: Any) -> ServerState:
        made = self.plan(rounds=rounds, **changes)
        return run_rounds(made, self, state or ServerState(0, dict(START)), RunFolder(self.folder / "run"))

    def finish(self, state: ServerState) -> None:
        """Ends the run as an experiment does: its adapter, its result, the trail closed over all of it."""
        run, audit = RunFolder(self.folder / "run"), self.audit()
        result = {"round": state.round_number, "metrics": {"accuracy": 0.5}}
        run.save_adapter(state.weights, {}, card="")
        concludes(audit, weights=state.weights, adapter=state.weights, result=result)
        run.write_json("result", result)
        close(audit, run.path, round_number=state.round_number)

    def request(self, name: str = "bank-a", **changes: Any) -> Request:
        head = Trail(self.folder / "run" / FILE, self.coordinator, actor="coordinator").head().text()
        return replace(Request("train", 1, name, dict(START), BODY, head=head), **changes)
