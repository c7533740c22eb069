"""What a coordinator writes into its audit trail while rounds go on, how it checks what sites sign, and how it asks
them to sign the end.

Every function takes the ``Audit`` of the run, or None where no trail is kept: then it does nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.errors import MessageError, RunFolderError
from silotune.federation.coordinator import forms
from silotune.federation.kinds import COUNTERSIGN, kind_named
from silotune.federation.wire.signed_job import JOB
from silotune.federation.wire.signing import check_signature, request_digest, statement
from silotune.federation.wire.transport import Transport
from silotune.record.audit import CLOSED, COUNTERSIGNED, FILE, Head, Trail
from silotune.record.files import read_json, write_bytes
from silotune.record.manifest import write_manifest
from silotune.record.plain_json import canonical, sha256
from silotune.record.runs import RunFolder
from silotune.record.signatures import verify
from silotune.structs import Failure, Reply, Request, ServerState, Tensors
from silotune.tensors import digest

if TYPE_CHECKING:
    from silotune.federation.coordinator.rounds import Plan


@dataclass(frozen=True)
class Audit:
    """What a coordinator needs to keep a trail.

    Attributes:
        trail: Its chain.
        run: Folder of the run of rounds.
        keys: Client -> its public signing keys; the replies of clients named here must be signed.
        keep_updates: Keep every update, so that the aggregation can be done again.
        keep_models: Keep the global model of every round, which every client has seen.
        promise: What the run guarantees, in lines.
    """

    trail: Trail
    run: RunFolder
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keep_updates: bool = False
    keep_models: bool = False
    promise: tuple[str, ...] = ()


def model_name(number: int) -> str:
    """Under which name the global model after a round is kept; 0 is what the first round began with."""
    return f"round-{number}-weights"


def outgoing(audit: Audit | None, requests: Mapping[str, Request]) -> dict[str, Request]:
    """Writes requests to the trail, and returns them with its head where clients sign their replies.

    The trail is on the disk before its head is sent.
    """
    if audit is None:
        return dict(requests)
    known = Digests()
    for name, request in requests.items():
        tensors = known(request.as_sent().tensors)
        fields = {"kind": request.kind, "round": request.round_number, "client": name, "tensors": tensors}
        made = request_digest(request, tensors)
        audit.trail.add("request", {**fields, "body": sha256(request.body), "request": made})
    if not audit.keys:
        return dict(requests)
    audit.trail.flush()
    head = audit.trail.head().text()
    return {name: replace(request, head=head) for name, request in requests.items()}


def believes(audit: Audit | None, reply: Reply, request: Request | None, digests: Digests) -> None:
    """Checks the signature of a reply, and writes the reply to the trail.

    Raises:
        MessageError: The reply is not signed by its client for this request.
    """
    if audit is None:
        return
    fields: dict[str, Any] = {"kind": reply.kind, "round": reply.round_number, "client": reply.client}
    keys = audit.keys.get(reply.client)
    if keys is not None and request is not None:
        said = statement(reply, request=request_digest(request, digests(request.as_sent().tensors)), head=request.head)
        fields |= {"key": check_signature(reply, said, keys), "signature": reply.signature, "statement": said}
    said_of = {"report": reply.body} if kind_named(reply.kind).is_seen_alone else {"body": sha256(reply.body)}
    fields |= {"tensors": reply.digest or digest(reply.tensors), **said_of, "bytes": reply.bytes_up}
    if audit.keep_updates and reply.tensors:
        name = f"round-{reply.round_number}-{sha256(reply.client)[:16]}"
        fields |= {"update": digest(reply.tensors), "file": name}
        audit.run.keep_tensors(name, reply.tensors)
    audit.trail.add("reply", fields)


def fails(audit: Audit | None, failure: Failure) -> None:
    """Records that a client gave no usable reply; where the site's policy refused, the entry names the rule."""
    if audit is not None:
        fields = {"round": failure.round_number, "client": failure.client, "stage": failure.stage}
        event = "refusal" if failure.rule else "failure"
        rule = {"rule": failure.rule} if failure.rule else {}
        audit.trail.add(event, {**fields, **rule, "reason": failure.reason})


def begins(audit: Audit | None, state: ServerState, settings: Mapping[str, Any]) -> None:
    """Records that a run starts, or that it goes on after the round of its checkpoint."""
    if audit is None:
        return
    fields: dict[str, Any] = {"round": state.round_number, "weights": digest(state.weights)}
    if state.round_number == 0:
        job = (settings.get("job") or {}).get("job", {})
        fields |= {"settings": sha256(settings), "python": platform.python_version()}
        fields |= {"promise": list(audit.promise)} if audit.promise else {}
        fields |= {name: job[name] for name in ("run", "config_sha256", "charter_sha256") if job.get(name)}
        if audit.keep_updates or audit.keep_models:
            audit.run.keep_tensors(model_name(0), state.weights)
    audit.trail.add("started" if audit.trail.entries == 0 else "resumed", fields)


def aggregates(audit: Audit | None, number: int, clients: Sequence[str], weights: Tensors, *, share: float) -> None:
    """Records that the updates of these clients, in this order, became new weights; ``share`` is of all clients."""
    if audit is not None:
        fields = {"round": number, "clients": list(clients), "share": share, "weights": digest(weights)}
        audit.trail.add("aggregation", fields)
        if audit.keep_models:
            audit.run.keep_tensors(model_name(number), weights)


def falls_short(audit: Audit | None, number: int, *, skipped: bool) -> None:
    """Records that a round had too few usable replies: they are dropped, and the round is skipped or done again."""
    if audit is not None:
        audit.trail.add("shortfall", {"round": number if skipped else number - 1, "tried": number})


def scores(audit: Audit | None, number: int, metrics: Mapping[str, Any]) -> None:
    """Records that the model of a round was evaluated; the figures themselves are in the run folder."""
    if audit is not None and metrics:
        fields = {"round": number, "metrics": sha256(metrics), "num_examples": metrics.get("num_examples")}
        audit.trail.add("evaluation", fields)


def flush(audit: Audit | None) -> None:
    """Writes everything so far to the disk."""
    if audit is not None:
        audit.trail.flush()


def saves(audit: Audit | None, number: int, sha256: str) -> None:
    """Records the hash of a checkpoint; the entry is on the disk before the checkpoint takes its place."""
    if audit is not None:
        audit.trail.add("checkpoint", {"round": number, "sha256": sha256})
        audit.trail.flush()


def concludes(
    audit: Audit, *, weights: Tensors, adapter: Tensors, result: Mapping[str, Any], promise: Sequence[str] = ()
) -> None:
    """Records the end of the rounds: the global model, the adapter saved from it, the result and the kept privacy.

    The entry lists the sites with keys, too, because they are to sign the end.

    Args:
        audit: The trail.
        weights: The model that is the result.
        adapter: As it was saved.
        result: The part's ``result.json``.
        promise: What the run kept, in lines, from what was spent.
    """
    fields: dict[str, Any] = {
        "round": result["round"], "weights": digest(weights), "adapter": digest(adapter), "result": sha256(result)
    }  # fmt: skip
    fields |= {"promise": list(promise)} if promise else {}
    fields |= {"sites": {name: list(own) for name, own in audit.keys.items()}} if audit.keys else {}
    audit.trail.add("result", fields)
    audit.trail.flush()


def close(audit: Audit, root: Path, *, round_number: int) -> Head:
    """Closes a trail with the hash of the manifest of the whole run folder, which must not change afterwards.

    Returns:
        The head that sites countersign.

    Raises:
        RunFolderError: A file of the run cannot be read, or the disk is full.
    """
    place = (audit.run.path / FILE).relative_to(root).as_posix()
    made, files = write_manifest(root, trail=place)
    audit.trail.add(CLOSED, {"round": round_number, "manifest": made, "files": files, "trail": place})
    audit.trail.flush()
    return audit.trail.head()


class Digests:
    """The digest of tensors, computed once for all the requests that share them."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, tensors: Tensors) -> str:
        place = tuple(map(id, tensors.values()))
        if place not in self._known:
            self._known[place] = digest(tensors)
        return self._known[place]


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
