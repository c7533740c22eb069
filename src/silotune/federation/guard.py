"""What a data holder puts around its client function: its policy first, then its own audit trail and signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from silotune.errors import AuditError, BudgetError, PolicyError, ProtectionError
from silotune.federation import policy as rules
from silotune.federation.jobs import JOB, WITHIN, SignedJob, claimed
from silotune.federation.policy import Asked, Policy
from silotune.federation.signing import request_digest, signed
from silotune.record.audit import LONGEST_NAME, OF_RUN, Head, Trail
from silotune.record.canonical import canonical, sha256
from silotune.record.signatures import SigningKey
from silotune.structs import Reply, Request
from silotune.tensors import count, digest, num_bytes

FIGURES_OF = ("train", "personalize", "evaluate")
"""Kinds whose replies hold figures; other bodies are keys, shares and signatures."""
NOT_FIGURES = (
    "num_examples", "steps", "tokens", "seconds", "core_seconds", "joules", "energy_source", "scoring",
)  # fmt: skip
"""Of a reply's body, what an aggregate or the books need, and the policy's ``metrics`` does not decide on."""


COHORTS: Mapping[str, tuple[str, ...]] = {
    "secure_sum.keys": ("terms", "cohort"),
    "secure_sum.shares": ("keys",),
    "secure_sum.accept": ("arrived",),
    "secure_sum.input": ("arrived",),
    "secure_sum.check": ("survivors",),
    "he.input": ("clients",),
}
"""Kind of request -> where its body names the sites of the sum, or how many they are."""


@dataclass(frozen=True)
class Guard:
    """A site's means of saying no, and of proving what was asked and answered.

    Attributes:
        policy: ``policy.toml``; read anew for every request, so that a change holds from the next one on.
        key: The site's own signing key.
        trail: The site's own audit chain.
        coordinators: Public keys of the coordinator; the head that comes with a request must be signed by one.
        task: What the site's examples are for.
        base_sha256: Fingerprint of the base model that the site holds.
        adapter_values: Values of the adapter that the site has made for the run; None: those of the request's tensors.
        epsilons: (request, delta) -> privacy loss at this site once the request is served: of the run, and of all
            runs. None where no ledger is kept, or where it gives none: then rules about epsilon refuse.
        charter: Hash and last day of the charter that the site holds; None where it holds none.
        clock: The time now.
        setup_sha256: Of the setup that the site opened the run with; None where it opened none.
    """

    policy: Path
    key: SigningKey
    trail: Trail
    coordinators: tuple[str, ...] = ()
    task: str | None = None
    base_sha256: str | None = None
    adapter_values: int | None = None
    epsilons: Callable[[Request, float], tuple[float, float] | None] | None = None
    charter: Callable[[], tuple[str, date] | None] = lambda: None
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    setup_sha256: str | None = None


def guarded(request: Request, guard: Guard, work: Callable[[Request], Reply]) -> Reply:
    """Asks the policy, does the work, withholds what may not leave, signs; all of it enters the site's trail.

    Raises:
        PolicyError: The policy refuses; the refusal is on the disk before this returns.
        SilotuneError: What the work itself raises.
    """
    asked_digest = request_digest(request, digest(request.tensors))
    place = {"kind": request.kind, "round": request.round_number, **_run_of(request)}
    guard.trail.add("request", {**place, "request": asked_digest, "head": request.head})
    try:
        allowed = rules.read_policy(guard.policy)
        _check_head(request, guard)
        asked = asked_of(request, guard, delta=allowed.delta)
        rules.check(allowed, asked)
        reply = _released(work(request), allowed)
        reply = signed(reply, request=asked_digest, head=request.head, key=guard.key)
        body = reply.body if reply.kind in FIGURES_OF else sha256(reply.body)  # no opened share stays in a file
        fields = {**place, "tensors": reply.digest, "body": body, "signature": reply.signature}
        guard.trail.add("reply", fields)
        if asked.epsilon_run is not None:
            spent = {"epsilon_run": asked.epsilon_run, "epsilon_total": asked.epsilon_total}
            guard.trail.add("privacy", {**place, **spent})
    except PolicyError as error:
        guard.trail.add("refusal", {**place, "rule": error.rule, "reason": str(error)})
        raise
    except (ProtectionError, BudgetError) as error:
        by = "privacy" if isinstance(error, BudgetError) else "protection"
        guard.trail.add("refusal", {**place, "rule": by, "reason": str(error)})
        raise
    except Exception as error:
        guard.trail.add("failure", {**place, "error": type(error).__name__})
        raise
    finally:
        guard.trail.flush()
    return reply


def asked_of(request: Request, guard: Guard, *, delta: float) -> Asked:
    """What a request asks, in the policy's terms; epsilon is counted at this ``delta``."""
    within = request.body.get(WITHIN)
    order = within if isinstance(within, Mapping) else request.body
    values = guard.adapter_values if guard.adapter_values is not None else count(request.tensors)
    asked = Asked(
        kind=request.kind,
        now=guard.clock(),
        task=guard.task,
        objective=_text_at(order, "training", "objective"),
        base_sha256=guard.base_sha256,
        adapter_values=values if request.tensors else None,
        cohort=_cohort(request),
        is_open=request.body.get("fraction", 1) != 1,
    )
    spent = guard.epsilons(request, delta) if guard.epsilons is not None else None
    if spent is not None:
        asked = replace(asked, epsilon_run=spent[0], epsilon_total=spent[1])
    if request.body.get(JOB) is not None:
        asked = _with_job(asked, request, guard)
    return _with_terms(asked, request.body.get("terms"))


def _with_terms(asked: Asked, terms: object) -> Asked:
    """The same, with what a sum that begins is said to be over."""
    if not isinstance(terms, Mapping) or asked.cohort is None:
        return asked
    named, cohort, threshold = asked.participants, asked.cohort, terms.get("threshold")
    found = float(threshold) if isinstance(threshold, (int, float)) else 0.0
    participants = cohort if named is None else min(named, cohort)
    return replace(asked, participants=participants, threshold=found, colluding=_colluding(terms.get("noise")))


def _colluding(noise: object) -> int | None:
    """Sites whose shares of noise do not count, as the terms say; None for an exact sum, 0 for what cannot be read."""
    if noise is None:
        return None
    found = noise.get("colluding") if isinstance(noise, Mapping) else None
    return found if isinstance(found, int) else 0


def _cohort(request: Request) -> int | None:
    """How many sites a request says are in its sum; None where it says nothing that can be counted."""
    found: Any = request.body if request.kind in COHORTS else None
    for key in COHORTS.get(request.kind, ()):
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, (list, tuple, Mapping)):
        return len(set(map(str, found)))
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _run_of(request: Request) -> dict[str, str]:
    """Which run a request says it belongs to: a site's trail is one for all of them."""
    job = claimed(request.body) or {}
    said = {name: job.get(name) for name in OF_RUN}
    return {name: value for name, value in said.items() if isinstance(value, str) and len(value) <= LONGEST_NAME}


def _with_job(asked: Asked, request: Request, guard: Guard) -> Asked:
    try:
        carried = SignedJob.model_validate(request.body[JOB])
    except ValidationError:
        return replace(asked, submitter_fault="the request's job cannot be read")
    fault = carried.fault(request.kind, request.round_number, request.body, now=asked.now)
    if fault is not None:
        return replace(asked, submitter_fault=fault)
    job, charter = carried.job, guard.charter()
    if guard.setup_sha256 not in (None, job.setup_sha256):
        return replace(asked, submitter_fault="the run's setup is not the one that the submitter signed")
    return replace(
        asked,
        submitter=carried.submitter,
        task=asked.task or job.task,
        participants=len(set(job.participants)),
        charter_sha256=job.charter_sha256,
        charter_until=charter[1] if charter is not None and charter[0] == job.charter_sha256 else None,
    )


def _check_head(request: Request, guard: Guard) -> None:
    """A coordinator commits itself to all that it has written so far, with every request."""
    if not guard.coordinators:
        return
    try:
        is_signed = Head.parse(request.head).is_signed_by(*guard.coordinators)
    except AuditError:
        is_signed = False
    if not is_signed:
        raise PolicyError("coordinator", "the head of the audit trail is missing or not signed by the coordinator")


def allowed_figures(reply: Reply, guard: Guard) -> Reply:
    """The answer to a training that goes into a sum, without the figures that the policy's ``metrics`` withholds.

    ``smallest_count`` is about what is seen of this site alone, which is nothing.

    Raises:
        PolicyError: The policy cannot be read.
    """
    allowed = rules.read_policy(guard.policy)
    return _without_withheld(reply, allowed.model_copy(update={"smallest_count": 0}))


def _without_withheld(reply: Reply, allowed: Policy) -> Reply:
    figures = tuple(name for name in reply.body if name not in NOT_FIGURES) if reply.kind in FIGURES_OF else ()
    return replace(reply, body=rules.released(allowed, reply.body, figures=figures))


def _released(reply: Reply, allowed: Policy) -> Reply:
    reply = _without_withheld(reply, allowed)
    rules.check_upload(allowed, num_bytes(reply.tensors) + len(canonical(reply.body)))
    return reply


def _text_at(body: Mapping[str, Any], section: str, key: str) -> str | None:
    part = body.get(section)
    value = part.get(key) if isinstance(part, Mapping) else None
    return value if isinstance(value, str) else None
