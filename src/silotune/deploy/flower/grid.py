"""What the coordinator's own processes ask of the SuperLink, at its Unix socket: nodes, runs, and a run's Grid."""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
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
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import exponential, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from silotune.deploy.flower.bundle import bundle, bundle_hash
from silotune.deploy.flower.fleet import has_too_many_parts
from silotune.errors import FederationError
from silotune.transports.flower import BROKEN, MOST, OWN_ERROR, TOO_LARGE, unpack

_BASE = "http://superlink"
_SECONDS = 30.0
_GOODBYE_SECONDS = 5.0
"""Time for signing off a run; a run that is not signed off is ended by the next process that works on its job."""
RETRY_SECONDS = 300.0
"""How long a call is repeated before it fails; a SuperLink that was killed is back in seconds."""
SPARE_BYTES = 16 << 20
"""Bytes that a reply may have beyond the bound of its request."""


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of a Unix socket, which would each read all certificates of the system; it trusts nobody."""


def _through(client: Any, socket: Path) -> Any:
    """Makes a client of Flower's, which knows TCP only, use the Unix socket."""
    client._client.close()
    transport = httpx.HTTPTransport(uds=str(socket), verify=_NO_TLS)
    client._client = httpx.Client(transport=transport, timeout=_SECONDS)
    return client


def _control(socket: Path) -> ControlHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    return _through(ControlHttpClient(_BASE, interceptors=[version], verify=_NO_TLS), socket)


def _runtime(socket: Path, token: str = "", *, retry_seconds: float = RETRY_SECONDS) -> RuntimeHttpClient:
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")]
    if token:
        interceptors.append(RuntimeTokenHttpInterceptor(token))
    retry = make_simple_http_retry_invoker() if token else None
    if retry is not None:  # Flower's own client retries for ever
        retry.wait_gen_factory = lambda: exponential(max_delay=2)
        retry.max_time = retry_seconds
    return _through(RuntimeHttpClient(_BASE, interceptors=interceptors, verify=_NO_TLS, retry_invoker=retry), socket)


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
def _asked(*, limit_seconds: float | None = None) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FederationError(f"the SuperLink refused: {' '.join(error.response.text.split())[:300]}") from None
    except httpx.TransportError as error:
        has_waited = limit_seconds is not None or isinstance(error, httpx.TimeoutException)
        said = f"gave no answer within {limit_seconds or _SECONDS:g} s" if has_waited else "cannot be reached"
        raise FederationError(f"the SuperLink {said}: {type(error).__name__}") from None


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


def node_key(line: str) -> bytes:
    """A node's public key as the SuperLink lists it, in PEM.

    Args:
        line: The key as OpenSSH writes it.
    """
    return bytes(public_key_to_bytes(load_ssh_public_key(line.encode())))  # type: ignore[arg-type]


def register(socket: Path, keys: Mapping[str, bytes]) -> None:
    """Makes the SuperLink's list of nodes equal the members: adds new nodes, and removes others and old keys.

    Args:
        socket: The SuperLink's.
        keys: Site -> its key as ``node_key`` gives it.
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
    """Ends a run of Flower's that nobody works on any more; a run that has ended is left alone."""
    with contextlib.suppress(FederationError), _asked(), _control(socket) as client:
        client.StopRun(StopRunRequest(run_id=run_id))


@dataclass
class _Coming:
    """A reply whose parts are still on their way: its own id, what it is made of, and the parts that are there."""

    message: str
    tree: ObjectTree
    parts: dict[str, bytes] = field(default_factory=dict)


class LocalGrid(HttpGrid):
    """Flower's Grid at the Unix socket, which does not wait for uploads.

    Flower's own Grid waits, up to three minutes, until all parts of a reply are there, so a site that is killed during
    its upload would hold up all others. This one gives out each reply when it is complete, without waiting for others.
    """

    def __init__(self, socket: Path, token: str) -> None:
        super().__init__(insecure=True, token=token)
        self._socket, self._own_token = socket, token
        self._coming: dict[str, _Coming] = {}
        self._most_bytes: dict[str, int] = {}

    def _connect(self) -> None:
        self._client = _runtime(self._socket, self._own_token)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are up."""
        with _asked(limit_seconds=RETRY_SECONDS):
            return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages; remembers the bounds of their replies: twice the message's size, or what it asks for."""
        given = list(messages)
        opened = [unpack(message.content) for message in given]
        sizes = [max(2 * len(data), int(envelope.get(MOST, 0))) for envelope, data in opened]
        with _asked(limit_seconds=RETRY_SECONDS):
            numbers = list(super().push_messages(given))
        self._most_bytes.update(zip(numbers, sizes, strict=False))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The complete replies to these messages; parts of replies to other messages are forgotten."""
        with _asked(limit_seconds=RETRY_SECONDS):
            return self._pulled(message_ids)

    def _pulled(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        self._coming = {number: reply for number, reply in self._coming.items() if number in wanted}
        asked = PullAppMessagesRequest(message_ids=sorted(wanted - self._coming.keys()))
        found = self._runtime_client.PullMessages(asked) if asked.message_ids else PullAppMessagesResponse()
        for bare, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            self._coming[bare.metadata.reply_to_message_id] = _Coming(bare.metadata.message_id, tree)
        too_large = [number for number, reply in self._coming.items() if self._is_too_large(number, reply)]
        for number in too_large:
            del self._coming[number]
        whole = [number for number, reply in self._coming.items() if self._fill(reply)]
        refused = [self._refusal(number, TOO_LARGE) for number in too_large]
        return refused + [self._made(number, self._coming.pop(number)) for number in whole]

    def _is_too_large(self, number: str, reply: _Coming) -> bool:
        """Whether a reply is larger than its request's bound allows; then no more parts of it are fetched."""
        most = self._most_bytes.get(number, 0) + SPARE_BYTES
        return sum(map(len, reply.parts.values())) > most or has_too_many_parts(reply.tree, most)

    def _refusal(self, number: str, reason: str) -> Message:
        metadata = Metadata(
            run_id=self.run.run_id, message_id="", src_node_id=self.node.node_id, dst_node_id=self.node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE, group_id="", ttl=0, reply_to_message_id=number, created_at=time.time(),
        )  # fmt: skip
        return make_message(metadata, error=Error(OWN_ERROR, reason))

    def _fill(self, reply: _Coming) -> bool:
        """Fetches the parts that have arrived; says whether the reply is complete."""
        missing = [part.object_id for part in iterate_object_tree(reply.tree) if part.object_id not in reply.parts]
        for name in missing:
            request = PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=name)
            answer = self._runtime_client.PullObject(request)
            if not (answer.object_found and answer.object_available):
                return False
            reply.parts[name] = bytes(answer.object_content)
        return True

    def _made(self, number: str, reply: _Coming) -> Message:
        """Makes the reply from its parts; if that is impossible, it is the site's failure."""
        request = ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=reply.message)
        self._runtime_client.ConfirmMessageReceived(request)
        try:
            made = inflate_object_from_contents(reply.message, reply.parts)
            assert isinstance(made, Message) and made.metadata.reply_to_message_id == number
        except Exception as error:  # noqa: BLE001  # Flower's own errors over parts that a site chose
            logging.getLogger("silotune").warning("a reply cannot be made of its parts: %s", type(error).__name__)
            return self._refusal(number, BROKEN)
        made.metadata.__dict__["_message_id"] = reply.message  # as Flower's own Grid does; the content has none
        return made


@contextlib.contextmanager
def flower_run(socket: Path, job: str) -> Iterator[tuple[int, LocalGrid]]:
    """A run of Flower's for a job, and its Grid; the run ends with the block.

    A thread sends the run's heartbeat. If this process dies, ``stop_run`` can end the run.

    Raises:
        FederationError: The SuperLink gave no run, or its work went to another process.
    """
    fab = Fab(hash_str=bundle_hash(), content=bundle())
    with _asked(), _control(socket) as client:
        run_id = client.StartRun(StartRunRequest(fab=fab, override_config={"job": Scalar(string=job)})).run_id
    token = _claim(socket, run_id)
    grid = LocalGrid(socket, token)
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
        with contextlib.suppress(RuntimeError):  # its thread has ended by itself: the job's own error counts
            heartbeat.stop()
        with contextlib.suppress(httpx.HTTPError), _runtime(socket, token, retry_seconds=_GOODBYE_SECONDS) as client:
            client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=details))
        grid.close()


def _claim(socket: Path, run_id: int) -> str:
    """The token for a run's work; runs that died before they claimed their work are stopped on the way."""
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
