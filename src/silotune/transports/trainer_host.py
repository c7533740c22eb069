"""The resident trainer of a site: holds the base model, takes one request at a time over a private Unix socket.

Whoever carries messages (Flower's node, or its simulation) stays thin: it imports neither torch nor transformers, and
a long local round cannot stop its heartbeat. The base is read from disk once and serves all requests and runs that use
it. What a site keeps between rounds lies on its disk: a trainer that was killed goes on with the same bits.
"""

from __future__ import annotations

import gc
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from silotune.errors import BudgetError, MessageError, PolicyError, SilotuneError
from silotune.federation.client import Site, client_round
from silotune.federation.jobs import claimed
from silotune.federation.messages import Expected, decode_request, encode, kind_of
from silotune.federation.opened import put_back
from silotune.federation.policy import kind_named
from silotune.federation.secure_site import is_amid_sum
from silotune.record.site_states import load_before, load_newest, save_after
from silotune.structs import BUDGET, Request
from silotune.transports.frames import MAX_PAYLOAD_BYTES, Frame, check_peer, receive, send

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
    """

    site: Site
    expected: Mapping[str, Expected]
    keep: int = 1
    zstd: int = 0


class Desk(Protocol):
    """Opens runs at a site; keeps the base model between them."""

    def open(self, setup: Mapping[str, Any]) -> Opened:
        """The site for a run's setup; raises ``SilotuneError`` where it does not hold together here."""

    def rest(self) -> None:
        """Frees what only the last run needed."""

    def state(self) -> dict[str, Any]:
        """What it holds, for ``silotune site status``: plain JSON."""


class TrainerHost:
    """Serves requests until told to stop; only the thread that calls ``serve`` computes.

    Args:
        desk: Opens runs.
        states: Folder of the states between rounds; a run's lie below, under its name.
        idle_seconds: After so long without a request, what only the last run needed is freed.
        max_bytes: Longest message that is read.
    """

    def __init__(
        self, desk: Desk, states: Path, *, idle_seconds: float = 600.0, max_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self._desk, self._states = desk, states
        self._idle_seconds, self._max_bytes = idle_seconds, max_bytes
        self._waiting: queue.SimpleQueue[tuple[socket.socket, Frame] | None] = queue.SimpleQueue()
        self._opened: tuple[str, Mapping[str, Any], Opened] | None = None
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
                with connection, suppress(OSError):  # who asked is gone: it will ask again
                    send(connection, self.answer(frame))

    def stop(self) -> None:
        """Ends ``serve`` after the request at hand."""
        self._waiting.put(None)

    def _accept(self, listener: socket.socket) -> None:
        """Answers what needs no model at once, and queues the rest; a broken connection is dropped."""
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
            return _failure("frame", f"unknown verb {verb!r}: allowed: state, stop, work")
        held = {
            "process": os.getpid(),
            "began": self._began,
            "served": self._served,
            "works_on": self._works_on,
            **self._desk.state(),
        }
        return Frame({"status": "state", **held})

    def answer(self, frame: Frame) -> Frame:
        """Does the work of a frame; what goes wrong is said in the answer, without any text."""
        try:
            return self._work(frame)
        except SilotuneError as error:
            rule = error.rule if isinstance(error, PolicyError) else ""
            stage = BUDGET if isinstance(error, BudgetError) else self._works_on or "frame"
            return _failure(stage, str(error), rule)
        except Exception as error:  # noqa: BLE001  # the client's outermost edge: its text must not leave
            return _failure(self._works_on or "frame", type(error).__name__)
        finally:
            self._works_on = ""

    def _work(self, frame: Frame) -> Frame:
        job, setup = frame.header.get("job"), frame.header.get("setup")
        if not isinstance(job, str) or not isinstance(setup, dict) or not _is_name(job):
            raise MessageError("a frame of work names no run, or holds no setup")
        self._works_on = "open"
        opened = self._open(job, setup)
        self._works_on = "decode"
        request = decode_request(frame.payload, opened.expected.get(kind_of(frame.payload), {}))
        site = opened.site
        if request.client != site.name:
            raise MessageError(f"a request for {request.client!r} reached {site.name!r}")
        self._works_on = request.kind
        _check_job(request, job)
        states, trains, known = self._states / job, kind_named(request.kind).trains, site.state
        if trains:
            site.state = put_back(load_before(states, request.round_number), known)
        begun_with = site.state
        try:
            reply = client_round(request, site)
        except BaseException:
            site.state = put_back(known, site.state)  # a request that is refused undoes nothing
            raise
        if trains or site.state is not begun_with:
            save_after(states, request.round_number, site.state, keep=opened.keep)
        self._served += 1
        return Frame({"status": "reply"}, encode(reply, zstd=opened.zstd))

    def _open(self, job: str, setup: Mapping[str, Any]) -> Opened:
        if self._opened is not None and self._opened[:2] == (job, setup):
            return self._opened[2]
        self._rest()
        opened = self._desk.open(setup)
        opened.site.state = load_newest(self._states / job)
        self._opened = (job, setup, opened)
        return opened

    def _rest(self) -> None:
        """Frees the last run's examples and memory, not the base."""
        if self._opened is None:
            return
        self._opened = None
        self._desk.rest()
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_job(request: Request, job: str) -> None:
    """Raises ``MessageError`` where the signed job is of another run than the one whose state would be used."""
    signed = claimed(request.body)
    if signed is not None and signed.get("run") != job:
        raise MessageError(f"the job of the request is signed for the run {signed.get('run')!r}, not for {job!r}")


@contextmanager
def _woken_at_the_end(listener: socket.socket) -> Iterator[None]:
    """Ends the thread that waits for connections: closing alone would leave it waiting."""
    try:
        yield
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def _is_name(text: str) -> bool:
    """Whether a run's name can be that of a folder: the coordinator chose it."""
    return 0 < len(text) <= 200 and text[0] != "." and all(char.isalnum() or char in "._+-" for char in text)


def _failure(stage: str, reason: str, rule: str = "") -> Frame:
    return Frame({"status": "failure", "stage": stage, "reason": " ".join(reason.split())[:2000], "rule": rule})
