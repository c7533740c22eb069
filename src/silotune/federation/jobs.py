"""A job: what a submitter asks sites to take part in, signed once and carried by every request of the run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, Field

from silotune.record.canonical import canonical, sha256
from silotune.record.signatures import SigningKey, verify
from silotune.settings import Positive, Section

JOB, WITHIN = "job", "train"
"""Keys of a request's body: the signed job, and in a protected sum the order to train."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Job(Section):
    """What the submitter vouches for.

    Attributes:
        run: Name of the run.
        config_sha256: Of the run's whole configuration, canonical JSON.
        task: What is learnt.
        participants: The sites that are asked.
        rounds: In all.
        orders: Kind of request -> SHA-256 of its body without the job, for bodies that stay the same all along.
        setup_sha256: Of what goes beside every message (model, adapter, data, lengths), canonical JSON; None where
            nothing does.
        charter_sha256: Of the federation's charter; None where there is none.
        expires: No request of the job is valid later.
    """

    run: str
    config_sha256: Sha256
    task: str
    participants: tuple[str, ...]
    rounds: Positive
    orders: dict[str, Sha256]
    setup_sha256: Sha256 | None = None
    charter_sha256: Sha256 | None = None
    expires: AwareDatetime


class SignedJob(Section):
    """A job with its submitter's public key and signature."""

    job: Job
    submitter: str
    signature: str

    def fault(self, kind: str, round_number: int, body: Mapping[str, Any], *, now: datetime) -> str | None:
        """What is wrong with the job of a request, in one line; None when nothing is."""
        if not verify(self.submitter, "job", canonical(self.job.model_dump(mode="json")), self.signature):
            return "the job's signature does not fit"
        if now > self.job.expires:
            return f"the job expired at {self.job.expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        if round_number > self.job.rounds:
            return f"round {round_number} is beyond the {self.job.rounds} rounds of the job"
        within = body.get(WITHIN)
        signed_as, order = (WITHIN, within) if isinstance(within, Mapping) else (kind, body)
        if signed_as in self.job.orders and self.job.orders[signed_as] != order_digest(order):
            return f"the settings of the {kind} request are not those that the submitter signed"
        return None


def claimed(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a request's body says its job is, before its signature is looked at; None where it says nothing."""
    carried = body.get(JOB)
    job = carried.get("job") if isinstance(carried, Mapping) else None
    return job if isinstance(job, Mapping) else None


def sign_job(job: Job, key: SigningKey) -> SignedJob:
    """The job, signed by its submitter."""
    signature = key.sign("job", canonical(job.model_dump(mode="json")))
    return SignedJob(job=job, submitter=key.public, signature=signature)


def order_digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a request's body without the job."""
    return sha256({name: value for name, value in body.items() if name != JOB})
