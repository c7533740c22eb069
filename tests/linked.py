"""A real SuperLink over TLS, real nodes and the network between them; the sites' trainers are threads of the test."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kits
import tiny
from acting import ORDER, acting
from silotune.deploy import certificates
from silotune.deploy.coordinator import public_keys
from silotune.deploy.flower.fleet import Address, Fleet, read_node_key
from silotune.deploy.kits import Kit, coordinator_folder, link_socket, read_kit, site_folder, trainer_socket
from silotune.deploy.processes import Child
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import layout_of
from silotune.structs import Failure, Reply, Request
from silotune.transports.flower import FlowerTransport
from silotune.transports.frames import Frame, listen
from silotune.transports.trainer_host import Opened, TrainerHost

LIMIT = 120.0
HONEST, ODD = ("near", "far"), "odd"
STRANGERS = ("revoked", "stranger", "misled", "expired", "clock")
"""Sites that have a kit and, but for the first, a node of their own in one test; none of them has a trainer."""
EXAMPLES = {name: tiny.encoded(tiny.closed(6))[place::2] for place, name in enumerate(HONEST)}
EXAMPLES[ODD] = EXAMPLES["far"]
SETTINGS = acting(tiny.training(learning_rate=0.01, optimizer_state="keep"), rounds=3)


class Network:
    """A proxy between a node and the coordinator; ``fault`` decides what becomes of each piece on its way.

    It is given the piece and whether it goes to the coordinator, and gives what passes and whether the connection ends.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.fault: Callable[[bytes, bool], tuple[bytes, bool]] = unchanged
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            inside, _ = self._listener.accept()
            try:
                outside = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                inside.close()
                continue
            threading.Thread(target=self._carry, args=(inside, outside, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(outside, inside, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        ended = False
        try:
            while not ended and (data := source.recv(1 << 14)):
                passed, ended = self.fault(data, is_up)
                target.sendall(passed)
        except OSError:
            pass
        for end in (source, target):
            with_shutdown(end)


def unchanged(data: bytes, is_up: bool) -> tuple[bytes, bool]:
    return data, False


def with_shutdown(end: socket.socket) -> None:
    """Closes a connection that another thread may be reading from."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _half(data: bytes) -> int:
    return len(data) // 2


FAULTS: Mapping[str, Callable[[bytes], tuple[bytes, bool]]] = {
    "drop": lambda data: (b"", True),
    "truncate": lambda data: (data[: _half(data)], True),
    "delay": lambda data: (time.sleep(0.3), (data, False))[1],
    "duplicate": lambda data: (data + data, False),
    "reorder": lambda data: (data[_half(data) :] + data[: _half(data)], False),
}


class Weather:
    """Every fault once on the way up and once on the way down, a few pieces of application data apart."""

    def __init__(self, *, apart: int = 3) -> None:
        self.left = [(name, is_up) for is_up in (True, False) for name in FAULTS]
        self._apart, self._seen, self._lock = apart, 0, threading.Lock()

    def __call__(self, data: bytes, is_up: bool) -> tuple[bytes, bool]:
        with self._lock:
            if data[0] != 23 or not self.left or self.left[0][1] is not is_up:  # 23: a TLS record of application data
                return data, False
            self._seen += 1
            if self._seen % self._apart:
                return data, False
            name, _ = self.left.pop(0)
        return FAULTS[name](data)


class Desk:
    """A site's examples on the tiny model; a gate holds its work."""

    def __init__(self, name: str, model: Any, start: Any) -> None:
        self.name, self.model, self.expected = name, model, {"train": layout_of(start)}
        self.gate, self.works = threading.Event(), threading.Event()
        self.gate.set()

    def open(self, setup: Mapping[str, Any]) -> Opened:
        return Opened(Site(self.name, Gated(self), self.model, settings=SETTINGS), self.expected, keep=2)

    def rest(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}


class Gated(Sequence[Any]):
    """Examples that wait at their desk's gate before they are looked at."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __len__(self) -> int:
        self._desk.works.set()
        self._desk.gate.wait(LIMIT)
        return len(EXAMPLES[self._desk.name])

    def __getitem__(self, place: Any) -> Any:
        return EXAMPLES[self._desk.name][place]


class Trainer(TrainerHost):
    """A trainer whose replies a test may change before its node sends them."""

    alter: Callable[[bytes], bytes] = staticmethod(lambda payload: payload)

    def answer(self, frame: Frame) -> Frame:
        made = super().answer(frame)
        return Frame(made.header, self.alter(made.payload)) if made.payload else made


class Federation:
    """The SuperLink, the nodes' processes, the trainers, and the network between them."""

    def __init__(self, folder: Path, start: Any) -> None:
        self.folder, self.start = kits.make(folder, (*HONEST, ODD, *STRANGERS)), start
        self.kit = read_kit(folder / "coordinator")
        self.socket = link_socket(self.kit)
        coordinator_folder(self.kit).mkdir(mode=0o700)
        self.port: int = self.kit.settings.address.fleet_port  # type: ignore[union-attr]
        self.network = Network(self.port)
        self.lead("far", self.network.port)
        self.link = Child("link", ("silotune.deploy.flower.superlink", str(self.kit.folder)), folder / "link.log")
        self.desks = {name: Desk(name, tiny.adapted(), start) for name in EXAMPLES}
        self.trainers = {name: self._trainer(name) for name in EXAMPLES}
        self.nodes = {name: self._child(name, "silotune.deploy.node") for name in (*HONEST, *STRANGERS)}
        for name in (ODD, "clock"):  # a node that lies, and one whose clock is off
            self.nodes[name] = self._child(name, "odd_node")
        self.way: FlowerTransport | None = None

    def site(self, name: str) -> Kit:
        return read_kit(self.folder / name)

    def lead(self, name: str, port: int) -> None:
        """Turns a site to another port."""
        settings = self.folder / name / "site.toml"
        text = settings.read_text(encoding="utf-8").replace(f"fleet_port = {self.port}", f"fleet_port = {port}")
        settings.write_text(text, encoding="utf-8")

    def _child(self, name: str, module: str) -> Child:
        return Child(name, (module, str(self.folder / name)), self.folder / f"{name}.log")

    def _trainer(self, name: str) -> Trainer:
        kit = self.site(name)
        site_folder(kit).mkdir(mode=0o700)
        host = Trainer(self.desks[name], site_folder(kit) / "rounds")
        threading.Thread(target=host.serve, args=(listen(trainer_socket(kit)),), daemon=True).start()
        return host

    def register(self, *left_out: str) -> None:
        from silotune.deploy.flower import grid as link

        keys = public_keys(self.kit)
        link.register(self.socket, {name: key for name, key in keys.items() if name not in left_out})

    def fleet(self, name: str) -> Fleet:
        kit = self.site(name)
        return Fleet(Address("127.0.0.1", self.port, kit.path("ca.crt")), read_node_key(kit.path("auth.key")))

    def kill(self, name: str) -> None:
        """SIGKILL to a node."""
        process = self.nodes[name].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        return self.nodes[name].log.read_text(encoding="utf-8") if self.nodes[name].log.exists() else ""

    def says(self, name: str, words: str, *, times: int = 1) -> None:
        """Waits until a node has written these words into its log so often."""
        limit = time.monotonic() + LIMIT
        while self.log(name).count(words) < times:
            assert time.monotonic() < limit, self.log(name)
            time.sleep(0.05)

    def round(self, number: int, *, timeout: float = LIMIT) -> dict[str, Reply | Failure]:
        assert self.way is not None
        asked = {name: Request("train", number, name, self.start, ORDER) for name in HONEST}
        return {reply.client: reply for reply in self.way.exchange(asked, timeout_seconds=timeout)}

    def begin(self, number: int) -> tuple[threading.Thread, dict[str, Reply | Failure]]:
        """A round in a thread, and what it will give."""
        for desk in self.desks.values():
            desk.works.clear()
        given: dict[str, Reply | Failure] = {}
        thread = threading.Thread(target=lambda: given.update(self.round(number)), daemon=True)
        thread.start()
        return thread, given


@contextmanager
def out_of_date(folder: Path) -> Iterator[int]:
    """A TLS server whose certificate the federation's authority made long ago; its port."""

    class LongAgo(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) - datetime.timedelta(days=400)

    place = folder / "office" / "authority"
    authority = certificates.Pair((place / "ca.key").read_bytes(), (place / "ca.crt").read_bytes())
    before = certificates.datetime
    certificates.datetime = LongAgo  # type: ignore[misc]
    try:
        server = certificates.new_server(authority, ["127.0.0.1"], days=30)
    finally:
        certificates.datetime = before  # type: ignore[misc]
    for name, content in (("old.crt", server.public), ("old.key", server.private)):
        (folder / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "old.crt", folder / "old.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
                context.wrap_socket(plain, server_side=True).close()
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield int(listener.getsockname()[1])
