"""What a real SuperLink leaves on its disk: while a run goes on, after it, and after kills; and who may read it."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from flwr.superlink.grid import HttpGrid

from linked import HONEST, LIMIT, SETTINGS, Federation
from silotune.deploy.flower import grid as link
from silotune.deploy.flower.disk import DATABASE, log_of_changes
from silotune.deploy.kits import coordinator_folder
from silotune.structs import Failure, Reply, Tensors
from silotune.transports.flower import Errand, FlowerTransport
from silotune.transports.in_process import codec_of

pytestmark = pytest.mark.end_to_end
PIECE = 48
"""Bytes of a tensor that are looked for: so many do not stand in a file by chance."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, start) -> Iterator[Federation]:  # noqa: ANN001
    made = Federation(tmp_path_factory.mktemp("f"), start)
    made.link.start()
    try:
        link.wait_for_link(made.socket, limit_seconds=LIMIT)
        made.register()
        yield made
    finally:
        for node in made.nodes.values():
            node.stop()
        made.link.stop(limit_seconds=5)


@pytest.fixture(autouse=True)
def connected(federation: Federation) -> None:
    """Both sites are up, after whatever the test before has done to them."""
    limit = time.monotonic() + LIMIT
    before = {name: federation.log(name).count("status=connected") for name in HONEST}
    for name in HONEST:
        if not federation.nodes[name].is_running:
            federation.nodes[name].start()
            federation.says(name, "status=connected", times=before[name] + 1)
    while any(link.nodes(federation.socket)[name]["status"] != "online" for name in HONEST):
        assert time.monotonic() < limit
        time.sleep(0.05)


def way(grid: HttpGrid, name: str) -> FlowerTransport:
    return FlowerTransport(grid, HONEST, Errand(name, {"seed": 1}), codec=codec_of(SETTINGS.federation))


def sent(tensors: Tensors) -> set[bytes]:
    """Pieces of the bytes of each tensor, as they travel: whatever a payload is wrapped in, they stand in it."""
    raw = [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors.values()]
    return {content[:PIECE] for content in raw if len(content) >= PIECE and any(content[:PIECE])}


def files(federation: Federation) -> dict[str, bytes]:
    folder = coordinator_folder(federation.kit)
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def holding(federation: Federation, pieces: set[bytes]) -> list[str]:
    return sorted(name for name, content in files(federation).items() if any(piece in content for piece in pieces))


def gone(federation: Federation, pieces: set[bytes], *, within: float = 30.0) -> None:
    limit = time.monotonic() + within
    while holding(federation, pieces):
        assert time.monotonic() < limit, holding(federation, pieces)
        time.sleep(0.1)


def rounds(federation: Federation, name: str, *, count: int) -> set[bytes]:
    """Rounds of a run that ends in order; pieces of all that was sent, down and up."""
    pieces = sent(federation.start)
    with link.flower_run(federation.socket, name) as (_, grid):
        federation.way = way(grid, name)
        for number in range(1, count + 1):
            for reply in federation.round(number).values():
                assert isinstance(reply, Reply), reply
                pieces |= sent(reply.tensors)
    return pieces


def test_after_a_run_its_payloads_are_in_no_file(federation: Federation) -> None:
    pieces = rounds(federation, "first", count=2)
    assert len(pieces) > 10
    gone(federation, pieces)


def test_payloads_that_nobody_fetched_go_when_their_run_is_ended_after_a_kill(federation: Federation) -> None:
    pieces = sent(federation.start)
    federation.kill("near")  # its node counts as up for a while
    with link.flower_run(federation.socket, "killed") as (run_id, grid):
        federation.way = way(grid, "k")
        assert isinstance(federation.round(1, timeout=2.0)["near"], Failure)
        assert holding(federation, pieces)  # it waits for the site
        assert federation.link.process is not None
        os.kill(federation.link.process.pid, signal.SIGKILL)
        federation.link.process.wait()
    assert holding(federation, pieces)  # nobody has signed the run off
    federation.link.start()
    link.wait_for_link(federation.socket, limit_seconds=LIMIT)
    link.stop_run(federation.socket, run_id)
    gone(federation, pieces)


def test_payloads_that_nobody_fetched_go_when_their_run_ends_in_order(federation: Federation) -> None:
    pieces = sent(federation.start)
    for desk in federation.desks.values():
        desk.gate.clear()
    with link.flower_run(federation.socket, "late") as (_, grid):
        federation.way = way(grid, "late")
        federation.kill("far")
        assert all(isinstance(reply, Failure) for reply in federation.round(1, timeout=2.0).values())
        assert holding(federation, pieces)
    gone(federation, pieces)  # the node that was killed does not come and ask for them
    for desk in federation.desks.values():
        desk.gate.set()


def test_the_log_of_changes_is_emptied_while_a_run_goes_on(federation: Federation) -> None:
    log = log_of_changes(coordinator_folder(federation.kit) / DATABASE)
    with link.flower_run(federation.socket, "long") as (_, grid):
        federation.way = way(grid, "long")
        for number in (1, 2):
            assert all(isinstance(reply, Reply) for reply in federation.round(number).values())
            limit = time.monotonic() + 30
            while log.stat().st_size:
                assert time.monotonic() < limit, log.stat().st_size
                time.sleep(0.05)


def test_nobody_else_may_read_the_database_or_reach_the_socket(federation: Federation) -> None:
    folder = coordinator_folder(federation.kit)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if "superlink" in path.name}
    assert {"superlink.db", "superlink.db-wal", "superlink.sock"} <= found.keys()
    assert set(found.values()) == {0o600}
    with closing(sqlite3.connect(folder / "superlink.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
