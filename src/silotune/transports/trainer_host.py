"""The resident trainer of a site: it holds the base model, and serves one request at a time over a Unix socket.

Every request passes ``federation.guard.serve``; of an error, only a code from a closed list leaves.

Whoever carries messages (Flower's node, or its simulation) stays thin: it imports neither torch nor transformers, and
a long local round cannot stop its heartbeat. The base is read from disk once and serves all requests and runs that use
it. What a site keeps between rounds is on its disk, so a trainer that was killed goes on with the same bits.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from silotune.errors import BudgetError, MessageError, SilotuneError
from silotune.federation.kinds import kind_named
from silotune.federation.site.admission import Admitted, Arrived, Facts
from silotune.federation.site.client import client_round
from silotune.federation.site.costs import Timed, facts_of, priced
from silotune.federation.site.guard import Guard, serve
from silotune.federation.site.secure_sum import is_amid_sum
from silotune.federation.site.served import FILE, Served
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import Expected, decode_request, encode, read_header
from silotune.federation.wire.reasons import code_of
from silotune.federation.wire.run_setup import setup_object
from silotune.record.site_states import load_before, load_newest, save_after
from silotune.settings.base import NAME, NAME_RULE
from silotune.structs import BUDGET, Observer, Reply, Request
from silotune.transports.frames import MAX_PAYLOAD_BYTES, Frame, check_peer, receive, send

_LOG = logging.getLogger(__name__)
READ_SECONDS = 60.0
"""Bound on reading or writing one frame: the other end is on this machine."""


@dataclass(frozen=True)
class Opened:
    """A site ready for the requests of one run.

    Attributes:
        site: Its examples and the resident model.
        expected: Kind of request -> what its tensors must look like; kinds that are left out carry none.
        keep: Rounds whose states are kept, so that a coordinator can go back to its last checkpoint.
        zstd: Level at which the tensors of replies are compressed; 0 for none.
        notes: What the site's own staff should know of its examples; none of it leaves the site.
    """

    site: Site
    expected: Mapping[str, Expected]
    keep: int = 1
    zstd: int = 0
    notes: tuple[str, ...] = ()

    @property
    def served(self) -> Served:
        """What was served of the run before."""
        return self.site.served

    def facts(self, request: Request) -> Facts:
        """What serving a request would cost, without its cost in privacy."""
        return facts_of(self.site, request)

    def epsilons(self, request: Request, delta: float) -> tuple[float, float] | None:
        """What it would cost in privacy: epsilon of the run and of all runs."""
        return priced(self.site, request, delta)


class Desk(Protocol):
    """Opens runs at a site; keeps the base model between them."""

    def open(self, setup: Mapping[str, Any]) -> Opened:
        """The site for a run's setup; raises ``SilotuneError`` where the setup does not fit this site."""

    def rest(self) -> None:
        """Frees what only the last run needed."""

    def state(self) -> dict[str, Any]:
        """What the desk holds, for ``silotune site status``, as plain JSON."""


class TrainerHost:
    """Serves requests until told to stop; only the thread that calls ``serve`` computes.

    Args:
        desk: Opens runs.
        states: Folder of the states between rounds; a run's lie below, under its name.
        guard: Checks every request before the site serves it; None in a simulation on the user's own machine.
        idle_seconds: After this time without a request, memory that only the last run needed is freed.
        max_bytes: Longest message that is read.
        notify: Is told when a run was opened, with what the site's own staff should know of its examples.
    """

    def __init__(
        self,
        desk: Desk,
        states: Path,
        *,
        guard: Guard | None = None,
        idle_seconds: float = 600.0,
        max_bytes: int = MAX_PAYLOAD_BYTES,
        notify: Observer = lambda event, fields: None,
    ) -> None:
        self._desk, self._states, self._guard = desk, states, guard
        self._idle_seconds, self._max_bytes, self._notify = idle_seconds, max_bytes, notify
        self._waiting: queue.SimpleQueue[tuple[socket.socket, Frame] | None] = queue.SimpleQueue()
        self._opened: tuple[str, bytes, Opened] | None = None
        self._began, self._served, self._works_on = time.time(), 0, ""

    def serve(self, listener: socket.socket) -> None:
        """Accepts and serves until ``stop`` is called or a frame asks for it; closes the listener."""
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        with listener, _woken_at_the_end(listener):
            while True:
                try:
                    item = self._waiting.get(timeout=self._idle_seconds)
                except queue.Empty:
                    if self._opened is None or not is_amid_sum(self._opened[2].site):
                        self._rest()
                    continue
                if item is None:
                    return
                connection, frame = item
                with connection, suppress(OSError):  # the asking process is gone, and will ask again
                    send(connection, self.answer(frame))

    def stop(self) -> None:
        """Ends ``serve`` after the current request."""
        self._waiting.put(None)

    def _accept(self, listener: socket.socket) -> None:
        """Answers frames that need no model at once, and queues the others; a broken connection is dropped."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                connection.settimeout(READ_SECONDS)
                check_peer(connection)
                frame = receive(connection, max_bytes=self._max_bytes)
                if frame.header.get("verb") == "work":
                    self._waiting.put((connection, frame))
                    continue
                with connection:
                    send(connection, self._at_once(frame))
            except (OSError, SilotuneError):
                connection.close()

    def _at_once(self, frame: Frame) -> Frame:
        verb = frame.header.get("verb")
        if verb == "stop":
            self.stop()
        elif verb != "state":
            return Frame({"status": "failure", "stage": "frame", "reason": "form"})
        held = {
            "process": os.getpid(),
            "began": self._began,
            "served": self._served,
            "works_on": self._works_on,
            **self._desk.state(),
        }
        return Frame({"status": "state", **held})

    def answer(self, frame: Frame) -> Frame:
        """Does the work of a frame; of an error only its code is sent, and the message stays in this site's log."""
        self._works_on = "frame"
        try:
            return self._work(frame)
        except Exception as error:  # noqa: BLE001  # the client's outermost edge: its text must not leave
            known = isinstance(error, SilotuneError)
            _LOG.warning("%s: %s", self._works_on, error if known else type(error).__name__, exc_info=not known)
            stage = BUDGET if isinstance(error, BudgetError) else self._works_on
            said = {"status": "failure", "stage": stage, "reason": code_of(error)}
            detail = {"detail": str(error)[:2000]} if known and self._guard is None else {}
            return Frame({**said, **detail})
        finally:
            self._works_on = ""

    def _work(self, frame: Frame) -> Frame:
        run, length = frame.header.get("job"), frame.header.get("setup_bytes")
        if type(run) is not str or type(length) is not int or not 0 <= length <= len(frame.payload):
            raise MessageError("a frame of work names no run, or holds no setup")
        arrived = Arrived(run, frame.payload[:length], frame.payload[length:])
        self._works_on = "admission"
        if self._guard is None:
            reply = self._simulated(arrived)
        else:
            reply = serve(arrived, self._guard, lambda: self._open(arrived), lambda it: self._admitted(arrived, it))
        self._served += 1
        return Frame({"status": "reply"}, encode(reply, zstd=self._open(arrived).zstd))

    def _simulated(self, arrived: Arrived) -> Reply:
        """The reply of a site without a guard, in a simulation on the user's own machine."""
        opened = self._open(arrived)
        header = read_header(arrived.payload)
        request = decode_request(arrived.payload, opened.expected.get(header.kind, {}))
        if request.client != opened.site.name:
            raise MessageError(f"a request for {request.client!r} reached {opened.site.name!r}")
        return self._done(arrived, request, opened.site)

    def _admitted(self, arrived: Arrived, admitted: Admitted) -> Reply:
        """The reply to an admitted request, within the time and with the figures that the policy allows."""
        site, policy = self._open(arrived).site, admitted.policy
        timed = Timed(site.examples, policy.most_seconds)
        return self._done(arrived, admitted.request, site, examples=timed, metrics=policy.metrics)

    def _done(self, arrived: Arrived, request: Request, site: Site, **lent: Any) -> Reply:
        """Does the work from the state before the request's round, and saves the state after it."""
        self._works_on = request.kind
        states, trains = self._states / arrived.run, kind_named(request.kind).trains
        at_work = replace(site, **lent)
        if trains:
            at_work.state = load_before(states, request.round_number)
        begun_with = at_work.state
        reply = client_round(request, at_work)
        if trains or at_work.state is not begun_with:
            save_after(states, request.round_number, at_work.state, keep=self._open(arrived).keep)
        site.state = at_work.state
        return reply

    def _open(self, arrived: Arrived) -> Opened:
        if self._opened is not None and self._opened[:2] == (arrived.run, arrived.setup):
            return self._opened[2]
        self._rest()
        self._works_on = "open"
        states = self._states / _checked_name(arrived.run)
        opened = self._desk.open(setup_object(arrived.setup))
        opened.site.state, opened.site.served = load_newest(states), Served(states / FILE)
        self._opened = (arrived.run, arrived.setup, opened)
        self._notify("run_opened", {"run": arrived.run, "notes": list(opened.notes)})
        self._works_on = "admission"
        return opened

    def _rest(self) -> None:
        """Frees the last run's examples and memory, but not the base model."""
        if self._opened is None:
            return
        self._opened = None
        self._desk.rest()
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _woken_at_the_end(listener: socket.socket) -> Iterator[None]:
    """Ends the thread that waits for connections: closing alone would leave it waiting."""
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _checked_name(run: str) -> str:
    """The name of a run, checked because the coordinator chose it and a folder is named after it.

    Raises:
        MessageError: The name cannot be that of a folder.
    """
    if not NAME.fullmatch(run):
        raise MessageError(f"a run's name cannot name a folder: {NAME_RULE}")
    return run
