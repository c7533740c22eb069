"""Clients in processes beside this one: the bits of clients here, and a run that outlives its workers."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from acting import ORDER
from crowd import KEEPING, SETTINGS, ask, many
from silotune.federation.site.state import Site
from silotune.models import adapters
from silotune.record.cost import Meter
from silotune.record.family import Family
from silotune.structs import Failure, Reply, Request
from silotune.transports import worker_processes
from silotune.transports.in_process import Handling, InProcess, WorkerLost
from silotune.transports.worker_processes import WorkerProcess, serve

TESTS = Path(__file__).parents[1]
NOBODY = 2**22 - 1
"""No process's number here."""


class Thread:
    """Stands for a process: the other end runs in a thread of this one."""

    def __init__(self, arguments: list[str], *, pass_fds: list[int], **_: Any) -> None:
        self.pid = NOBODY
        self.thread = threading.Thread(target=serve, args=(os.dup(pass_fds[0]), load), daemon=True)
        self.thread.start()

    def kill(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()  # its socket was closed

    def wait(self) -> int:
        return -9


def load(opening: dict[str, Any]) -> Any:
    return tiny.adapted(**opening)


def wait_until_ready(worker: WorkerProcess, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not worker.is_ready:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    monkeypatch.setattr(worker_processes.subprocess, "Popen", Thread)
    made = WorkerProcess("none", {"stirred": False}, family=Family())
    wait_until_ready(made)  # both ends draw weights from one generator here
    yield made
    made.close()


def test_a_worker_trains_evaluates_and_keeps_what_a_client_keeps(worker: WorkerProcess) -> None:
    model = tiny.adapted(stirred=False)
    start = adapters.read(model)
    near, far = many(model, 2, KEEPING), many(model, 2, KEEPING)
    worker.begin()
    for number in (1, 2):
        for name in near:
            request = Request("train", number, name, start, ORDER)
            here = InProcess({name: near[name]}).exchange({name: request}, timeout_seconds=1)
            [left], right = list(here), worker(request, far[name], Handling())
            assert isinstance(left, Reply) and isinstance(right, Reply)
            tiny.assert_same_bits(left.tensors, right.tensors)
            tiny.assert_same_bits(near[name].state.tensors, far[name].state.tensors)
            assert (left.bytes_down, left.body["loss"]) == (right.bytes_down, right.body["loss"])
            assert near[name].state.tensors
    scored = worker(Request("evaluate", 3, "site-0", start, ORDER), far["site-0"], Handling())
    assert isinstance(scored, Reply) and scored.body["num_examples"] == len(far["site-0"].examples)


def test_sites_of_the_same_names_are_other_sites(worker: WorkerProcess) -> None:
    model = tiny.adapted(stirred=False)
    start = adapters.read(model)
    request = Request("train", 1, "site-0", start, ORDER)
    counts = []
    for examples in (many(model)["site-0"].examples, many(model)["site-0"].examples[:3]):
        worker.begin()
        reply = worker(request, Site("site-0", examples, model, settings=SETTINGS), Handling(encode=False))
        assert isinstance(reply, Reply)
        counts.append(reply.body["num_examples"])
    assert counts == [8, 3]


def test_a_client_that_fails_fails_there_as_here_and_its_cost_is_the_coordinators(worker: WorkerProcess) -> None:
    model = tiny.adapted(stirred=False)
    worker.begin()
    site = Site("site-0", (), model, meter=Meter(), settings=SETTINGS)
    failure = worker(Request("train", 1, "site-0", adapters.read(model), ORDER), site, Handling())
    assert isinstance(failure, Failure) and failure.reason == "a client has no examples to train on"
    assert site.meter.coordinator().core_seconds > 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).mT,
        torch.tensor(2.5),
        torch.zeros(0, 4),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.int64),
    ],
)
def test_tensors_arrive_as_they_were_sent(tensor: torch.Tensor) -> None:
    names = {"b": torch.ones(2), "a": tensor, "c": tensor}
    groups = worker_processes._groups_in(worker_processes._packed({}, {"one": names, "none": {}}))
    assert list(groups["one"]) == ["b", "a", "c"] and groups["none"] == {}
    found = groups["one"]["a"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    found.add_(1) if found.dtype != torch.bool else found.logical_not_()  # it may be written to


# --- real processes -------------------------------------------------------------------------------------------------


@contextmanager
def started(monkeypatch: pytest.MonkeyPatch, family: Family, **opening: Any) -> Iterator[WorkerProcess]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    worker = WorkerProcess("tiny_worker", opening, family=family)
    try:
        yield worker
    finally:
        worker.close()


@pytest.mark.end_to_end
def test_real_processes_give_the_same_bits_and_their_cost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family()
    model = tiny.adapted(stirred=False)
    start = adapters.read(model)
    alone = ask(InProcess(many(model)), start)
    meter = Meter(family=family)
    with started(monkeypatch, family, stirred=False) as worker:
        sites = many(model)
        for site in sites.values():
            site.meter = meter
        transport = InProcess(sites, workers=2, helpers=[worker])
        assert [type(reply) for reply in ask(transport, start)] == [Reply] * 7  # by whoever is ready
        wait_until_ready(worker)
        meter.coordinator()
        before, worked = family.cpu_seconds(), _cpu_seconds(worker)
        beside = ask(transport, start)
        assert _cpu_seconds(worker) > worked
        assert family.helpers_high_water_bytes() > 50e6
        spent = sum(reply.body["core_seconds"] for reply in beside)
        assert 0 < spent <= family.cpu_seconds() - before + 0.05
    assert family.helpers_high_water_bytes() == 0
    assert family.cpu_seconds() >= before + spent - 0.05  # a helper that has ended has still spent what it spent
    for left, right in zip(alone, beside, strict=True):
        assert isinstance(left, Reply) and isinstance(right, Reply)
        assert left.client == right.client
        tiny.assert_same_bits(left.tensors, right.tensors)


def _cpu_seconds(worker: WorkerProcess) -> float:
    return time.clock_gettime(~worker._process.pid << 3 | 2)


@pytest.mark.end_to_end
def test_a_worker_that_is_killed_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.adapted(stirred=False)
    start = adapters.read(model)
    with started(monkeypatch, Family(), stirred=False) as worker:
        transport = InProcess(many(model), workers=2, helpers=[worker])
        wait_until_ready(worker)
        os.kill(worker._process.pid, signal.SIGKILL)
        with caplog.at_level(logging.WARNING):
            found = [ask(transport, start), ask(transport, start)]
    assert "a worker process was ended by signal 9; its clients are trained by the others" in caplog.text
    for replies in found:
        for left, right in zip(ask(InProcess(many(model)), start), replies, strict=True):
            tiny.assert_same_bits(left.tensors, right.tensors)


@pytest.mark.end_to_end
def test_a_worker_that_cannot_load_its_model_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted(stirred=False)
    with started(monkeypatch, Family(), of=7) as worker:
        wait_until_ready(worker)
        request = Request("train", 1, "site-0", adapters.read(model), ORDER)
        with pytest.raises(WorkerLost, match="ended with code 1: ValueError: no model of 7"):
            worker(request, many(model)["site-0"], Handling())


@pytest.mark.end_to_end
def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    code = (
        "import time; from silotune.record.family import Family; "
        "from silotune.transports.worker_processes import WorkerProcess; "
        "worker = WorkerProcess('tiny_worker', {'stirred': False}, family=Family()); "
        "print(worker._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:  # noqa: S603
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    until = time.monotonic() + 60
    while time.monotonic() < until and _is_running(child):
        time.sleep(0.1)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
