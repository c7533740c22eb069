"""Asks the sites to sign the end of a closed audit trail, and keeps their signatures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from silotune.errors import MessageError, RunFolderError
from silotune.federation.coordinator import forms
from silotune.federation.coordinator.audit import Audit
from silotune.federation.kinds import COUNTERSIGN
from silotune.federation.wire.signed_job import JOB
from silotune.federation.wire.signing import check_signature, request_digest, statement
from silotune.federation.wire.transport import Transport
from silotune.record.audit import COUNTERSIGNED
from silotune.record.files import read_json, write_bytes
from silotune.record.plain_json import canonical
from silotune.record.signatures import verify
from silotune.structs import Failure, Reply, Request
from silotune.tensors import digest

if TYPE_CHECKING:
    from silotune.federation.coordinator.rounds import Plan

_COUNTERSIGN_SECONDS = 60.0


def countersign(plan: Plan, transport: Transport, round_number: int) -> tuple[str, ...]:
    """Asks every site with a key to sign the end of the closed audit trail; gives those that did, within a minute."""
    if plan.audit is None or not plan.audit.keys:
        return ()
    requests = _requests(plan.audit, round_number)
    if JOB in plan.body:  # a site's policy asks who wants its signature
        requests = {name: replace(request, body={JOB: plan.body[JOB]}) for name, request in requests.items()}
    replies = transport.exchange(requests, timeout_seconds=min(plan.timeout_seconds, _COUNTERSIGN_SECONDS))
    return _keep(plan, plan.audit, replies, requests)


def _requests(audit: Audit, round_number: int) -> dict[str, Request]:
    """The requests to sign the head of the closed trail, for every site with a key that has not signed it yet."""
    head = audit.trail.head().text()
    names = uncountersigned(audit)
    return {name: Request(COUNTERSIGN, round_number, name, {}, head=head) for name in names}


def uncountersigned(audit: Audit) -> tuple[str, ...]:
    """Sites with a key whose signature of the trail's end is not kept yet."""
    signed = {row["client"] for row in _kept(audit)}
    return tuple(name for name in audit.keys if name not in signed)


def _kept(audit: Audit) -> list[dict[str, Any]]:
    """The kept signatures of this head; anything else in the file is ignored, and written over later."""
    head, place = audit.trail.head().text(), audit.run.path / COUNTERSIGNED
    try:
        rows = read_json(place) if place.is_file() else []
        return [row for row in rows if row["statement"]["head"] == head and _is_signed(row, audit)]
    except (RunFolderError, KeyError, TypeError):
        return []


def _is_signed(row: Mapping[str, Any], audit: Audit) -> bool:
    """Whether one of the site's keys signed what the row says."""
    return row["key"] in audit.keys[row["client"]] and verify(
        row["key"], "reply", canonical(row["statement"]), row["signature"]
    )


def _keep(
    plan: Plan, audit: Audit, replies: Iterator[Reply | Failure], requests: Mapping[str, Request]
) -> tuple[str, ...]:
    """Writes the sites' signatures of the head beside the trail; a site that gives none is left out.

    Returns:
        The sites that signed.
    """
    rows = []
    for reply in replies:
        if isinstance(reply, Failure) or reply.kind != COUNTERSIGN or reply.client not in requests:
            continue
        request = requests[reply.client]
        said = statement(reply, request=request_digest(request, digest(request.tensors)), head=request.head)
        try:
            forms.read(reply, plan.settings)
            key = check_signature(reply, said, audit.keys[reply.client])
        except MessageError:
            continue
        rows.append({"client": reply.client, "key": key, "statement": said, "signature": reply.signature})
    if rows:
        write_bytes(audit.run.path / COUNTERSIGNED, canonical([*_kept(audit), *rows]) + b"\n")
    return tuple(str(row["client"]) for row in rows)
