"""Decides whether a site does what a request asks. A site does nothing for a request before ``admit`` has passed it.

The checks run from top to bottom. The message is decoded, then checked against the federation's members, the signed
job, the run's setup and the site's policy, all before any of the site's examples or models is opened; then against
what serving it would cost, and against what was served before. What is not listed is refused. Nothing is learnt,
counted or sent before ``admit`` has returned, and what must not be forgotten is on the site's disk by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

from silotune.config import Config
from silotune.data.tasks import resolve
from silotune.errors import AuditError, ConfigError, PolicyError
from silotune.federation.kinds import KINDS, kind_named
from silotune.federation.site import policy as rules
from silotune.federation.site.policy import Asked, Policy
from silotune.federation.site.served import MEASURED, SCORED, TRAINED, Served
from silotune.federation.wire.messages import Expected, Header, decode_request, read_header
from silotune.federation.wire.orders import Order, read_order
from silotune.federation.wire.run_setup import Setup, check_plugins, check_scorable, differing, read_setup, setup_object
from silotune.federation.wire.signed_job import JOB, Job, SignedJob
from silotune.methods.algorithms import local_training
from silotune.record.audit import Head
from silotune.record.plain_json import sha256
from silotune.settings.base import exactly
from silotune.settings.plugins import only
from silotune.settings.privacy import ByClient
from silotune.structs import Request
from silotune.tensors import digest


@dataclass(frozen=True)
class Membership:
    """Who belongs to the federation, from the list that its authority signed.

    Attributes:
        coordinators: Public keys of the coordinator that count now.
        submitters: Public keys of those who may sign jobs.
        sites: Names of those who take part now: no other name counts as a participant.
    """

    coordinators: tuple[str, ...]
    submitters: tuple[str, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Gate:
    """What a site itself knows and checks requests against; nothing in it comes from a request.

    Attributes:
        site: Its name.
        policy: ``policy.toml``; read anew for every request, so that a change holds from the next one on.
        membership: The list of members as it is now.
        task: What the site's examples are for; empty where it has none of its own.
        base_sha256: Fingerprint of the base model that the site holds.
        charter: Hash and last day of the charter that the site holds; None where it holds none.
        clock: The time now.
    """

    site: str
    policy: Path
    membership: Callable[[], Membership]
    task: str = ""
    base_sha256: str | None = None
    charter: Callable[[], tuple[str, date] | None] = lambda: None
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)


@dataclass(frozen=True)
class Arrived:
    """A message as it came, before any check: the name of a run, its setup as JSON, and an encoded request."""

    run: str
    setup: bytes
    payload: bytes


@dataclass(frozen=True)
class Facts:
    """What serving a request would cost, which only the site can tell, once its examples are loaded.

    Attributes:
        adapter_values: Values of the adapter that the site has made for the run.
        steps: Optimiser steps of the round that the order asks for; None for an order that trains nothing.
    """

    adapter_values: int
    steps: int | None = None


class Ready(Protocol):
    """A run that the site has opened, with the site's own examples and model; only an admitted request reaches them."""

    @property
    def expected(self) -> Mapping[str, Expected]:
        """Kind of request -> what its tensors must look like; kinds that are left out carry none."""

    @property
    def served(self) -> Served:
        """What was served of the run before."""

    def facts(self, request: Request) -> Facts:
        """What serving a request would cost, without its cost in privacy, which takes long to compute."""

    def epsilons(self, request: Request, delta: float) -> tuple[float, float] | None:
        """Privacy loss of the run and of all runs at ``delta``, once it is served; None where nothing bounds it."""


@dataclass(frozen=True)
class Admitted:
    """A request that the site serves, its tensors decoded; the policy it was admitted under; and what it asks."""

    request: Request
    policy: Policy
    asked: Asked


def admit(arrived: Arrived, gate: Gate, open_run: Callable[[], Ready]) -> Admitted:
    """Checks a message, and gives its request if the site may serve it.

    Args:
        arrived: What came.
        gate: The site's.
        open_run: Opens the site's own examples and model for the run's setup; called after all checks that do not need
            them.

    Raises:
        PolicyError: The request is refused; ``rule`` names the rule that refuses it.
        MessageError: It is not a request of a known kind, or its tensors are not what the run's settings say.
        SilotuneError: What opening the run raises.
    """
    policy = rules.read_policy(gate.policy)
    with only(policy.plugins):
        return _admitted(arrived, gate, open_run, policy)


def _admitted(arrived: Arrived, gate: Gate, open_run: Callable[[], Ready], policy: Policy) -> Admitted:
    """A request that may be served under a policy; it can name only the plug-ins that this policy allows."""
    members = gate.membership()
    header = read_header(arrived.payload)
    kind_named(header.kind)
    _check_sender(header, gate, members)
    signed = _job_of(header, gate, members)
    document = setup_object(arrived.setup)
    _check_run(signed.job, arrived.run, document)
    check_plugins(document, policy.plugins)
    setup = read_setup(document)
    check_bounds(setup.config)
    _check_order(header, signed.job, setup)
    asked = _asked(header, signed, setup, gate, members)
    rules.check(policy, asked, rules=rules.RULES)
    opened = open_run()
    opened.served.begin(signed.job.id)
    request = decode_request(arrived.payload, opened.expected.get(header.kind, {}))
    asked = replace(_with_costs(asked, opened.facts(request)), leaked=opened.served.leaked)
    rules.check(policy, asked, rules=rules.LEAKS)
    rules.check(policy, asked, rules=rules.COSTS)
    asked = _with_epsilons(asked, opened.epsilons(request, policy.delta))
    rules.check(policy, asked, rules=rules.PRIVACY)
    _note_served(request, opened.served, policy)
    return Admitted(request, policy, asked)


def _check_sender(header: Header, gate: Gate, members: Membership) -> None:
    """Checks that it is for this site, and that the coordinator has signed the head of its audit trail."""
    if header.type != "request" or header.client != gate.site:
        raise PolicyError("address", f"a request for {header.client!r} reached {gate.site!r}")
    try:
        is_signed = Head.parse(header.beside).is_signed_by(*members.coordinators)
    except AuditError:
        is_signed = False
    if not is_signed:
        raise PolicyError("coordinator", "the head of the audit trail is missing or not signed by the coordinator")


def _job_of(header: Header, gate: Gate, members: Membership) -> SignedJob:
    """The job that the request belongs to: signed by a submitter, in time, for this site, kind, round and order."""
    try:
        signed = exactly(SignedJob, header.body.get(JOB) or {})
    except ValueError:
        raise PolicyError("job", "the request carries no signed job that can be read") from None
    job, kind = signed.job, KINDS[header.kind]
    if not signed.is_signed():
        raise PolicyError("job", "the job's signature does not fit")
    if signed.submitter not in members.submitters:
        raise PolicyError("submitters", "the job is not signed by a submitter of this federation")
    if (said := signed.expiry(gate.clock())) is not None:
        raise PolicyError("job.expired", said)
    if gate.site not in job.participants:
        raise PolicyError("job.site", "the job does not name this site")
    if header.kind not in job.kinds:
        raise PolicyError("job.kind", f"requests of kind {header.kind!r} do not belong to the job")
    if not kind.first_round <= header.round_number <= job.rounds:
        raise PolicyError("job.round", f"round {header.round_number} is not one of the job's {job.rounds}")
    return signed


def _check_run(job: Job, run: str, setup: Mapping[str, Any]) -> None:
    """Checks that the request's run and the setup that came with it are those of the job."""
    if job.run != run:
        raise PolicyError("job.run", f"the job is of the run {job.run!r}, the request came with {run!r}")
    if sha256(setup) != job.setup_sha256:
        raise PolicyError("job.setup", "the run's setup is not the one that the submitter signed")


def _check_order(header: Header, job: Job, setup: Setup) -> None:
    """Checks that the order in a request names exactly the signed setup, the job's run and the run's seed."""
    kind, config = KINDS[header.kind], setup.config
    if job.task != config.data.task or job.rounds != config.federation.rounds:
        raise PolicyError("job.setup", "the job is of another task, or of other rounds, than the run's setup")
    if not kind.uses_examples:
        return
    order = read_order(Request(header.kind, header.round_number, header.client, {}, header.body))
    wanted = Order(setup=job.setup_sha256, run=f"{job.id}/federated", seed=config.seed)
    if order.model_copy(update={JOB: None}) != wanted:
        said, meant = (each.model_dump(mode="json", exclude={JOB}) for each in (order, wanted))
        raise PolicyError("job.order", f"the {header.kind} order names another {next(differing(meant, said), 'value')}")
    if kind.scores:
        try:
            check_scorable(tuple(resolve(config.data).options))
        except ConfigError as error:
            raise PolicyError("bounds", str(error)) from None


BOUNDS: Mapping[str, float] = {
    "adapter.rank": 1 << 13,
    "evaluation.batch_size": 1 << 16,
    "evaluation.max_new_tokens": 4096,
    "data.num_train": 1e6,
    "data.num_validation": 1e6,
    "data.num_test": 1e6,
    "data.partition.clients": 1e5,
    "federation.rounds": 1e6,
    "model.max_length": 1 << 20,
    "training.learning_rate": 1e3,
    "training.weight_decay": 1e3,
    "training.batch_size": 1 << 16,
    "training.gradient_accumulation": 1 << 16,
    "training.epochs": 1e4,
    "training.clip_norm": 1e9,
    "training.objective.beta": 1e4,
    "training.objective.desirable_weight": 1e4,
    "training.objective.undesirable_weight": 1e4,
    "training.threads": 1024,
    "record.checkpoint_every": 1000,
}
"""Setting of a run -> the largest value that a site takes; steps of a round are the policy's ``most_steps``."""


def check_bounds(config: Config) -> None:
    """Refuses settings that no run needs and that could use up a site's memory or time.

    Raises:
        PolicyError: A setting is beyond its bound.
    """
    for name, most in BOUNDS.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)  # only the chosen variant has its settings
        if value is not None and value > most:
            raise PolicyError("bounds", f"{name} = {value:g}, at most {most:g} is served")


def _asked(header: Header, signed: SignedJob, setup: Setup, gate: Gate, members: Membership) -> Asked:
    """What a request asks, in the policy's terms, but for what it costs."""
    job, config, charter = signed.job, setup.config, gate.charter()
    tasks = tuple(config.data.mixture) or (config.data.task,)
    if gate.task and gate.task not in tasks:
        raise PolicyError("tasks", f"the run is for task {config.data.task!r}, the site's examples for {gate.task!r}")
    cohort = _cohort(header)
    if "terms" in header.body:
        _check_cohort(job, config, cohort)
    asked = Asked(
        kind=header.kind,
        now=gate.clock(),
        tasks=(gate.task,) if gate.task else tasks,
        objective=config.training.objective.type,
        base_sha256=gate.base_sha256,
        participants=len(set(job.participants) & set(members.sites)),
        cohort=cohort,
        audits_leakage=config.audit.leakage and config.audit.reserve > 0,
        shows_gradients=_shows_gradients(config),
        generates=KINDS[header.kind].scores and config.evaluation.scoring == "generation",
        submitter=signed.submitter,
        charter_sha256=job.charter_sha256,
        charter_until=charter[1] if charter is not None and charter[0] == job.charter_sha256 else None,
    )
    return _with_terms(asked, header.body.get("terms"))


def _shows_gradients(config: Config) -> bool:
    """Whether a run's updates are plain gradient steps that a site adds no noise to."""
    is_plain = local_training(config.federation, config.training).optimizer.is_plain
    return is_plain and not config.privacy.dp.costs_sites


def _check_cohort(job: Job, config: Config, cohort: int | None) -> None:
    """Checks that a sum begins over as many sites as the signed settings say: too few would hide each other badly."""
    federation, everybody = config.federation, len(set(job.participants))
    if isinstance(config.privacy.dp, ByClient) and config.privacy.dp.client_sampling == "poisson":
        return  # how many are drawn differs by round: the site's least cohort bounds it
    wanted = min(federation.clients_per_round or everybody, everybody)
    if cohort is None or cohort < wanted:
        raise PolicyError("job.cohort", f"the sum is over {cohort} sites, but the job says {wanted}")


def _with_terms(asked: Asked, terms: object) -> Asked:
    """The same, with the participants, threshold and colluding sites that the terms of a beginning sum name."""
    if not isinstance(terms, Mapping) or asked.cohort is None:
        return asked
    threshold = terms.get("threshold")
    found = float(threshold) if isinstance(threshold, (int, float)) and threshold is not True else 0.0
    participants = asked.cohort if asked.participants is None else min(asked.participants, asked.cohort)
    return replace(asked, participants=participants, threshold=found, colluding=_colluding(terms.get("noise")))


def _colluding(noise: object) -> int | None:
    """Sites whose shares of noise do not count, as the terms say; None for an exact sum, 0 for what cannot be read."""
    if noise is None:
        return None
    found = noise.get("colluding") if isinstance(noise, Mapping) else None
    return found if type(found) is int else 0


def _cohort(header: Header) -> int | None:
    """How many sites a request says are in its sum; None where its kind or its body does not tell."""
    path = KINDS[header.kind].cohort
    found: Any = header.body if path else None
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, (list, tuple, Mapping)):
        return len(set(map(str, found)))
    return found if type(found) is int else None


def _with_costs(asked: Asked, facts: Facts) -> Asked:
    return replace(asked, adapter_values=facts.adapter_values, steps=facts.steps)


def _with_epsilons(asked: Asked, epsilons: tuple[float, float] | None) -> Asked:
    return asked if epsilons is None else replace(asked, epsilon_run=epsilons[0], epsilon_total=epsilons[1])


def _note_served(request: Request, served: Served, policy: Policy) -> None:
    """Records the model that is about to be trained or scored; the same model again does not count once more."""
    kind, model = KINDS[request.kind], digest(request.tensors)
    if kind.trains:
        place = f"{request.kind}:{request.round_number}"
        served.note(TRAINED, place, model, most=policy.most_models, rule="most_models")
    if kind.audits:
        served.note(MEASURED, "run", model, most=policy.most_scorings, rule="most_scorings")
    if kind.scores:
        body = {name: value for name, value in request.body.items() if name != JOB}
        what = sha256({"model": model, "body": body})
        served.note(SCORED, "run", what, most=policy.most_scorings, rule="most_scorings")
