"""What each side signs: a site its reply to this request and no other, a submitter the job that sites take part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field

from silotune.errors import MessageError
from silotune.record.plain_json import canonical, sha256
from silotune.record.signatures import SigningKey, verify
from silotune.settings.base import NAME, Positive, Section
from silotune.structs import Reply, Request
from silotune.tensors import digest


def request_digest(request: Request, tensors: str) -> str:
    """SHA-256 over all that a request says; the head of the coordinator's trail is signed beside it.

    Args:
        request: The request.
        tensors: Digest of its tensors as they travel.
    """
    return sha256(
        {
            "kind": request.kind,
            "round": request.round_number,
            "client": request.client,
            "body": request.body,
            "tensors": tensors,
        }
    )


def statement(reply: Reply, *, request: str, head: str) -> dict[str, Any]:
    """What is signed: the digests of the reply, the digest of its request, and the head that came with the request."""
    return {
        "kind": reply.kind,
        "round": reply.round_number,
        "client": reply.client,
        "body": sha256(reply.body),
        "tensors": reply.digest or digest(reply.tensors),
        "request": request,
        "head": head,
    }


def signed(reply: Reply, *, request: str, head: str, key: SigningKey) -> Reply:
    """The reply with the site's signature; ``reply.tensors`` must be what travels."""
    with_digest = replace(reply, digest=digest(reply.tensors))
    said = canonical(statement(with_digest, request=request, head=head))
    return replace(with_digest, signature=key.sign("reply", said))


def check_signature(reply: Reply, said: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Checks the signature of a reply, and gives the key that signed it.

    Raises:
        MessageError: The reply is not signed, or not by one of these keys for this request.
    """
    if not reply.signature:
        raise MessageError(f"the reply of {reply.client!r} is not signed")
    message = canonical(said)
    for key in keys:
        if verify(key, "reply", message, reply.signature):
            return key
    raise MessageError(f"the signature of {reply.client!r} does not fit: another key, or another request's answer")


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
