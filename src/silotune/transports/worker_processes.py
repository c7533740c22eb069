"""Processes beside this one in which clients train: each holds the base model itself.

Threads of one process share a base and wait for each other whenever they run Python, which a small model's steps are
full of; processes do not. They are started afresh, since a fork beside the threads of torch can hang. What they are
sent and send back passes through a socket that only parent and child hold. A child whose parent is gone ends.
"""

from __future__ import annotations

import io
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from silotune.federation.client import METERED, Site
from silotune.models.adapters import Adapted
from silotune.record.family import Family
from silotune.structs import Failure, Reply, Request, SiteState, Tensors
from silotune.training.encode import Encoded
from silotune.transports.in_process import Handling, WorkerLost, answered


@dataclass(frozen=True)
class _Work:
    """One request.

    Attributes:
        sites: Number of the sites that it belongs to: others may have had the same names.
        handling: How it is served.
        request: What is asked.
        state: What the client has kept so far.
        examples: The client's; None where the child has them.
        initial: The adapter as drawn, which most sites share; None where the child has it.
    """

    sites: int
    handling: Handling
    request: Request
    state: SiteState
    examples: Sequence[Encoded] | None
    initial: Tensors | None


class WorkerProcess:
    """A process that answers one request at a time for whichever site; see `serve` for its other end.

    Args:
        module: What is run as ``python -m``; it is given the number of its end of the socket.
        opening: What the module is told first.
        family: Where its CPU time and memory are counted.
    """

    def __init__(self, module: str, opening: object, *, family: Family) -> None:
        ours, theirs = socket.socketpair()
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._printed,
                stderr=self._printed,
            )
        self._connection = Connection(ours.detach())
        self._family = family
        self._sites, self._seen = 0, set[str]()
        self._initial: Tensors = {}
        self._is_ready, self._is_closed = False, False
        family.join(self._process.pid)
        self._send(opening)

    @property
    def is_ready(self) -> bool:
        """Whether its model is loaded. One that could not load it says so when it is first asked for work."""
        if not self._is_ready and self._connection.poll():
            self._hear_ready()
        return self._is_ready

    def begin(self) -> None:
        """Other sites from now on, perhaps of the same names."""
        self._sites, self._seen = self._sites + 1, set()

    def __call__(self, request: Request, site: Site, handling: Handling) -> Reply | Failure:
        """Does what a request asks with a site's data; its state moves on.

        Raises:
            WorkerLost: The process has ended; the site is as it was.
        """
        if request.kind not in METERED:
            return self._answer(request, site, handling)
        reply: Reply | Failure
        with suppress(_Failed), site.meter.client() as account:
            reply = self._answer(request, site, handling)
            if isinstance(reply, Failure):
                raise _Failed  # what it spent falls to the coordinator
        if isinstance(reply, Failure) or "core_seconds" not in reply.body:
            return reply
        spent = {"core_seconds": account.spent.core_seconds, "joules": account.spent.joules}
        return replace(reply, body={**reply.body, **spent, "energy_source": site.meter.gauge.source()})

    def close(self) -> None:
        """Ends the process; may be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._connection.close()
        self._family.leave(self._process.pid)
        self._process.kill()
        self._process.wait()
        self._printed.close()

    def _hear_ready(self) -> None:
        with suppress(EOFError, OSError):
            self._connection.recv_bytes()
        self._is_ready = True

    def _answer(self, request: Request, site: Site, handling: Handling) -> Reply | Failure:
        if not self._is_ready:
            self._hear_ready()
        examples = None if site.name in self._seen else site.examples
        initial = None if site.initial is self._initial else site.initial
        self._send(_Work(self._sites, handling, request, site.state, examples, initial))
        self._seen.add(site.name)
        self._initial = site.initial
        try:
            reply, state = _loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerLost(self._why()) from error
        site.state = state
        answer: Reply | Failure = reply
        return answer

    def _send(self, value: object) -> None:
        try:
            self._connection.send_bytes(_dumps(value))
        except OSError as error:
            raise WorkerLost(self._why()) from error

    def _why(self) -> str:
        """The signal that ended the process, or its exit code and the last line that it printed."""
        code = self._process.wait()
        if code < 0:
            return f"a worker process was ended by signal {-code}"
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").splitlines() or ["it printed nothing"]
        return f"a worker process ended with code {code}: {lines[-1]}"


class _Failed(Exception):  # noqa: N818 - it ends a block and is no error
    """A client failed."""


def serve(number: int, load: Callable[[Any], Adapted]) -> None:
    """The other end: answers until the parent closes its end or dies.

    Args:
        number: File descriptor of the socket.
        load: Makes the model of what the parent says first.
    """
    connection = Connection(number)
    sites, seen = -1, dict[str, Sequence[Encoded]]()
    initial: Tensors = {}
    with suppress(EOFError, ConnectionError):
        adapted = load(_loads(connection.recv_bytes()))
        connection.send_bytes(b"ready")
        while True:
            work: _Work = _loads(connection.recv_bytes())
            if work.sites != sites:
                sites, seen = work.sites, {}
            if work.examples is not None:
                seen[work.request.client] = work.examples
            initial = initial if work.initial is None else work.initial
            name = work.request.client
            site = Site(name, seen[name], adapted, work.state, initial=initial)
            reply = answered(work.request, site, work.handling)
            connection.send_bytes(_dumps((reply, site.state)))


class _Pickler(pickle.Pickler):
    """Tensors as their bytes: pickle's own way writes a file within the file for each."""

    def reducer_override(self, value: object) -> Any:
        """How one value is written."""
        if type(value) is not torch.Tensor:
            return NotImplemented
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (flat.numpy(), value.dtype, tuple(value.shape))


def _tensor(flat: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(flat).view(dtype).reshape(shape)


def _dumps(value: object) -> bytes:
    written = io.BytesIO()
    _Pickler(written, protocol=5).dump(value)
    return written.getvalue()


def _loads(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301 - from our own parent or child, through a socket that nobody else holds
