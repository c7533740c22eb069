"""What a data holder puts around its client function: admission, a check of what may leave, signatures, and a trail.

``serve`` takes a request the whole way through a site. Whatever happens is written to the site's own audit trail, and
an unexpected error fails that request only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256 as hashed
from typing import Any

from silotune.errors import BudgetError, MessageError, PolicyError, ProtectionError
from silotune.federation.kinds import KINDS
from silotune.federation.site import policy as rules
from silotune.federation.site.admission import Admitted, Arrived, Gate, Ready, admit
from silotune.federation.site.policy import Asked, Policy
from silotune.federation.wire.messages import Header, read_header
from silotune.federation.wire.signed_job import claimed
from silotune.federation.wire.signing import request_digest, signed
from silotune.record.audit import LONGEST_NAME, OF_RUN, Trail
from silotune.record.plain_json import canonical, sha256
from silotune.record.signatures import SigningKey
from silotune.structs import Reply
from silotune.tensors import digest, num_bytes

NOT_FIGURES = (
    "num_examples", "steps", "tokens", "seconds", "core_seconds", "joules", "energy_source", "scoring",
    "others",
)  # fmt: skip
"""Fields of a reply's body that an aggregate or the accounts need; the policy's ``metrics`` does not decide on them."""


@dataclass(frozen=True)
class Guard:
    """A site's means of saying no, and of proving what was asked and answered.

    Attributes:
        gate: What it checks a request against.
        key: The site's own signing key.
        trail: The site's own audit chain.
    """

    gate: Gate
    key: SigningKey
    trail: Trail


def serve(arrived: Arrived, guard: Guard, open_run: Callable[[], Ready], work: Callable[[Admitted], Reply]) -> Reply:
    """Admits a request, does the work, withholds what may not leave, and signs; the site's trail records all of it.

    Args:
        arrived: What came.
        guard: The site's.
        open_run: As ``admit`` needs it.
        work: What is done with a request that is admitted.

    Raises:
        PolicyError: The site refuses; the refusal is on the disk before this returns.
        Exception: What the work itself raises, after it was written down.
    """
    place = {**_place_of(arrived), "message": hashed(arrived.payload).hexdigest()}
    trail = guard.trail
    trail.add("request", place)
    trail.flush()
    place = {name: value for name, value in place.items() if name not in ("message", "head")}
    try:
        admitted = admit(arrived, guard.gate, open_run)
        request = admitted.request
        reply = released(work(admitted), admitted.policy)
        asked_digest = request_digest(request, digest(request.tensors))
        reply = signed(reply, request=asked_digest, head=request.head, key=guard.key)
        body = reply.body if KINDS[reply.kind].is_seen_alone else sha256(reply.body)  # no opened share stays in a file
        fields = {"request": asked_digest, "tensors": reply.digest, "body": body, "signature": reply.signature}
        sizes = {"bytes_down": len(arrived.payload), "bytes_up": _sent(reply)}
        trail.add("reply", {**place, **fields, **sizes})
        _add_spent(trail, place, admitted.asked)
    except PolicyError as error:
        trail.add("refusal", {**place, "rule": error.rule, "reason": str(error)})
        raise
    except (ProtectionError, BudgetError, MessageError) as error:
        trail.add("refusal", {**place, "rule": _rule_of(error), "reason": str(error)})
        raise
    except BaseException as error:
        trail.add("failure", {**place, "error": type(error).__name__})
        raise
    finally:
        trail.flush()
    return reply


def _rule_of(error: Exception) -> str:
    """The name under which the trail records a refusal that does not come from the policy."""
    if isinstance(error, BudgetError):
        return "privacy"
    return "protection" if isinstance(error, ProtectionError) else "message"


def _add_spent(trail: Trail, place: dict[str, Any], asked: Asked) -> None:
    if asked.epsilon_run is not None:
        spent = {"epsilon_run": asked.epsilon_run, "epsilon_total": asked.epsilon_total}
        trail.add("privacy", {**place, **spent})


def _place_of(arrived: Arrived) -> dict[str, Any]:
    """What a request says about itself, for the site's trail of all runs; empty fields if it cannot be read."""
    try:
        header = read_header(arrived.payload)
    except MessageError:
        return {"kind": "", "round": 0}
    return {"kind": header.kind, "round": header.round_number, **_run_of(header), "head": header.beside}


def _run_of(header: Header) -> dict[str, str]:
    job = claimed(header.body) or {}
    said = {name: job.get(name) for name in OF_RUN}
    return {name: value for name, value in said.items() if isinstance(value, str) and len(value) <= LONGEST_NAME}


def released(reply: Reply, allowed: Policy) -> Reply:
    """The reply as it may leave.

    Raises:
        PolicyError: The reply is about too few examples, or is too large.
    """
    figures: tuple[str, ...] = ()
    if KINDS[reply.kind].is_seen_alone:
        figures = tuple(name for name in reply.body if name not in NOT_FIGURES)
    reply = replace(reply, body=rules.released(allowed, reply.body, figures=figures))
    rules.check_upload(allowed, _sent(reply))
    return reply


def _sent(reply: Reply) -> int:
    """Bytes of a reply's tensors and body."""
    return num_bytes(reply.tensors) + len(canonical(reply.body))


def figures_within(reply: Reply, metrics: tuple[str, ...] | None) -> Reply:
    """The answer to a training that goes into a sum, without the figures that the policy's ``metrics`` withholds.

    ``smallest_count`` does not apply here, because nobody sees the figures of this site alone.
    """
    figures = tuple(name for name in reply.body if name not in NOT_FIGURES)
    return replace(reply, body=rules.released(Policy(metrics=metrics), reply.body, figures=figures))
