"""Processes beside this one in which clients train: each holds the base model itself.

Threads of one process share a base and wait for each other whenever they run Python, which a small model's steps are
full of; processes do not. They are started afresh, since a fork beside the threads of torch can hang. What they are
sent and send back passes in frames through a socket that only parent and child hold. A child whose parent is gone
ends.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load as tensors_in
from safetensors.torch import save

from silotune.federation.kinds import kind_named
from silotune.federation.site.state import Site
from silotune.federation.wire.run_settings import RunSettings
from silotune.models.adapters import Adapted
from silotune.record.family import Family
from silotune.settings.sections import FederationSection
from silotune.structs import Failure, Reply, Request, SiteState, Tensors
from silotune.tensors import apart
from silotune.training.encode import Encoded
from silotune.transports.frames import Frame, NoAnswerError, receive, send
from silotune.transports.in_process import Handling, WorkerLost, answered

_EXAMPLES = TypeAdapter(list[Encoded])
_SETTINGS = TypeAdapter(RunSettings)


class WorkerProcess:
    """A process that answers one request at a time for whichever site; see `serve` for its other end.

    Args:
        module: What is run as ``python -m``; it is given the number of its end of the socket.
        opening: What the module is told first.
        family: Where its CPU time and memory are counted.
    """

    def __init__(self, module: str, opening: Mapping[str, Any], *, family: Family) -> None:
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
        self._connection = ours
        self._family = family
        self._seen: set[str] = set()
        self._initial: Tensors = {}
        self._settings: RunSettings | None = None
        self._is_ready = False
        family.join(self._process.pid)
        self._send(Frame(opening))

    @property
    def is_ready(self) -> bool:
        """Whether its model is loaded. One that could not load it says so when it is first asked for work."""
        if not self._is_ready and select.select([self._connection], [], [], 0)[0]:
            self._hear_ready()
        return self._is_ready

    def begin(self) -> None:
        """Other sites from now on, perhaps of the same names."""
        self._seen.clear()

    def __call__(self, request: Request, site: Site, handling: Handling) -> Reply | Failure:
        """Does what a request asks with a site's data; its state moves on.

        Raises:
            WorkerLost: The process has ended; the site is as it was.
        """
        if not kind_named(request.kind).is_metered:
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
        """Ends the process."""
        self._connection.close()
        self._family.leave(self._process.pid)
        self._process.kill()
        self._process.wait()
        self._printed.close()

    def _hear_ready(self) -> None:
        with suppress(NoAnswerError, OSError):
            receive(self._connection)
        self._is_ready = True

    def _answer(self, request: Request, site: Site, handling: Handling) -> Reply | Failure:
        if not self._is_ready:
            self._hear_ready()
        if site.name not in self._seen:
            self._send(Frame({"examples_of": site.name}, _EXAMPLES.dump_json(list(site.examples))))
            self._seen.add(site.name)
        if site.initial is not self._initial:  # most sites share it
            self._send(_packed({"initial": True}, {"initial": site.initial}))
            self._initial = site.initial
        if site.settings is not self._settings:  # and all sites of a run share these
            self._send(Frame({"settings": True}, _SETTINGS.dump_json(site.settings)))
            self._settings = site.settings
        self._send(_work(request, site.state, handling))
        try:
            reply, site.state = _answer_in(receive(self._connection))
        except (NoAnswerError, OSError) as error:
            raise WorkerLost(self._why()) from error
        return reply

    def _send(self, frame: Frame) -> None:
        try:
            send(self._connection, frame)
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


def serve(number: int, load: Callable[[Mapping[str, Any]], Adapted]) -> None:
    """The other end: answers until the parent closes its end or dies.

    Args:
        number: File descriptor of the socket.
        load: Makes the model of what the parent says first.
    """
    connection = socket.socket(fileno=number)
    seen: dict[str, Sequence[Encoded]] = {}
    initial: Tensors = {}
    settings = RunSettings()
    with suppress(NoAnswerError, ConnectionError):
        adapted = load(receive(connection).header)
        send(connection, Frame({"ready": True}))
        while True:
            frame = receive(connection)
            if "examples_of" in frame.header:
                seen[frame.header["examples_of"]] = _EXAMPLES.validate_json(frame.payload)
            elif "initial" in frame.header:
                initial = _groups_in(frame)["initial"]
            elif "settings" in frame.header:
                settings = _SETTINGS.validate_json(frame.payload)
            else:
                request, state, handling = _work_in(frame)
                site = Site(request.client, seen[request.client], adapted, state, initial=initial, settings=settings)
                send(connection, _answer_frame(answered(request, site, handling), site.state))


# --- what travels: plain JSON in a frame's header, tensors in its payload --------------------------------------------


def _work(request: Request, state: SiteState, handling: Handling) -> Frame:
    """A request, what its client has kept so far, and how it is served."""
    how = {"encode": handling.encode, "links": handling.links.model_dump(mode="json")}
    groups = {"tensors": request.tensors, "wire": request.wire or {}, "state": state.tensors}
    values = {"request": _plain(request), "has_wire": request.wire is not None, "data": dict(state.data)}
    return _packed({**values, "handling": how}, groups)


def _work_in(frame: Frame) -> tuple[Request, SiteState, Handling]:
    header, groups = frame.header, _groups_in(frame)
    wire = groups["wire"] if header["has_wire"] else None
    request = Request(**header["request"], tensors=groups["tensors"], wire=wire)
    how = header["handling"]
    handling = Handling(how["encode"], FederationSection.model_validate(how["links"]))
    return request, SiteState(groups["state"], header["data"]), handling


def _answer_frame(answer: Reply | Failure, state: SiteState) -> Frame:
    """A reply or a failure, and what the client keeps."""
    if isinstance(answer, Failure):
        return _packed({"failure": asdict(answer), "data": dict(state.data)}, {"state": state.tensors})
    groups = {"tensors": answer.tensors, "state": state.tensors}
    return _packed({"reply": _plain(answer), "data": dict(state.data)}, groups)


def _answer_in(frame: Frame) -> tuple[Reply | Failure, SiteState]:
    header, groups = frame.header, _groups_in(frame)
    state = SiteState(groups["state"], header["data"])
    if "failure" in header:
        return Failure(**header["failure"]), state
    return Reply(**header["reply"], tensors=groups["tensors"]), state


def _plain(message: Request | Reply) -> dict[str, Any]:
    """All of a message but its tensors."""
    names = (field.name for field in fields(message) if field.name not in ("tensors", "wire"))
    return {name: getattr(message, name) for name in names}


def _packed(header: Mapping[str, Any], groups: Mapping[str, Tensors]) -> Frame:
    """A frame with groups of tensors, which come out in their order: sums depend on it."""
    named = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    order = {group: list(tensors) for group, tensors in groups.items()}
    return Frame({**header, "order": order}, save(apart(named)))


def _groups_in(frame: Frame) -> dict[str, Tensors]:
    tensors = tensors_in(frame.payload)
    return {
        group: {name: tensors[f"{group}/{name}"] for name in names} for group, names in frame.header["order"].items()
    }
