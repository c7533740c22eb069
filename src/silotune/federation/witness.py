"""What a coordinator writes into its audit trail while rounds go on, and how it checks what sites sign."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from silotune.errors import MessageError
from silotune.federation.signing import check_signature, request_digest, statement
from silotune.record.audit import CLOSED, Head, Trail
from silotune.record.canonical import sha256
from silotune.record.runs import RunFolder
from silotune.structs import Failure, Reply, Request, ServerState, Tensors
from silotune.tensors import digest


@dataclass(frozen=True)
class Audit:
    """What a coordinator needs to keep a trail.

    Attributes:
        trail: Its chain.
        keys: Client -> its public signing keys; the replies of clients named here must be signed.
        keep_updates: Keep every update, so that the aggregation can be done again.
    """

    trail: Trail
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keep_updates: bool = False


@dataclass
class Witness:
    """Follows one run of rounds; it does nothing where no trail is kept."""

    audit: Audit | None
    run: RunFolder
    _requests: dict[str, tuple[str, str]] = field(default_factory=dict)

    def begins(self, state: ServerState, settings: Mapping[str, Any]) -> None:
        """A run starts, or goes on after the round that its checkpoint holds."""
        if self.audit is None:
            return
        fields = {"round": state.round_number, "weights": digest(state.weights)}
        if state.round_number == 0:
            fields |= {"settings": sha256(settings), "python": platform.python_version()}
            if self.audit.keep_updates:
                self.run.keep_tensors("round-0-weights", state.weights)
        is_first = self.audit.trail.entries == 0
        self.audit.trail.add("started" if is_first else "resumed", fields)

    def asks(self, requests: Mapping[str, Request]) -> dict[str, Request]:
        """The requests with the head of the trail, in which they stand already, and on the disk."""
        if self.audit is None:
            return dict(requests)
        trail, known = self.audit.trail, _Digests()
        self._requests.clear()
        for name, request in requests.items():
            tensors = known(request.tensors)
            made = request_digest(request, tensors)
            self._requests[name] = (made, "")
            place = {"kind": request.kind, "round": request.round_number, "client": name}
            trail.add("request", {**place, "tensors": tensors, "body": sha256(request.body), "request": made})
        if not self.audit.keys:
            return dict(requests)
        trail.flush()
        head = trail.head().text()
        self._requests = {name: (made, head) for name, (made, _) in self._requests.items()}
        return {name: replace(request, head=head) for name, request in requests.items()}

    def answers(self, reply: Reply) -> None:
        """A reply that will be used.

        Raises:
            MessageError: It must be signed by its site, for this request, and is not.
        """
        if self.audit is None:
            return
        request, head = self._requests[reply.client]
        said = statement(reply, request=request, head=head)
        fields: dict[str, Any] = {"kind": reply.kind, "round": reply.round_number, "client": reply.client}
        keys = self.audit.keys.get(reply.client)
        if keys is not None:
            fields |= {"key": check_signature(reply, said, keys), "signature": reply.signature, "statement": said}
        fields |= {"tensors": said["tensors"], "report": reply.body, "bytes": reply.bytes_up}
        if self.audit.keep_updates and reply.tensors:
            name = f"round-{reply.round_number}-{sha256(reply.client)[:16]}"
            fields |= {"update": digest(reply.tensors), "file": name}
            self.run.keep_tensors(name, reply.tensors)
        self.audit.trail.add("reply", fields)

    def fails(self, failure: Failure) -> None:
        """A client gave no usable reply; a refusal by its policy has the rule's name."""
        if self.audit is not None:
            fields = {"round": failure.round_number, "client": failure.client, "stage": failure.stage}
            event = "refusal" if failure.rule else "failure"
            rule = {"rule": failure.rule} if failure.rule else {}
            self.audit.trail.add(event, {**fields, **rule, "reason": failure.reason})

    def aggregates(self, number: int, clients: Sequence[str], weights: Tensors) -> None:
        """The updates of these clients, in this order, became new weights."""
        if self.audit is not None:
            fields = {"round": number, "clients": list(clients), "weights": digest(weights)}
            self.audit.trail.add("aggregation", fields)

    def scores(self, number: int, metrics: Mapping[str, Any]) -> None:
        """The model of a round was evaluated; the figures stand in the run folder."""
        if self.audit is not None and metrics:
            fields = {"round": number, "metrics": sha256(metrics), "num_examples": metrics.get("num_examples")}
            self.audit.trail.add("evaluation", fields)

    def flush(self) -> None:
        """Everything so far is on the disk afterwards."""
        if self.audit is not None:
            self.audit.trail.flush()


def close(audit: Audit, *, round_number: int, adapter: Tensors, result: Mapping[str, Any]) -> Head:
    """Ends a trail with the adapter that was saved and the result, and returns its head."""
    fields = {"round": round_number, "adapter": digest(adapter), "result": sha256(result)}
    audit.trail.add("result", fields)
    audit.trail.add(CLOSED, {"round": round_number})
    audit.trail.flush()
    return audit.trail.head()


def countersignature(reply: Reply, request: Request, keys: Sequence[str]) -> dict[str, Any]:
    """A site's signature over the head that a ``countersign`` request carried, as ``countersigned.json`` keeps it.

    Raises:
        MessageError: The reply is not such a signature.
    """
    if reply.kind != request.kind or reply.client != request.client:
        raise MessageError(f"{reply.client!r} does not answer the request to countersign")
    said = statement(reply, request=request_digest(request, digest(request.tensors)), head=request.head)
    key = check_signature(reply, said, keys)
    return {"client": reply.client, "key": key, "statement": said, "signature": reply.signature}


class _Digests:
    """The digest of tensors, once for all the requests that share them."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, tensors: Tensors) -> str:
        place = tuple(map(id, tensors.values()))
        if place not in self._known:
            self._known[place] = digest(tensors)
        return self._known[place]
