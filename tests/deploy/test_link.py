"""A real SuperLink over TLS and real nodes, and what can go wrong between them; trainers are threads of the test."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

import kits
import tiny
from silotune.deploy import link
from silotune.deploy.check import check_site
from silotune.deploy.coordinator import public_keys
from silotune.deploy.fleet import Address, Fleet, LostConnectionError, read_node_key
from silotune.deploy.kits import Kit, read_kit
from silotune.deploy.places import coordinator_folder, link_socket, site_folder, trainer_socket
from silotune.deploy.processes import Child
from silotune.errors import FederationError
from silotune.federation.client import Site, TrainOrder, client_round
from silotune.federation.messages import encode, layout_of
from silotune.sections import FederationSection
from silotune.structs import Failure, Reply, Request
from silotune.transports.flower import Errand, FlowerTransport
from silotune.transports.frames import listen
from silotune.transports.in_process import decode_expected
from silotune.transports.trainer_host import Opened, TrainerHost

pytestmark = pytest.mark.end_to_end
SITES = ("near", "far", "revoked", "stranger")
LIMIT = 120.0
EXAMPLES = {name: tiny.encoded(tiny.closed(6))[place::2] for place, name in enumerate(("near", "far"))}
BODY = TrainOrder(
    training=tiny.training(learning_rate=0.01, optimizer_state="keep"), federation=FederationSection(), seed=3, rounds=3
).model_dump(mode="json")


class Network:
    """A proxy that cuts, delays or swallows what goes from a node to the coordinator."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.fault: Callable[[bytes, int], bytes | None] = lambda data, sent: data
        self.cuts = 0
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
        sent = 0
        try:
            while data := source.recv(1 << 14):
                passed = self.fault(data, sent) if is_up else data
                if passed is None:
                    self.cuts += 1
                    break
                target.sendall(passed)
                sent += len(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()


class Desk:
    """A site's examples on the tiny model; a gate holds its work."""

    def __init__(self, name: str, model: Any, start: Any) -> None:
        self.name, self.model, self.expected = name, model, {"train": layout_of(start)}
        self.gate, self.works = threading.Event(), threading.Event()
        self.gate.set()

    def open(self, setup: Mapping[str, Any]) -> Opened:
        return Opened(Site(self.name, Gated(self), self.model), self.expected, keep=2)

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


class Federation:
    """The SuperLink, the nodes' processes, the trainers, and the network between them."""

    def __init__(self, folder: Path, model: Any, start: Any) -> None:
        self.folder, self.start = kits.make(folder, SITES), start
        self.kit = read_kit(folder / "coordinator")
        self.socket = link_socket(self.kit)
        coordinator_folder(self.kit).mkdir(mode=0o700)
        port = self.kit.settings.address.fleet_port  # type: ignore[union-attr]
        self.network = Network(port)
        far = folder / "far" / "site.toml"
        far.write_text(far.read_text().replace(f"fleet_port = {port}", f"fleet_port = {self.network.port}"))
        self.link = Child("link", ("silotune.deploy.superlink", str(self.kit.folder)), folder / "link.log")
        self.desks = {name: Desk(name, tiny.adapted(), start) for name in EXAMPLES}
        self.nodes = {name: self._node(name) for name in EXAMPLES}
        self.way: FlowerTransport | None = None

    def site(self, name: str) -> Kit:
        return read_kit(self.folder / name)

    def _node(self, name: str) -> Child:
        kit = self.site(name)
        site_folder(kit).mkdir(mode=0o700)
        host = TrainerHost(self.desks[name], site_folder(kit) / "rounds")
        threading.Thread(target=host.serve, args=(listen(trainer_socket(kit)),), daemon=True).start()
        return Child(name, ("silotune.deploy.node", str(kit.folder)), self.folder / f"{name}.log")

    def fleet(self, name: str, *, authority: Path | None = None) -> Fleet:
        kit = self.site(name)
        port = self.kit.settings.address.fleet_port  # type: ignore[union-attr]
        address = Address("127.0.0.1", port, authority or kit.path("ca.crt"))
        return Fleet(address, read_node_key(kit.path("auth.key")))

    def kill(self, name: str) -> None:
        process = self.nodes[name].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def round(self, number: int, *, timeout: float = LIMIT) -> dict[str, Reply | Failure]:
        assert self.way is not None
        asked = {name: Request("train", number, name, self.start, BODY) for name in EXAMPLES}
        return {reply.client: reply for reply in self.way.exchange(asked, timeout_seconds=timeout)}

    def begin(self, number: int) -> tuple[threading.Thread, dict[str, Reply | Failure]]:
        """A round in a thread, and what it will give."""
        for desk in self.desks.values():
            desk.works.clear()
        given: dict[str, Reply | Failure] = {}
        thread = threading.Thread(target=lambda: given.update(self.round(number)), daemon=True)
        thread.start()
        return thread, given


@pytest.fixture(scope="module")
def wanted(start) -> list[dict[str, Any]]:  # noqa: ANN001
    """What every site's update is in rounds 1 to 3 when nothing goes wrong."""
    sites = {name: Site(name, examples, tiny.adapted()) for name, examples in EXAMPLES.items()}
    return [
        {name: client_round(Request("train", number, name, start, BODY), site).tensors for name, site in sites.items()}
        for number in (1, 2, 3)
    ]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, model, start) -> Iterator[Federation]:  # noqa: ANN001
    made = Federation(tmp_path_factory.mktemp("f"), model, start)
    made.link.start()
    try:
        link.wait_for_link(made.socket, limit_seconds=LIMIT)
        keys = public_keys(made.kit)
        link.register(made.socket, {name: key for name, key in keys.items() if name != "stranger"})
        for node in made.nodes.values():
            node.start()
        yield made
    finally:
        for node in made.nodes.values():
            node.stop()
        made.link.stop(limit_seconds=5)


@pytest.fixture(scope="module")
def run(federation: Federation) -> Iterator[Federation]:
    with link.flower_run(federation.socket, "run-1") as (_, grid):
        federation.way = FlowerTransport(
            grid, tuple(EXAMPLES), Errand("run-1", {"seed": 1}), encode=encode, decode=decode_expected
        )
        yield federation


def check(found: Mapping[str, Reply | Failure], wanted: Mapping[str, Any]) -> None:
    for name in EXAMPLES:
        reply = found[name]
        assert isinstance(reply, Reply), reply
        tiny.assert_same_bits(reply.tensors, wanted[name])


def waits(node: Child, words: str) -> None:
    limit = time.monotonic() + LIMIT
    while words not in node.log.read_text(encoding="utf-8"):
        assert time.monotonic() < limit, node.log.read_text(encoding="utf-8")
        time.sleep(0.05)


# --- who may come in -------------------------------------------------------------------------------------------------


def test_from_outside_only_fleet_over_tls_is_reached(federation: Federation) -> None:
    place = f"127.0.0.1:{federation.kit.settings.address.fleet_port}"  # type: ignore[union-attr]
    context = ssl.create_default_context(cafile=str(federation.kit.path("ca.crt")))
    with httpx.Client(verify=context) as client:
        for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/control/register-node"):
            assert client.post(f"https://{place}{path}", content=b"x").status_code == 404
        assert client.post(f"https://{place}/v1/fleet/pull-messages", content=b"x").status_code >= 400  # unsigned
    with pytest.raises(httpx.TransportError), httpx.Client() as client:
        client.post(f"http://{place}/v1/fleet/pull-messages", content=b"x")
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", int(place.partition(":")[2]))) as plain:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.wrap_socket(plain)
    assert federation.socket.parent.stat().st_mode & 0o077 == 0


def test_another_authority_is_not_trusted(federation: Federation, tmp_path: Path) -> None:
    other = kits.make(tmp_path / "other", ["a"]) / "a" / "ca.crt"
    with pytest.raises(FederationError, match="certificate of .* does not hold.*kit's ca.crt"):
        federation.fleet("revoked", authority=other).activate(0)


def test_a_site_that_is_not_registered_waits_and_says_why(federation: Federation) -> None:
    with pytest.raises(LostConnectionError, match="not registered or was revoked"):
        federation.fleet("stranger").activate(0)


def test_check_finds_a_site_in_order(federation: Federation) -> None:
    found = check_site(federation.site("revoked"))
    assert [(item.name, item.said) for item in found if not item.ok and item.name not in ("memory", "disk")] == []


def test_a_clock_off_by_a_day_is_named(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = federation.fleet("revoked")
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", lambda: tomorrow)
    with pytest.raises(FederationError, match="clock is off by more than 5 minutes"):
        fleet.activate(0)


def test_a_site_that_is_revoked_is_out_at_once(federation: Federation) -> None:
    fleet = federation.fleet("revoked")
    fleet.activate(0)
    assert fleet.pull() is None
    keys = public_keys(federation.kit)
    link.register(federation.socket, {name: keys[name] for name in EXAMPLES})
    with pytest.raises(FederationError, match="revoked"):
        fleet.pull()
    with pytest.raises(FederationError, match="revoked"):
        federation.fleet("revoked").activate(0)


# --- what can happen in a round --------------------------------------------------------------------------------------


def test_a_network_that_delays_cuts_and_truncates_changes_no_bit(run: Federation, wanted) -> None:  # noqa: ANN001
    waits(run.nodes["far"], "status=connected")
    seen = []

    def bad(data: bytes, sent: int) -> bytes | None:
        seen.append(len(data))
        time.sleep(0.01 * (len(seen) % 3))
        return None if len(seen) in (4, 9, 15) else data

    run.network.fault = bad
    check(run.round(1), wanted[0])
    run.network.fault = lambda data, sent: data
    assert run.network.cuts >= 1


def test_a_site_killed_in_training_is_asked_again(run: Federation, wanted) -> None:  # noqa: ANN001
    run.desks["near"].gate.clear()
    thread, given = run.begin(2)
    assert run.desks["near"].works.wait(LIMIT)
    run.kill("near")
    run.desks["near"].gate.set()
    run.nodes["near"].start()
    thread.join(LIMIT)
    check(given, wanted[1])


def test_a_site_killed_in_upload_is_asked_again(run: Federation, wanted) -> None:  # noqa: ANN001
    cut = threading.Event()

    def stall(data: bytes, sent: int) -> bytes | None:
        if len(data) > 3000 or cut.is_set():  # the update itself: it gets half-way, and no further
            cut.set()
            time.sleep(0.2)
            return data[:100]
        return data

    run.network.fault = stall
    thread, given = run.begin(2)  # asked a second time: the states between rounds must not be those after it
    assert cut.wait(LIMIT)
    run.kill("far")
    run.network.fault = lambda data, sent: data
    run.nodes["far"].start()
    thread.join(LIMIT)
    check(given, wanted[1])


def test_a_site_killed_between_rounds_comes_back_late(run: Federation, wanted) -> None:  # noqa: ANN001
    run.kill("near")
    found = run.round(3, timeout=2.0)
    late = found["near"]
    assert isinstance(late, Failure) and "within federation.timeout_seconds = 2" in late.reason
    run.nodes["near"].start()
    check(run.round(3), wanted[2])


def test_the_superlink_is_killed_and_started_again(run: Federation, wanted) -> None:  # noqa: ANN001
    assert run.link.process is not None
    os.kill(run.link.process.pid, signal.SIGKILL)
    run.link.process.wait()
    run.link.start()
    check(run.round(3), wanted[2])
