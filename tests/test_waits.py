"""Nothing hangs: every wait has a limit that an error names, or a reason to have none that stands here."""

from __future__ import annotations

import ast
import fcntl
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kits
import silotune
from governed import job
from silotune.config import Config
from silotune.deploy import check, demo, processes, submit
from silotune.deploy.flower import fleet
from silotune.deploy.flower import grid as link
from silotune.deploy.kits import Kit, read_kit, site_settings
from silotune.deploy.queue import Jobs
from silotune.errors import FederationError, PrivacyError
from silotune.federation.site import ledger as budget
from silotune.transports.frames import Frame, ask, listen, wait_until_ready

SOURCE = Path(silotune.__file__).parent
FOREVER = {
    "benchmark/workers.py:_Worker.take": "a cell of a grid takes as long as it takes; a worker that dies ends the wait",
    "benchmark/workers.py:_Worker.end": "for a process that was ended",
    "benchmark/workers.py:serve": "a worker serves until its grid is gone",
    "dashboard/deployment.py:Deployment.refresh": "a status, whose calls have limits, for a saved file",
    "dashboard/grids.py:WatchedGrid.refresh": "a thread of this process that computes, for a saved file",
    "dashboard/server.py:_changes": "a page that is open is kept up to date until it is closed",
    "deploy/check.py:_clock": "the connection has the limit",
    "deploy/coordinator.py:start": "a service runs until it is stopped",
    "deploy/node.py:_pause": "a service runs until it is stopped; 'site status' says what it waits for",
    "deploy/processes.py:Child.stop": "for a process that was killed",
    "deploy/site.py:start": "a service runs until it is stopped",
    "deploy/flower/superlink.py:_serve": "a service runs until it is stopped",
    "evaluation/generate.py:stream_answer": "for as many tokens as were asked for",
    "methods/aggregate.py:beside_controls.aggregate": "no wait: a sum's result",
    "methods/aggregate.py:weighted_mean": "no wait: a sum's result",
    "methods/robust.py:geometric_median": "no wait: a sum's result",
    "privacy/masks.py:add_streams": "for threads of this process that compute",
    "record/energy.py:Codecarbon.close": "for a thread of this process that reads local files",
    "record/energy.py:Codecarbon.co2_kg": "as above",
    "record/energy.py:Codecarbon.joules": "as above",
    "record/energy.py:Codecarbon.method": "as above",
    "record/energy.py:Codecarbon.source": "as above",
    "transports/flower.py:FlowerTransport._first": "the limit of the exchange that it is part of",
    "transports/flower.py:FlowerTransport.exchange": "federation.timeout_seconds, which the failure names",
    "transports/flower.py:simulated_grid.main": "until the run in the other thread is over",
    "transports/frames.py:_read": "the connection has the limit",
    "transports/in_process.py:InProcess._side_by_side": "a local round takes as long as it takes",
    "transports/in_process.py:InProcess._side_by_side.work": "a local round takes as long as it takes",
    "transports/trainer_host.py:TrainerHost._accept": "a service runs until it is stopped",
}
"""Waits of the source without a limit of their own -> why."""

WAITS = ("wait", "join", "get", "accept", "recv", "communicate", "result", "acquire")


def unlimited(tree: ast.AST) -> Iterator[str]:
    """Functions of a module that wait without an argument that could be a limit, or sleep and never give up."""

    def visit(node: ast.AST, names: tuple[str, ...], owner: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            is_named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            inside = (*names, child.name) if is_named else names  # type: ignore[attr-defined]
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and _waits(child, owner):
                yield ".".join(inside)
            yield from visit(child, inside, child if is_named else owner)

    yield from visit(tree, (), tree)


def _waits(call: ast.Call, owner: ast.AST) -> bool:
    name = call.func.attr  # type: ignore[attr-defined]
    text = ast.unparse(call)
    if name == "flock":
        return "LOCK_NB" not in text
    if name == "sleep":
        gives_up = any(isinstance(node, ast.Raise) for node in ast.walk(owner))
        return not (gives_up and "time.monotonic()" in ast.unparse(owner))
    if text.startswith("asyncio.wait("):
        return True
    has_limit = any(word.arg == "timeout" for word in call.keywords)
    return name in WAITS and not has_limit and not (call.args and name in ("wait", "join", "get", "result"))


def test_what_waits_without_a_limit_is_known() -> None:
    found = {
        f"{path.relative_to(SOURCE)}:{where}"
        for path in sorted(SOURCE.rglob("*.py"))
        for where in unlimited(ast.parse(path.read_text(encoding="utf-8")))
    }
    accepts = {"federation/site/secure_sum.py:accept_shares"}  # the protocol's word for a message
    assert found - accepts == set(FOREVER)


# --- the limits that are there, and the errors that name them --------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kits.make(tmp_path_factory.mktemp("f"), ["a"])


@pytest.fixture
def silent(folder: Path) -> Iterator[Kit]:
    """A site whose coordinator accepts connections and says nothing."""
    kit = read_kit(folder / "a")
    with socket.create_server(("127.0.0.1", site_settings(kit).coordinator.fleet_port)):
        yield kit


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[Path]:
    """A Unix socket at which somebody listens who never answers."""
    path = tmp_path / "own" / "s.sock"
    with listen(path):
        yield path


def waited(words: str, work: Callable[[], Any], kind: type[Exception] = FederationError) -> None:
    began = time.monotonic()
    with pytest.raises(kind, match=words):
        work()
    assert time.monotonic() - began < 5


def test_a_site_names_how_long_it_waited_for_the_coordinator(silent: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "CALL_SECONDS", 0.1)
    where = site_settings(silent).coordinator
    address = fleet.Address(where.host, where.fleet_port, silent.path("ca.crt"))
    node = fleet.Fleet(address, fleet.read_node_key(silent.path("auth.key")))
    waited(r"gave no answer within 0\.1 s", lambda: node.activate(0))
    monkeypatch.setattr(check, "_SECONDS", 0.1)
    said = {item.name: item.said for item in check.check_site(silent) if not item.ok}
    assert "within 0.1 s" in said["TLS"] and "within 0.1 s" in said["clock"]


def test_the_trainer_is_waited_for_within_a_limit(deaf: Path, tmp_path: Path) -> None:
    waited(r"no answer within 0\.1 s", lambda: ask(deaf, Frame({"verb": "state"}), timeout_seconds=0.1))
    waited(r"did not start within 0\.1 s", lambda: wait_until_ready(tmp_path / "none.sock", timeout_seconds=0.1))


def test_the_superlink_is_waited_for_within_a_limit(
    deaf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_SECONDS", 0.1)
    waited(r"no answer within 0\.1 s", lambda: link.nodes(deaf))
    waited(r"did not start within 0\.2 s", lambda: link.wait_for_link(tmp_path / "none.sock", limit_seconds=0.2))
    monkeypatch.setattr(link, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(link, "exponential", lambda max_delay: iter([0.05] * 100))
    grid = link.LocalGrid(tmp_path / "none.sock", "token")
    grid._client = link._runtime(tmp_path / "none.sock", "token", retry_seconds=0.3)
    waited(r"no answer within 0\.3 s", grid.get_nodes)


def test_who_follows_a_run_is_told_that_no_coordinator_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AWAY_SECONDS", 0.1)
    jobs = Jobs(folder / "jobs")
    name = jobs.submit(Config(), job(run="it"))
    waited(r"'it' is queued, .* within 0\.1 s: start it", lambda: list(submit.follow_run(jobs, name)))


def test_the_demonstration_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "START_SECONDS", 0.1)
    waited(r"not connected within 0\.1 s", lambda: demo._wait([], lambda: False))


def test_a_process_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "kill", lambda process, number: None)
    with processes.only_one(tmp_path, "it"):
        waited(r"did not end within 0\.1 s", lambda: processes.stop_holder(tmp_path, "it", limit_seconds=0.1))


def test_a_ledger_that_another_process_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LOCK_SECONDS", 0.1)

    def opened() -> None:
        with budget._ledger(tmp_path, "a"):
            pass

    opened()
    with (tmp_path / ".a.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waited(r"held by another process for 0\.1 s", opened, PrivacyError)
    later = threading.Thread(target=opened)
    later.start()
    later.join(5)
    assert not later.is_alive()
