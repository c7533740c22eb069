"""Carries requests to clients that live in this process: the embedded default, and simulation.

All clients share one resident base model. With ``encode`` every message passes through the real encoder and
the strict decoder, so that bytes are counted on what would travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from silotune.errors import MessageError, SilotuneError
from silotune.federation.client import Site, client_round
from silotune.federation.messages import decode_reply, decode_request, encode, layout_of
from silotune.structs import Failure, Reply, Request, SiteState
from silotune.tensors import num_bytes

FEDERATED_KINDS_WITH_DELTA = ("train",)


class InProcess:
    """Runs the clients one after another, in the order of the requests.

    Args:
        sites: The clients by name.
        encode: Pass messages through the encoder; otherwise bytes are those of the tensors alone.
    """

    def __init__(self, sites: Mapping[str, Site], *, encode: bool = True) -> None:
        self._sites = dict(sites)
        self._encode = encode

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""
        return tuple(self._sites)

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, as they arrive; a failure is never an exception.

        ``timeout_seconds`` bounds the wait for a reply on a network; here the work is done in the call itself,
        in full, so that a simulation does not depend on the machine's speed.
        """
        for name, request in requests.items():
            yield self._one(name, request)

    def states(self) -> dict[str, SiteState]:
        """What every client keeps between rounds."""
        return {name: site.state for name, site in self._sites.items()}

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept; those not named start afresh."""
        for name, site in self._sites.items():
            site.state = states.get(name, SiteState())

    def _one(self, name: str, request: Request) -> Reply | Failure:
        site = self._sites[name]
        serve: Callable[[Request, Site], Reply] = _encoded if self._encode else _direct
        try:
            return serve(request, site)
        except Exception as error:  # noqa: BLE001  # the client's outermost edge: one client never ends a run
            sent = _request_bytes(request, encoded=self._encode)
            return Failure(name, request.round_number, request.kind, _one_line(error), bytes_down=sent)


def _encoded(request: Request, site: Site) -> Reply:
    sent = encode(request)
    reply = client_round(decode_request(sent, layout_of(request.tensors)), site)
    returned = encode(reply)
    expected = layout_of(request.tensors) if request.kind in FEDERATED_KINDS_WITH_DELTA else {}
    decoded = decode_reply(returned, expected)
    return _with_bytes(decoded, down=len(sent), up=len(returned))


def _direct(request: Request, site: Site) -> Reply:
    reply = client_round(request, site)
    return _with_bytes(reply, down=num_bytes(request.tensors), up=num_bytes(reply.tensors))


def _request_bytes(request: Request, *, encoded: bool) -> int:
    """What sending a request took, whatever became of it; 0 for one that cannot be encoded."""
    try:
        return len(encode(request)) if encoded else num_bytes(request.tensors)
    except MessageError:
        return 0


def _with_bytes(reply: Reply, *, down: int, up: int) -> Reply:
    return Reply(reply.kind, reply.round_number, reply.client, reply.tensors, reply.body, down, up)


def _one_line(error: BaseException) -> str:
    """The reason of a failure: our own errors say it without any text; of others only the type is sent."""
    return str(error) if isinstance(error, SilotuneError) else type(error).__name__
