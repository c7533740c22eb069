"""What can go wrong between a real SuperLink and real nodes, over TLS: who comes in, and what a round survives."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import kits
import tiny
from acting import ORDER
from linked import (
    EXAMPLES,
    HONEST,
    LIMIT,
    ODD,
    SETTINGS,
    STRANGERS,
    Federation,
    Weather,
    out_of_date,
    unchanged,
)
from silotune.deploy.check import check_site
from silotune.deploy.flower import grid as link
from silotune.errors import FederationError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import decode_reply, encode, layout_of
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings.sections import FederationSection
from silotune.structs import Failure, Reply, Request, ServerState
from silotune.transports.flower import Errand, FlowerTransport
from silotune.transports.in_process import codec_of

pytestmark = pytest.mark.end_to_end
CODEC = codec_of(SETTINGS.federation)


@pytest.fixture(scope="module")
def wanted(start) -> list[dict[str, Any]]:  # noqa: ANN001
    """What every site's update is in rounds 1 to 3 when nothing goes wrong."""
    sites = {name: Site(name, EXAMPLES[name], tiny.adapted(), settings=SETTINGS) for name in HONEST}
    return [
        {name: client_round(Request("train", number, name, start, ORDER), site).tensors for name, site in sites.items()}
        for number in (1, 2, 3)
    ]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, start) -> Iterator[Federation]:  # noqa: ANN001
    made = Federation(tmp_path_factory.mktemp("f"), start)
    made.link.start()
    with pytest.MonkeyPatch.context() as patch:
        known = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *([known] if known else [])]))
        try:
            link.wait_for_link(made.socket, limit_seconds=LIMIT)
            made.register("stranger")
            yield made
        finally:
            for node in made.nodes.values():
                node.stop()
            made.link.stop(limit_seconds=5)


@pytest.fixture(scope="module")
def run(federation: Federation) -> Iterator[Federation]:
    with link.flower_run(federation.socket, "run-1") as (_, grid):
        federation.way = FlowerTransport(grid, HONEST, Errand("run-1", {"seed": 1}), codec=CODEC)
        yield federation


def check(found: Mapping[str, Reply | Failure], wanted: Mapping[str, Any]) -> None:
    for name in HONEST:
        reply = found[name]
        assert isinstance(reply, Reply), reply
        tiny.assert_same_bits(reply.tensors, wanted[name])


# --- who may come in -------------------------------------------------------------------------------------------------


def test_from_outside_only_fleet_over_tls_is_reached(federation: Federation) -> None:
    place = f"127.0.0.1:{federation.port}"
    context = ssl.create_default_context(cafile=str(federation.kit.path("ca.crt")))
    with httpx.Client(verify=context) as client:
        for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/control/register-node"):
            assert client.post(f"https://{place}{path}", content=b"x").status_code == 404
        assert client.post(f"https://{place}/v1/fleet/pull-messages", content=b"x").status_code >= 400  # unsigned
    with pytest.raises(httpx.TransportError), httpx.Client() as client:
        client.post(f"http://{place}/v1/fleet/pull-messages", content=b"x")
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", federation.port)) as plain:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.wrap_socket(plain)
    assert federation.socket.parent.stat().st_mode & 0o077 == 0


def test_nodes_that_do_not_belong_say_why(federation: Federation, tmp_path: Path) -> None:
    """Another authority, an expired certificate, a clock off by a day, a key that is not registered."""
    other = kits.make(tmp_path / "other", ["a"]) / "a" / "ca.crt"
    (federation.folder / "misled" / "ca.crt").write_bytes(other.read_bytes())
    (federation.folder / "clock" / "odd").write_text("clock", encoding="utf-8")
    with out_of_date(federation.folder) as port:
        federation.lead("expired", port)
        for name in ("misled", "expired", "clock", "stranger"):
            (federation.folder / name / "state").mkdir(mode=0o700)
            federation.nodes[name].start()
        for name, words in {
            "misled": "the kit's ca.crt must be that of the federation",
            "expired": "does not hold: certificate has expired",
            "clock": "its clock is off by more than 5 minutes",
        }.items():
            process = federation.nodes[name].process
            assert process is not None and process.wait(LIMIT) == FederationError.exit_code
            assert words in federation.log(name), federation.log(name)
    federation.says("stranger", "its key is not registered or was revoked (ask the coordinator)")
    federation.register()
    federation.says("stranger", "status=connected")  # it waited, and nobody had to start it again
    federation.nodes["stranger"].stop()


def test_check_finds_a_site_in_order(federation: Federation) -> None:
    found = check_site(federation.site("revoked"))
    assert [(item.name, item.said) for item in found if not item.ok and item.name not in ("memory", "disk")] == []


def test_a_site_that_is_revoked_is_out_at_once(federation: Federation) -> None:
    federation.nodes["revoked"].start()
    federation.says("revoked", "status=connected")
    federation.register(*STRANGERS)
    process = federation.nodes["revoked"].process
    assert process is not None and process.wait(LIMIT) == FederationError.exit_code
    assert "its key was revoked (ask the coordinator)" in federation.log("revoked")
    with pytest.raises(FederationError, match="revoked"):
        federation.fleet("revoked").activate(0)


# --- what can happen in a round --------------------------------------------------------------------------------------


def test_sites_join_late_leave_and_come_back(run: Federation, wanted) -> None:  # noqa: ANN001
    thread, given = run.begin(1)
    for name in HONEST:  # the request is there before they are
        run.nodes[name].start()
    thread.join(LIMIT)
    check(given, wanted[0])
    run.nodes["near"].stop()
    assert "status=stopped" in run.log("near")  # it signed off
    thread, given = run.begin(2)
    assert run.desks["far"].works.wait(LIMIT)
    run.nodes["near"].start()
    thread.join(LIMIT)
    check(given, wanted[1])


def test_a_network_that_drops_delays_doubles_mixes_and_truncates_changes_no_bit(run: Federation, wanted) -> None:  # noqa: ANN001
    run.network.fault = weather = Weather()
    try:
        for number in (1, 2, 3):
            check(run.round(number), wanted[number - 1])
        limit = time.monotonic() + LIMIT
        while weather.left:
            assert time.monotonic() < limit, weather.left
            time.sleep(0.05)
    finally:
        run.network.fault = unchanged
    check(run.round(3), wanted[2])
    assert run.log("far").count("status=waiting") >= 2  # an answer that was there already is kept


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

    def stall(data: bytes, is_up: bool) -> tuple[bytes, bool]:
        if is_up and (len(data) > 3000 or cut.is_set()):  # the update itself: it gets half-way, and no further
            cut.set()
            time.sleep(0.2)
            return data[:100], False
        return data, False

    run.network.fault = stall
    thread, given = run.begin(2)  # asked a second time: the states between rounds must not be those after it
    assert cut.wait(LIMIT)
    run.kill("far")
    run.network.fault = unchanged
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


# --- a site that lies ------------------------------------------------------------------------------------------------


def _tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes, Any], bytes]:
    def altered(payload: bytes, start: Any) -> bytes:
        reply = decode_reply(payload, layout_of(start))
        first, *others = reply.tensors
        kept = {name: reply.tensors[name] for name in others}
        return encode(replace(reply, tensors={first: change(reply.tensors[first].clone()), **kept}))

    return altered


def _renamed(payload: bytes, start: Any) -> bytes:
    reply = decode_reply(payload, layout_of(start))
    return encode(replace(reply, tensors={f"{name}.x": value for name, value in reply.tensors.items()}))


def _announced(payload: bytes, start: Any) -> bytes:
    """The list of tensors says that the first has ten billion bytes; what follows is as long as before."""
    front = 8 + int.from_bytes(payload[4:8], "little")
    length = int.from_bytes(payload[front : front + 8], "little")
    listed = json.loads(payload[front + 8 : front + 8 + length])
    name = next(iter(start))
    listed[name] = {**listed[name], "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}
    text = json.dumps(listed).encode()
    return payload[:front] + struct.pack("<Q", len(text)) + text + payload[front + 8 + length :]


LIES: dict[str, tuple[Callable[[bytes, Any], bytes], str]] = {
    "NaN": (_tensors(lambda value: value.fill_(float("nan"))), "not finite"),
    "1e30": (_tensors(lambda value: value.fill_(1e30)), "holds a value of 1e+30: at most 1e+12 is taken"),
    "shape": (_tensors(lambda value: value[:-1]), "expected"),
    "names": (_renamed, "is unexpected in a message|is missing in a message"),
    "10 GB": (_announced, "2500000000"),
    "cut short": (lambda payload, start: payload[:-40], "do not decode"),
    "another round": (
        lambda payload, start: encode(replace(decode_reply(payload, layout_of(start)), round_number=9)),
        "answers no request of round 1",
    ),
    "in another's name": (
        lambda payload, start: encode(replace(decode_reply(payload, layout_of(start)), client="near")),
        "in the name of another",
    ),
}
NODE_LIES = {"replay": "a reply answers another request", "huge": "announces far more bytes than its request had"}


def test_a_site_that_lies_fails_alone(run: Federation, wanted, tmp_path: Path) -> None:  # noqa: ANN001
    """Each lie travels through a real node and the SuperLink; the round goes on with the other site's update."""
    assert run.way is not None
    names = ("near", ODD)
    way = FlowerTransport(run.way._grid, names, Errand("run-1", {"seed": 1}), codec=CODEC)
    plan = Plan(
        rounds=1, method=method(FederationSection()), body=ORDER, seed=3, settings=SETTINGS, timeout_seconds=LIMIT
    )
    run.nodes[ODD].start()

    def reason_of(lie: str) -> str:
        folder = RunFolder(tmp_path / lie)
        state = run_rounds(plan, way, ServerState(0, run.start), folder)
        (row,) = folder.read_rows("metrics")
        if row["failures"]:
            (failure,) = row["failures"]
            alone = {name: run.start[name] + value for name, value in wanted[0]["near"].items()}
            tiny.assert_close(state.weights, alone, 1e-6)
            assert failure["client"] == ODD
            return str(failure["reason"])
        return ""

    assert reason_of("none") == ""
    for lie, (alter, words) in LIES.items():
        run.trainers[ODD].alter = lambda payload, alter=alter: alter(payload, run.start)
        assert any(part in reason_of(lie) for part in words.split("|")), lie
    run.trainers[ODD].alter = lambda payload: payload
    for lie, words in NODE_LIES.items():
        (run.folder / ODD / "odd").write_text(lie, encoding="utf-8")
        assert words in reason_of(lie), lie
    (run.folder / ODD / "odd").write_text("", encoding="utf-8")
    assert reason_of("none again") == ""
