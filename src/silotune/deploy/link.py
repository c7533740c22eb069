"""What the coordinator's own processes ask of the SuperLink, at its Unix socket: nodes, runs, and a run's Grid."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from silotune.deploy.bundle import bundle, bundle_hash
from silotune.errors import FederationError

_BASE = "http://superlink"
_SECONDS = 30.0


def _through(client: Any, socket: Path) -> Any:
    """Turns a client of Flower's, which knows TCP only, to the Unix socket."""
    client._client.close()
    client._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=_SECONDS)
    return client


def _control(socket: Path) -> ControlHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    return _through(ControlHttpClient(_BASE, interceptors=[version]), socket)


def _runtime(socket: Path, token: str = "") -> RuntimeHttpClient:
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")]
    if token:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    retry = make_simple_http_retry_invoker() if token else None
    return _through(RuntimeHttpClient(_BASE, interceptors=interceptors, retry_invoker=retry), socket)


def wait_for_link(socket: Path, *, limit_seconds: float) -> None:
    """Waits until the SuperLink answers.

    Raises:
        FederationError: It did not within the limit.
    """
    limit = time.monotonic() + limit_seconds
    while True:
        try:
            nodes(socket)
            return
        except FederationError as error:
            if time.monotonic() > limit:
                raise FederationError(f"the SuperLink did not start within {limit_seconds:g} s: {error}") from None
            time.sleep(0.1)


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FederationError(f"the SuperLink refused: {' '.join(error.response.text.split())[:300]}") from None
    except httpx.TransportError as error:
        raise FederationError(f"the SuperLink cannot be reached: {type(error).__name__}") from None


def nodes(socket: Path) -> dict[str, dict[str, Any]]:
    """Site -> what the SuperLink knows of its node: id, status, key, when it was last up."""
    with _asked(), _control(socket) as client:
        found = client.ListNodes(ListNodesRequest()).nodes_info
    return {
        node.name: {
            "node_id": node.node_id, "status": node.status, "public_key": bytes(node.public_key),
            "activated": node.last_activated_at, "online_until": node.online_until,
        }
        for node in found
        if node.status != "unregistered"
    }  # fmt: skip


def register(socket: Path, keys: Mapping[str, bytes]) -> None:
    """Makes the SuperLink's list of nodes that of the members: new ones are added, others and old keys leave.

    Args:
        socket: The SuperLink's.
        keys: Site -> its P-384 public key in PEM.
    """
    known = nodes(socket)
    with _asked(), _control(socket) as client:
        for name, node in known.items():
            if keys.get(name) != node["public_key"]:
                client.UnregisterNode(UnregisterNodeRequest(node_id=node["node_id"]))
        for name, key in keys.items():
            if name not in known or known[name]["public_key"] != key:
                client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def stop_run(socket: Path, run_id: int) -> None:
    """Ends a run of Flower's that nobody works on any more; one that has ended is left alone."""
    with contextlib.suppress(FederationError), _asked(), _control(socket) as client:
        client.StopRun(StopRunRequest(run_id=run_id))


class _LocalGrid(HttpGrid):
    """Flower's Grid at the Unix socket."""

    def __init__(self, socket: Path, token: str) -> None:
        super().__init__(insecure=True, token=token)
        self._socket, self._own_token = socket, token

    def _connect(self) -> None:
        self._client = _runtime(self._socket, self._own_token)


@contextlib.contextmanager
def flower_run(socket: Path, job: str) -> Iterator[tuple[int, HttpGrid]]:
    """A run of Flower's for a job, and its Grid; the run ends with the block.

    Its heartbeat has a thread of its own. A process that dies leaves a run that ``stop_run`` ends.

    Raises:
        FederationError: The SuperLink gave no run, or its work went to another process.
    """
    fab = Fab(hash_str=bundle_hash(), content=bundle())
    with _asked(), _control(socket) as client:
        run_id = client.StartRun(StartRunRequest(fab=fab, override_config={"job": Scalar(string=job)})).run_id
    token = _claim(socket, run_id)
    grid = _LocalGrid(socket, token)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heartbeat.start()
    status, details = SubStatus.FAILED, "the job ended with an error"
    try:
        with _asked():
            given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        yield run_id, grid
        status, details = SubStatus.COMPLETED, ""
    finally:
        grid._retry_invoker.max_tries = 1
        heartbeat.stop()
        with contextlib.suppress(httpx.HTTPError), _runtime(socket, token) as client:
            client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=details))
        grid.close()


def _claim(socket: Path, run_id: int) -> str:
    """The token for a run's work; work of runs that died before they claimed theirs is passed over."""
    limit = time.monotonic() + _SECONDS
    with _runtime(socket) as client:
        while time.monotonic() < limit:
            with _asked():
                given = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if given.HasField("task") and given.token and given.task.run_id == run_id:
                return str(given.token)
            if given.HasField("task"):
                stop_run(socket, given.task.run_id)
            time.sleep(0.1)
    raise FederationError(f"the SuperLink gave no work for run {run_id} within {_SECONDS:g} s")
