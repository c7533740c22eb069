"""A site's connection to the SuperLink: Flower's Fleet interface over TLS, every request signed with the node's key.

These are the calls of Flower's SuperNode without its loop, which looks for messages every three seconds and starts two
processes for each. Errors are silotune's own: one line that says what to do.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from silotune.errors import FederationError, KitError
from silotune.record.signatures import read_secret
from silotune.transports.flower import OWN_ERROR

HEARTBEAT_SECONDS = 10.0
"""The node's heartbeat interval; after twice as long without one, the node counts as gone. Flower accepts no less."""
CALL_SECONDS = 30.0
FETCH_SECONDS = 3600.0
"""How long the parts of a message are waited for, which arrive after the message."""


class RunEndedError(FederationError):
    """The run that a message belongs to has ended, so there is nothing left to do for it."""


class LostConnectionError(FederationError):
    """The coordinator cannot be reached for now, so the caller should try again."""


@dataclass(frozen=True)
class Address:
    """Where the coordinator is, and the authority that must have signed its certificate."""

    host: str
    port: int
    authority: Path


@dataclass(frozen=True)
class Announced:
    """A message that waits for this node; none of its parts has been fetched yet.

    Attributes:
        run_id: Flower's number of the run that it belongs to.
        kind: Its type, as Flower names it.
        group: What it belongs to, such as the round.
        tree: The parts that its content is made of.
    """

    run_id: int
    kind: str
    group: str
    tree: ObjectTree

    def is_longer_than(self, size: int) -> bool:
        """Whether it has more parts than a message of this many bytes."""
        return has_too_many_parts(self.tree, size)


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A node's P-384 key from its OpenSSH file, which nobody but its owner may read.

    Raises:
        KitError: It is not such a key, others may read it, or it is missing.
    """
    content = read_secret(path)
    try:
        key = load_ssh_private_key(content, None)
    except (UnsupportedAlgorithm, TypeError, ValueError) as error:
        raise KitError(f"{str(path)!r} is not a key of this node: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KitError(f"{str(path)!r} is not an elliptic-curve key")
    return key


class Fleet:
    """A node's calls to the coordinator."""

    def __init__(self, address: Address, key: ec.EllipticCurvePrivateKey) -> None:
        host = f"[{address.host}]" if ":" in address.host else address.host
        self.place = f"{host}:{address.port}"
        self._public = public_key_to_bytes(key.public_key())
        context = ssl.create_default_context(cafile=str(address.authority))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._client = FleetHttpClient(
            f"https://{self.place}", verify=context, timeout=CALL_SECONDS,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )  # fmt: skip
        self.node = Node(node_id=0)

    def activate(self, before: int) -> int:
        """Announces the node; gives its id. ``before`` is its id when it was last up, or 0.

        A node that was killed still counts as up for a while. So it signs off first; then the coordinator sees that it
        came back, and sends again what it lost.
        """
        if before:
            with contextlib.suppress(FederationError):
                self.deactivate(before)
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        with self._asked():
            self.node = Node(node_id=self._client.ActivateNode(request).node_id)
        return int(self.node.node_id)

    def deactivate(self, node_id: int) -> None:
        """Signs the node off."""
        with self._asked():
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def heartbeat(self) -> bool:
        """Says that the node is up; False when the coordinator does not know it."""
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        with self._asked():
            return bool(self._client.SendNodeHeartbeat(request).success)

    def pull(self) -> Announced | None:
        """The next message; None when there is none."""
        with self._asked():
            response = self._client.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        metadata = message_from_proto(response.messages_list[0]).metadata
        tree = response.message_object_trees[0]
        return Announced(metadata.run_id, metadata.message_type, metadata.group_id, tree)

    def fetch(self, found: Announced) -> Message:
        """Fetches a message with its content, and tells Flower that this process now works for the message's run."""
        run_id, tree = found.run_id, found.tree
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self.node, run_id)
        confirm = make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, self.node, run_id)
        with self._asked():
            message = pull_and_inflate_object_from_tree(
                tree, pull, confirm, return_type=Message, max_time=FETCH_SECONDS, initial_backoff=0.05, backoff_cap=1.0
            )
        message.metadata.__dict__["_message_id"] = tree.object_id  # as Flower's own node does; the content has none
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, run_id, int(self.node.node_id)
        return message

    def bundle_of(self, run_id: int) -> tuple[str, bytes]:
        """The hash and the content of a run's app bundle."""
        with self._asked():
            run = self._client.GetRun(GetRunRequest(node=self.node, run_id=run_id)).run
            request = GetFabRequest(node=self.node, hash_str=run.fab_hash, run_id=run_id)
            return str(run.fab_hash), bytes(self._client.GetFab(request).fab.content)

    def answer(self, message: Message, app: ClientApp) -> Message:
        """What an app replies to the message that was fetched last."""
        return app(message, Context(TaskIdentity.run_id, TaskIdentity.node_id, {}, RecordDict(), {}))

    def push(self, reply: Message, seconds: float) -> None:
        """Sends a reply; one to a run that has ended is dropped by the coordinator."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with self._asked(), no_object_id_recompute():
            tree, parts = get_object_tree(reply), get_all_nested_objects(reply)
            bare = message_to_proto(remove_content_from_message(reply))
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self.node, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[seconds]
                )
            )
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self.node, reply.metadata.run_id, response.session_id
            )
            push_objects(parts, push, object_ids_to_push=set(response.objects_to_push))

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise _refused(error, self.place) from None
        except httpx.TransportError as error:
            raise _unreachable(error, self.place) from None
        except (ObjectPullError, ObjectPushError):
            raise RunEndedError(
                f"{self.place} no longer holds what belongs to this message, or did not give it within "
                f"{FETCH_SECONDS:g} s"
            ) from None


def _refused(error: httpx.HTTPStatusError, place: str) -> FederationError:
    status = error.response.status_code
    if status == httpx.codes.UNAUTHORIZED:
        return FederationError(
            f"{place} does not accept this node's signature: its clock is off by more than 5 minutes "
            "(set it with NTP), or its key was revoked (ask the coordinator)"
        )
    if status == httpx.codes.FORBIDDEN:
        return RunEndedError(f"{place} takes nothing more for this run")
    if status == httpx.codes.PRECONDITION_FAILED:
        return LostConnectionError(
            f"{place} does not let this node in: its key is not registered or was revoked (ask the coordinator), or "
            "another process with this key is connected"
        )
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return LostConnectionError(f"{place} cannot serve for now: status {status}")
    return FederationError(f"{place} refused: status {status}, {' '.join(error.response.text.split())[:200]}")


def _unreachable(error: httpx.TransportError, place: str) -> FederationError:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or text
        return FederationError(
            f"the certificate of {place} does not hold: {reason}; the kit's ca.crt must be that of the federation, "
            "the name one that the certificate names, and the date within its time"
        )
    if isinstance(error, httpx.TimeoutException):
        return LostConnectionError(f"{place} gave no answer within {CALL_SECONDS:g} s")
    return LostConnectionError(f"{place} cannot be reached: {type(error).__name__} {text}".strip())


def refusal(message: Message, reason: str) -> Message:
    """A reply that holds nothing but one of silotune's codes."""
    return Message(Error(OWN_ERROR, reason), reply_to=message)


@contextlib.contextmanager
def beating(fleet: Fleet) -> Iterator[threading.Event]:
    """Within the block, a thread sends heartbeats; the event is set when the coordinator no longer knows the node."""
    done, forgotten = threading.Event(), threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS * 0.4):
            try:
                if not fleet.heartbeat():
                    forgotten.set()
            except FederationError:  # the next look for messages fails in the same way, and reports it
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield forgotten
    finally:
        done.set()
        thread.join(5.0)


SPARE_PARTS = 8
"""Parts that a message may have besides the pieces of its array."""


def has_too_many_parts(tree: ObjectTree, size: int) -> bool:
    """Whether a message is made of more parts than one with an array of this many bytes."""
    parts = sum(1 for _ in iterate_object_tree(tree))
    return parts > size / FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + SPARE_PARTS
