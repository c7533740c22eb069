"""What a site signs of a reply, and how a coordinator checks it: the reply answers this request, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from silotune.errors import MessageError
from silotune.record.plain_json import canonical, sha256
from silotune.record.signatures import SigningKey, verify
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
