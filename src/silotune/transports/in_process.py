"""Carries requests to clients that live in this process: the embedded default, and simulation.

All clients share one resident base model. With ``encode`` every message passes through the real encoder and the strict
decoder, so that the counted bytes are those that would travel.

Several clients may train at one time, each worker in a thread with its own adapter around the shared base. A small
model's operations are too short to be spread over cores: whole clients are spread instead (`models/threads.py`).
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from silotune.errors import BudgetError, MessageError, PolicyError, SilotuneError
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire.links import open_reply
from silotune.federation.wire.messages import decode_reply, decode_request, encode, layout_of
from silotune.federation.wire.orders import expected_reply, longest_reply
from silotune.federation.wire.transport import Codec
from silotune.methods.compress.pack import packed_layout
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.threads import operation_threads
from silotune.settings.sections import FederationSection
from silotune.structs import BUDGET, Failure, Reply, Request, SiteState
from silotune.tensors import num_bytes


def workers_for(adapted: Adapted, num_clients: int, *, side_by_side: int, asked: int | None = None) -> int:
    """How many clients to train at one time; 1 where more could change a result.

    Dropout draws from the process's one generator, so clients that draw must take turns. On a GPU, and with quantised
    weights, clients cannot train at the same time.

    Args:
        adapted: The resident model.
        num_clients: Clients of a round.
        side_by_side: How many suit the base model and the machine.
        asked: ``federation.workers``; None for ``side_by_side``.
    """
    if not adapters.can_replicate(adapted) or adapted.draws_randomly:
        return 1
    return min(asked or side_by_side, num_clients)


class InProcess:
    """Runs the clients and yields their replies in the order of the requests.

    Args:
        sites: The clients by name, all on one resident model.
        encode: Pass messages through the encoder; otherwise bytes are those of the tensors alone.
        workers: How many clients work at one time; they share this process's torch threads.
        links: How tensors are compressed: ``upload`` and ``download`` of the section; default: not at all.
        left: Told of a client when it has answered, and whether that is a reply and no failure.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        *,
        encode: bool = True,
        workers: int = 1,
        links: FederationSection | None = None,
        left: Callable[[str, bool], None] | None = None,
    ) -> None:
        self._sites = dict(sites)
        self._encode = encode
        self._links = links or FederationSection()
        self._left = left
        resident = next(iter(self._sites.values())).adapted
        self._models = [resident, *(adapters.replicate(resident) for _ in range(workers - 1))]

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""
        return tuple(self._sites)

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, as they arrive; a failure is never an exception.

        ``timeout_seconds`` bounds the wait for a reply on a network; here the work is done in the call itself,
        in full, so that a simulation does not depend on the machine's speed.
        """
        if len(self._models) == 1 or len(requests) == 1:
            for name, request in requests.items():
                yield self._answered(request, self._sites[name])
        else:
            yield from self._side_by_side(requests)

    def states(self) -> dict[str, SiteState]:
        """What every client keeps between rounds."""
        return {name: site.state for name, site in self._sites.items()}

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept; those not named start afresh."""
        for name, site in self._sites.items():
            site.state = states.get(name, SiteState())

    def _answered(self, request: Request, site: Site) -> Reply | Failure:
        """A site's reply to a request, or its failure; errors are never raised."""
        answer = self._served(request, site)
        if self._left is not None:
            self._left(site.name, isinstance(answer, Reply))
        return answer

    def _served(self, request: Request, site: Site) -> Reply | Failure:
        serve: Callable[[Request, Site, FederationSection], Reply] = _encoded if self._encode else _direct
        try:
            return serve(request, site, self._links)
        except Exception as error:  # noqa: BLE001  # the client's outermost edge: one client never ends a run
            sent = _request_bytes(request, self._links, encoded=self._encode)
            rule = error.rule if isinstance(error, PolicyError) else ""
            stage = BUDGET if isinstance(error, BudgetError) else request.kind
            reason = _one_line(error)
            return Failure(site.name, request.round_number, stage, reason, bytes_down=sent, rule=rule)

    def _side_by_side(self, requests: Mapping[str, Request]) -> Iterator[Reply | Failure]:
        """Runs clients in threads; at most one finished reply a worker waits, so memory stays bounded."""
        idle: queue.SimpleQueue[Adapted] = queue.SimpleQueue()
        for model in self._models:
            idle.put(model)

        def work(name: str, request: Request) -> Reply | Failure:
            model, site = idle.get(), self._sites[name]
            try:
                lent = replace(site, adapted=model)
                answer = self._answered(request, lent)
                site.state = lent.state
                return answer
            finally:
                idle.put(model)

        at_once = len(self._models)
        waiting: deque[Future[Reply | Failure]] = deque()
        with _worker_threads(at_once) as pool:
            try:
                for name, request in requests.items():
                    waiting.append(pool.submit(work, name, request))
                    if len(waiting) > at_once:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


@contextmanager
def _worker_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers share torch's threads; torch's number of threads and generator are restored at the end.

    Meanwhile this thread uses no more threads than a worker does. When all cores are busy, an operation that is spread
    over them waits for each of them: a millisecond for a product that takes microseconds.
    """
    share = max(1, torch.get_num_threads() // workers)
    with (
        operation_threads(share),
        torch.random.fork_rng(devices=[]),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool,
    ):
        yield pool


def _encoded(request: Request, site: Site, links: FederationSection) -> Reply:
    sent = encode_linked(request, links=links)
    reply = client_round(decode_request(sent, layout_of(request.as_sent().tensors)), site)
    returned = encode(reply, zstd=links.upload.zstd)
    return _with_bytes(decode_expected(returned, request, links), down=len(sent), up=len(returned))


def codec_of(federation: FederationSection) -> Codec:
    """How the messages of a run with this ``[federation]`` section become bytes."""
    return Codec(
        partial(encode_linked, links=federation),
        partial(decode_expected, federation=federation),
        partial(longest_reply, federation=federation),
    )


def encode_linked(request: Request, *, links: FederationSection) -> bytes:
    """A request as bytes, compressed as its link says."""
    return encode(request.as_sent(), zstd=links.download.zstd)


def decode_expected(data: bytes, request: Request, federation: FederationSection) -> Reply:
    """Decodes a reply, checks it against its request, and decompresses its update.

    Args:
        data: The reply as it came.
        request: What it answers.
        federation: The method, which says what comes back, and how its tensors are compressed.

    Raises:
        MessageError: Anything is not as expected.
    """
    upload, expected = federation.upload, expected_reply(request, federation)
    return open_reply(decode_reply(data, packed_layout(expected, upload)), upload, expected)


def _direct(request: Request, site: Site, links: FederationSection) -> Reply:
    outgoing = request.as_sent()
    reply = client_round(outgoing, site)
    opened = open_reply(reply, links.upload, expected_reply(request, links))
    return _with_bytes(opened, down=num_bytes(outgoing.tensors), up=num_bytes(reply.tensors))


def _request_bytes(request: Request, links: FederationSection, *, encoded: bool) -> int:
    """The bytes of a request, also of one that failed; 0 for a request that cannot be encoded."""
    try:
        return len(encode_linked(request, links=links)) if encoded else num_bytes(request.as_sent().tensors)
    except MessageError:
        return 0


def _with_bytes(reply: Reply, *, down: int, up: int) -> Reply:
    return replace(reply, bytes_down=down, bytes_up=up)


def _one_line(error: BaseException) -> str:
    """The reason of a failure: the message of silotune's own errors, without examples, or another's type."""
    return str(error) if isinstance(error, SilotuneError) else type(error).__name__
