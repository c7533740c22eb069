"""Carries requests to clients that live in this process: the embedded default, and simulation.

All clients share one resident base model. With ``encode`` every message passes through the real encoder and
the strict decoder, so that bytes are counted on what would travel.

Several clients may train at one time, each worker in a thread with its own adapter around the shared base, or in a
process of its own (`worker_processes`). A small model's operations are too short to be spread over cores: whole
clients are spread instead.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

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
from silotune.settings.sections import FederationSection
from silotune.structs import BUDGET, Failure, Reply, Request, SiteState
from silotune.tensors import num_bytes

_LOG = logging.getLogger(__name__)
LARGEST_SIDE_BY_SIDE = 100_000_000
"""Values of a base up to which clients train side by side unless told otherwise: above it one operation keeps all
cores busy, and every further client at work costs the memory of its activations."""


def workers_for(adapted: Adapted, num_clients: int, *, asked: int | None = None) -> int:
    """Clients to train at one time; 1 where that could change a result.

    Dropout draws from the process's one generator, so clients that draw must take turns; on a GPU, and with
    quantised weights, they share what cannot be shared by two.

    Args:
        adapted: The resident model.
        num_clients: Clients of a round.
        asked: ``federation.workers``; None for one a core, if the base is small.
    """
    if not adapters.can_replicate(adapted) or adapted.draws_randomly:
        return 1
    small = adapted.num_base_parameters <= LARGEST_SIDE_BY_SIDE
    wanted = asked if asked is not None else torch.get_num_threads() if small else 1
    return min(wanted, num_clients)


@dataclass(frozen=True)
class Handling:
    """How requests are served: through the encoder or not, and how tensors are compressed on the way."""

    encode: bool = True
    links: FederationSection = FederationSection()


class WorkerLost(SilotuneError):  # noqa: N818 - what happened, not whose fault it is
    """A worker process has ended before its time."""


class Worker(Protocol):
    """Answers one request at a time."""

    @property
    def is_ready(self) -> bool:
        """Whether it can begin at once."""

    def begin(self) -> None:
        """Other sites from now on, perhaps of the same names."""

    def __call__(self, request: Request, site: Site, handling: Handling) -> Reply | Failure:
        """Does what a request asks with a site's data; its state moves on. Raises ``WorkerLost``, if it is gone."""


@dataclass(frozen=True, eq=False)
class Here:
    """A worker of this process, with an adapter of its own around the base."""

    adapted: Adapted
    is_ready: bool = True

    def begin(self) -> None:
        """Nothing is kept."""

    def __call__(self, request: Request, site: Site, handling: Handling) -> Reply | Failure:
        """In the thread that calls."""
        lent = replace(site, adapted=self.adapted)
        reply = answered(request, lent, handling)
        site.state = lent.state
        return reply


class InProcess:
    """Runs the clients and yields their replies in the order of the requests.

    Args:
        sites: The clients by name, all on one resident model.
        encode: Pass messages through the encoder; otherwise bytes are those of the tensors alone.
        workers: Clients at work at one time; they share out this process's torch threads.
        links: How tensors are compressed: ``upload`` and ``download`` of the section; default: not at all.
        helpers: Processes that are workers; threads are the rest. One that dies is done without.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        *,
        encode: bool = True,
        workers: int = 1,
        links: FederationSection | None = None,
        helpers: Sequence[Worker] = (),
    ) -> None:
        self._sites = dict(sites)
        self._handling = Handling(encode, links or FederationSection())
        resident = next(iter(self._sites.values())).adapted
        threads = workers - len(helpers)
        self._here = Here(resident)
        replicas = (Here(adapters.replicate(resident)) for _ in range(threads - 1))
        self._workers: list[Worker] = [self._here, *replicas, *helpers]
        for helper in helpers:
            helper.begin()

    def clients(self) -> Sequence[str]:
        """Names of all clients, in a fixed order."""
        return tuple(self._sites)

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, as they arrive; a failure is never an exception.

        ``timeout_seconds`` bounds the wait for a reply on a network; here the work is done in the call itself,
        in full, so that a simulation does not depend on the machine's speed.
        """
        if len(self._workers) == 1 or len(requests) == 1:
            for name, request in requests.items():
                yield self._here(request, self._sites[name], self._handling)
        else:
            yield from self._side_by_side(requests)

    def states(self) -> dict[str, SiteState]:
        """What every client keeps between rounds."""
        return {name: site.state for name, site in self._sites.items()}

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Gives clients back what they kept; those not named start afresh."""
        for name, site in self._sites.items():
            site.state = states.get(name, SiteState())

    def _side_by_side(self, requests: Mapping[str, Request]) -> Iterator[Reply | Failure]:
        """At most one finished reply a worker waits for its turn, so memory does not grow with the clients."""
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        coming = queue.SimpleQueue[Worker]()
        for worker in self._workers:
            (idle if worker.is_ready else coming).put(worker)

        def work(name: str, request: Request) -> Reply | Failure:
            _move_ready(coming, idle)
            while True:
                worker = idle.get()
                try:
                    return worker(request, self._sites[name], self._handling)
                except WorkerLost as lost:
                    _LOG.warning("%s; its clients are trained by the others", lost)
                    self._workers.remove(worker)
                finally:
                    if worker in self._workers:
                        idle.put(worker)

        at_once = len(self._workers)
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


def _move_ready(coming: queue.SimpleQueue[Worker], idle: queue.SimpleQueue[Worker]) -> None:
    """Workers that have become ready meanwhile."""
    for _ in range(coming.qsize()):
        with suppress(queue.Empty):
            worker = coming.get_nowait()
            (idle if worker.is_ready else coming).put(worker)


def answered(request: Request, site: Site, handling: Handling) -> Reply | Failure:
    """What a site makes of a request; a failure is never an exception."""
    serve: Callable[[Request, Site, FederationSection], Reply] = _encoded if handling.encode else _direct
    try:
        return serve(request, site, handling.links)
    except Exception as error:  # noqa: BLE001  # the client's outermost edge: one client never ends a run
        sent = _request_bytes(request, handling.links, encoded=handling.encode)
        rule = error.rule if isinstance(error, PolicyError) else ""
        stage = BUDGET if isinstance(error, BudgetError) else request.kind
        reason = _one_line(error)
        return Failure(site.name, request.round_number, stage, reason, bytes_down=sent, rule=rule)


@contextmanager
def _worker_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers share out torch's threads; torch's own count and generator are as before afterwards.

    This thread takes no more than a worker meanwhile: where all cores are at work, an operation spread over them
    waits for each, a millisecond for a product that takes microseconds.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    torch.set_num_threads(share)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool,
        ):
            yield pool
    finally:
        torch.set_num_threads(threads)


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
    """A request as its link carries it."""
    return encode(request.as_sent(), zstd=links.download.zstd)


def decode_expected(data: bytes, request: Request, federation: FederationSection) -> Reply:
    """A reply, checked against what its request expects, and opened.

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
    """What sending a request took, whatever became of it; 0 for one that cannot be encoded."""
    try:
        return len(encode_linked(request, links=links)) if encoded else num_bytes(request.as_sent().tensors)
    except MessageError:
        return 0


def _with_bytes(reply: Reply, *, down: int, up: int) -> Reply:
    return replace(reply, bytes_down=down, bytes_up=up)


def _one_line(error: BaseException) -> str:
    """The reason of a failure: our own errors say it without any text; of others only the type is sent."""
    return str(error) if isinstance(error, SilotuneError) else type(error).__name__
