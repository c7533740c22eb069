"""A federation of functions with real keys, policies and trails, for the tests of governance; no model in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from silotune.config import Config
from silotune.errors import PolicyError
from silotune.evaluation.evaluate import Answers, figures
from silotune.federation.coordinator.audit import Audit, close, concludes
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.admission import Arrived, Facts, Gate, Membership
from silotune.federation.site.guard import Guard, serve
from silotune.federation.site.served import Served
from silotune.federation.wire.messages import Expected, decode_reply, encode, layout_of
from silotune.federation.wire.orders import Order
from silotune.federation.wire.run_setup import Setup, run_settings, without_places
from silotune.federation.wire.signed_job import JOB, Job, SignedJob, sign_job
from silotune.methods.algorithms import method
from silotune.record.audit import FILE, Trail
from silotune.record.plain_json import canonical_json, sha256
from silotune.record.runs import RunFolder
from silotune.record.signatures import SigningKey, new_key
from silotune.settings.sections import FederationSection
from silotune.structs import Failure, Reply, Request, ServerState, SiteState

NAMES = ("bank-a", "bank-b")
LABELS = ("negative", "neutral", "positive")
START = {"w": torch.tensor([1.0, -2.0, 0.5]), "b": torch.zeros(2)}
NOW = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)  # a Wednesday
NUMBER, BASE = "1" * 32, "a" * 64
KINDS = ("train", "evaluate", "countersign", "secure_sum.keys", "secure_sum.input")
CONFIG = Config.model_validate({"federation": {"rounds": 3}, "evaluation": {"per_client": True}})
SETTINGS = run_settings(CONFIG)
SUBMITTER, COSTS = new_key(), Facts(5, 1)
Answer = Callable[[Request], Reply]


def setup_of(config: Config = CONFIG, *, base: str = BASE) -> dict[str, Any]:
    return Setup(config=without_places(config), base=base).model_dump(mode="json")


def order_body(config: Config = CONFIG, number: str = NUMBER) -> dict[str, Any]:
    """The order to train or to score, without the job."""
    return Order(setup=sha256(setup_of(config)), run=f"{number}/federated", seed=config.seed).body()


def job(key: SigningKey = SUBMITTER, **changes: Any) -> SignedJob:
    made = {
        "id": NUMBER, "run": "demo", "config_sha256": "0" * 64, "task": "finance-news", "participants": NAMES,
        "rounds": 3, "kinds": KINDS, "setup_sha256": sha256(setup_of()), "expires": NOW + timedelta(hours=1),
    }  # fmt: skip
    return sign_job(Job(**{**made, **changes}), key)


def under(body: Mapping[str, Any], signed: SignedJob | None = None) -> dict[str, Any]:
    """A body with the job that it belongs to."""
    return {**body, JOB: (signed or job()).model_dump(mode="json")}


BODY = under(order_body())


def report(examples: int) -> dict[str, Any]:
    return {"num_examples": examples, "loss": 0.5, "steps": 1, "tokens": 10, "seconds": 0.1}


def scores() -> dict[str, Any]:
    """What a site says of its own five examples, as its labels are those of the run."""
    answered = Answers(LABELS, "likelihood", (0, 1, 2, 0, 1), (0, 1, 2, 2, 1), (0.9, 0.5, 0.7, 0.4, 1.0))
    return figures(answered)


def work(request: Request) -> Reply:
    """Moves half-way to the client's own target."""
    if request.kind != "train":
        body = scores() if request.kind == "evaluate" else {}
        return Reply(request.kind, request.round_number, request.client, {}, body)
    place = float(NAMES.index(request.client))
    delta = {name: 0.5 * (place - tensor) for name, tensor in request.tensors.items()}
    return Reply("train", request.round_number, request.client, delta, report(10 + int(place)))


@dataclass
class Opened:
    """A run that a site has opened, without examples or a model."""

    served: Served
    costs: Facts = COSTS
    lost: tuple[float, float] | None = None
    expected: Mapping[str, Expected] = field(
        default_factory=lambda: dict.fromkeys(("train", "evaluate", "secure_sum.input"), layout_of(START))
    )

    def facts(self, request: Request) -> Facts:
        return self.costs

    def epsilons(self, request: Request, delta: float) -> tuple[float, float] | None:
        return self.lost


@dataclass
class House:
    """One site: its guard, and what it opens once a request is admitted that far; ``opens`` counts it."""

    guard: Guard
    opened: Opened
    opens: int = 0

    def serve(
        self,
        request: Request,
        work: Answer = work,
        *,
        run: str = "demo",
        setup: Mapping[str, Any] | bytes | None = None,
    ) -> Reply:
        said = setup_of() if setup is None else setup
        arrived = Arrived(run, said if isinstance(said, bytes) else canonical_json(dict(said)), encode(request))
        return serve(arrived, self.guard, self._open, lambda admitted: work(admitted.request))

    def _open(self) -> Opened:
        self.opens += 1
        return self.opened


@dataclass
class Federation:
    """Sites with guards behind a transport of function calls; ``meddle`` changes replies on their way."""

    folder: Path
    policy: str = "format = 1\n"
    coordinator: SigningKey = field(default_factory=new_key)
    keys: dict[str, SigningKey] = field(default_factory=lambda: {name: new_key() for name in NAMES})
    submitters: tuple[str, ...] = (SUBMITTER.public,)
    meddle: Callable[[Reply], Reply] = lambda reply: reply
    work: Answer = work
    kept: dict[str, SiteState] = field(default_factory=dict)

    def house(
        self,
        name: str = "bank-a",
        *,
        costs: Facts = COSTS,
        lost: tuple[float, float] | None = None,
        run: str = "demo",
        **changes: Any,
    ) -> House:
        """A site as it starts: it remembers what is on its disk."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "policy.toml").write_text(self.policy)
        known = {"task": "finance-news", "base_sha256": BASE, "clock": lambda: NOW}
        members = Membership((self.coordinator.public,), self.submitters, NAMES)
        gate = Gate(name, place / "policy.toml", lambda: members, **{**known, **changes})
        trail = Trail(place / FILE, self.keys[name], actor=name)
        return House(Guard(gate, self.keys[name], trail), Opened(Served(place / f"{run}.jsonl"), costs, lost))

    def clients(self) -> Sequence[str]:
        return NAMES

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        for name, request in requests.items():
            run = request.body[JOB]["job"]["run"]
            try:
                reply = self.house(name, run=run).serve(request, self.work, run=run)
                yield self.meddle(decode_reply(encode(reply), layout_of(reply.tensors)))
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
        return Plan(rounds=rounds, method=made, body=BODY, seed=7, settings=SETTINGS, audit=self.audit(**changes))

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
