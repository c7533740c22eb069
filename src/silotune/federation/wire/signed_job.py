"""A job: what a submitter asks sites to take part in, signed once and carried by every request of the run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field

from silotune.record.plain_json import canonical
from silotune.record.signatures import SigningKey, verify
from silotune.settings.base import NAME, Positive, Section

JOB, WITHIN = "job", "train"
"""Keys of a request's body: the signed job, and in a protected sum the order to train."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
RunName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
MOST_SITES, MOST_ROUNDS, MOST_KINDS = 100_000, 1_000_000, 64


def _in_utc(moment: datetime) -> datetime:
    """Refuses a moment of another time zone that lies outside the years 1 to 9999 in UTC."""
    try:
        moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("the moment is not in the years 1 to 9999 in UTC") from None
    return moment


class Job(Section):
    """What the submitter vouches for.

    Attributes:
        id: Drawn by the submitter; tells this run from all others, in ledgers too.
        run: Name of the run.
        config_sha256: Of the run's whole configuration as it was submitted, canonical JSON.
        task: What is learnt.
        participants: The sites that are asked.
        rounds: In all.
        kinds: The kinds of requests that belong to it; no other is served.
        setup_sha256: Of the run's setup, which travels beside every message, as canonical JSON: all settings that the
        sites act by.
        charter_sha256: Of the federation's charter; None where there is none.
        expires: No request of the job is valid later.
    """

    id: RunId
    run: RunName
    config_sha256: Sha256
    task: Annotated[str, Field(max_length=200)]
    participants: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_SITES)]
    rounds: Annotated[Positive, Field(le=MOST_ROUNDS)]
    kinds: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_KINDS)]
    setup_sha256: Sha256
    charter_sha256: Sha256 | None = None
    expires: Annotated[AwareDatetime, AfterValidator(_in_utc)]


class SignedJob(Section):
    """A job with its submitter's public key and signature."""

    job: Job
    submitter: Annotated[str, Field(max_length=200)]
    signature: Annotated[str, Field(max_length=200)]

    def is_signed(self) -> bool:
        """Whether the signature is that of the submitter that it names."""
        return verify(self.submitter, "job", canonical(self.job.model_dump(mode="json")), self.signature)

    def expiry(self, now: datetime) -> str | None:
        """When the job expired, in words; None while it holds."""
        if now <= self.job.expires:
            return None
        return f"the job expired at {self.job.expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def claimed(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a request's body says its job is, before its signature is looked at; None where it says nothing."""
    carried = body.get(JOB)
    job = carried.get("job") if isinstance(carried, Mapping) else None
    return job if isinstance(job, Mapping) else None


def sign_job(job: Job, key: SigningKey) -> SignedJob:
    """The job, signed by its submitter."""
    signature = key.sign("job", canonical(job.model_dump(mode="json")))
    return SignedJob(job=job, submitter=key.public, signature=signature)
