"""Carries requests over Flower's Grid and answers them at a site; only this module knows Flower's messages.

A message of Flower carries one of silotune's as bytes, in an array that Flower cuts into pieces, and the run's name and
setup beside it. The coordinator's side yields replies in the order of the requests, whatever the order in which they
arrive, so that sums of floating-point numbers have the same bits as in one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from silotune.errors import FederationError, MessageError
from silotune.federation.kinds import TRAIN, kind_named
from silotune.federation.wire.reasons import RULES, code_of, sentence_of
from silotune.federation.wire.transport import Codec
from silotune.structs import Failure, Reply, Request, SiteState
from silotune.transports.frames import Frame

if TYPE_CHECKING:
    from flwr.serverapp import Grid

_LOG = logging.getLogger(__name__)
POLL_SECONDS = 0.15
"""Pause between two looks for replies; the SuperLink is on the same machine."""
SIMULATION_SECONDS = 120.0
_STAGE = re.compile(r"[a-z_.]{1,40}")
ENVELOPE, PAYLOAD = "silotune", "message"
MOST = "most"
"""In the envelope of a request: bytes that the tensors of its reply take at most."""
_STYPE = "silotune.message"
OWN_ERROR = 900
"""Number of an error that is silotune's and not Flower's; its reason is one of silotune's codes."""
TOO_LARGE, OTHER_BUNDLE, BROKEN = "too-large", "other-bundle", "broken"
OWN_REASONS: Mapping[str, str] = {
    TOO_LARGE: "the reply announces far more bytes than its request had",
    OTHER_BUNDLE: "the app bundle is not that of the site's silotune",
    BROKEN: "the reply cannot be made from the parts that it names",
}
"""Reason of such an error -> its sentence."""
_GONE = ("NODE_UNAVAILABLE", "MESSAGE_UNAVAILABLE")


def pack(envelope: Mapping[str, str], message: bytes) -> RecordDict:
    """One of silotune's messages as the content of one of Flower's."""
    content = RecordDict({ENVELOPE: ConfigRecord(dict(envelope))})
    content[PAYLOAD] = ArrayRecord({PAYLOAD: Array("uint8", (len(message),), _STYPE, message)})
    return content


def unpack(content: RecordDict) -> tuple[dict[str, str], bytes]:
    """The inverse of ``pack``.

    Raises:
        MessageError: The content is not one that ``pack`` made.
    """
    try:
        envelope, array = content.config_records[ENVELOPE], content.array_records[PAYLOAD][PAYLOAD]
    except KeyError:
        raise MessageError("a message of Flower's does not hold one of silotune's") from None
    if array.stype != _STYPE or not all(isinstance(value, str) for value in envelope.values()):
        raise MessageError("a message of Flower's does not hold one of silotune's")
    return {str(key): str(value) for key, value in envelope.items()}, array.data


# --- the coordinator's side ------------------------------------------------------------------------------------------


@dataclass
class _Waiting:
    """A request that is under way: its node, when that node came up, and the id of Flower's message."""

    request: Request
    sent: bytes
    digest: str
    node: int = 0
    activated: str = ""
    message: str = ""


Naming = Callable[[Sequence[Any]], Mapping[str, Any]]


def by_name(nodes: Sequence[Any]) -> Mapping[str, Any]:
    """Nodes by the names under which they were registered."""
    return {str(node.name): node for node in nodes}


@dataclass(frozen=True)
class Errand:
    """What travels beside every message of a run: the run's name, and its setup as JSON.

    ``is_simulated`` says that the sites are on the user's own machine or cluster, so that their errors are shown in
    full.
    """

    name: str
    setup: Mapping[str, Any] = field(default_factory=dict)
    is_simulated: bool = False


@dataclass(frozen=True)
class Ending:
    """What ends a round of training before every site has replied.

    Attributes:
        wanted: How many replies are enough; None for all.
        deadline_seconds: No reply is waited for longer; None for as long as any other reply.
    """

    wanted: int | None = None
    deadline_seconds: float | None = None


class FlowerTransport:
    """Reaches sites through a Grid; a site's node carries the site's name.

    A site that is not connected is waited for until the limit. A site that comes back, for instance after a crash,
    gets its request again, and does the same work from the same state.

    Args:
        grid: Flower's, connected to the run.
        sites: Names of the sites, in a fixed order.
        job: What goes with every message.
        codec: How messages become bytes.
        name: Gives the site of each node that is up; by default the node's name, which Flower's simulation does not
            set.
        ending: What ends a round of training before all have replied.
    """

    def __init__(
        self,
        grid: Grid,
        sites: Sequence[str],
        job: Errand,
        *,
        codec: Codec,
        name: Naming = by_name,
        ending: Ending | None = None,
    ) -> None:
        self._grid, self._sites, self._job = grid, tuple(sites), job
        self._codec, self._name = codec, name
        self._ending = ending or Ending()
        self._setup = json.dumps(job.setup, separators=(",", ":"), sort_keys=True)

    def clients(self) -> Sequence[str]:
        """Names of all sites, whether they are there or not."""
        return self._sites

    def states(self) -> dict[str, SiteState]:
        """Empty, because sites keep their own states."""
        return {}

    def restore(self, states: Mapping[str, SiteState]) -> None:
        """Nothing to do: a request's round tells a site which of its states to go on from."""

    def exchange(self, requests: Mapping[str, Request], *, timeout_seconds: float) -> Iterator[Reply | Failure]:
        """Yields one reply or failure a request, in the order of the requests, within the limit.

        A round of training whose ending wants fewer replies ends with so many; later replies are discarded.
        """
        is_round = all(request.kind == TRAIN for request in requests.values())
        ending = self._ending if is_round else Ending()
        limit = time.monotonic() + min(timeout_seconds, ending.deadline_seconds or timeout_seconds)
        waiting = {name: self._prepared(request) for name, request in requests.items()}
        done = {} if ending.wanted is None else self._first(waiting, ending.wanted, limit)
        for name in requests:
            while name not in done:
                if time.monotonic() > limit:
                    done[name] = self._late(waiting.pop(name), timeout_seconds, ending)
                    break
                done.update(self._look(waiting))
                if name not in done:
                    time.sleep(POLL_SECONDS)
            yield done.pop(name)

    def _first(self, waiting: dict[str, _Waiting], wanted: int, limit: float) -> dict[str, Reply | Failure]:
        """Waits for so many replies, or for the limit; once there are enough, the other requests are given up."""
        done: dict[str, Reply | Failure] = {}
        usable, enough = 0, f"{wanted} clients had replied already"
        while waiting and time.monotonic() <= limit:
            for name, outcome in self._look(waiting).items():
                if isinstance(outcome, Reply) and usable == wanted:
                    sizes = (outcome.bytes_down, outcome.bytes_up)
                    outcome = Failure(outcome.client, outcome.round_number, "late", enough, *sizes)
                usable += isinstance(outcome, Reply)
                done[name] = outcome
            if usable == wanted:
                done |= {name: self._failure(item, "late", enough) for name, item in waiting.items()}
                waiting.clear()
            elif waiting:
                time.sleep(POLL_SECONDS)
        return done

    def _prepared(self, request: Request) -> _Waiting:
        return _Waiting(request, self._codec.encode(request), secrets.token_hex(16))

    def _late(self, item: _Waiting, timeout_seconds: float, ending: Ending) -> Failure:
        where, deadline = "is not connected" if not item.node else "gave no reply", ending.deadline_seconds
        if deadline is not None and deadline < timeout_seconds:
            return self._failure(item, "deadline", f"{where} within federation.clock.deadline_seconds = {deadline:g}")
        return self._failure(item, "network", f"{where} within federation.timeout_seconds = {timeout_seconds:g}")

    def _look(self, waiting: dict[str, _Waiting]) -> dict[str, Reply | Failure]:
        """Sends requests that have not reached their node yet, and gives what has come back."""
        nodes = self._name(list(self._grid.get_nodes()))
        for name, item in waiting.items():
            node = nodes.get(name)
            if node is not None and (item.node, item.activated) != (node.node_id, node.last_activated_at):
                self._send(item, node.node_id, node.last_activated_at)
        asked = {item.message: name for name, item in waiting.items() if item.message}
        found: dict[str, Reply | Failure] = {}
        for answer in self._grid.pull_messages(list(asked)) if asked else ():
            name = asked.get(answer.metadata.reply_to_message_id, "")
            result = self._read(waiting[name], answer) if name in waiting else None
            if result is not None:
                found[name] = result
                del waiting[name]
        return found

    def _send(self, item: _Waiting, node: int, activated: str) -> None:
        request = item.request
        envelope = {
            "job": self._job.name, "client": request.client, "setup": self._setup, "nonce": item.digest,
            MOST: str(self._codec.longest(request)),
        }  # fmt: skip
        message = Message(
            pack(envelope, item.sent), dst_node_id=node, message_type=kind_named(request.kind).message,
            group_id=str(request.round_number),
        )  # fmt: skip
        pushed = list(self._grid.push_messages([message]))
        item.node, item.activated, item.message = node, activated, pushed[0] if pushed else ""

    def _read(self, item: _Waiting, answer: Message) -> Reply | Failure | None:
        """The reply or failure in an answer; None where the site is gone, which is then asked again."""
        if answer.has_error():
            if answer.error.code in _gone_codes():
                item.node, item.activated, item.message = 0, "", ""
                return None
            own = answer.error.code == OWN_ERROR
            said = OWN_REASONS.get(str(answer.error.reason)) if own else f"Flower's error {answer.error.code:d}"
            return self._failure(item, "site", said or sentence_of(""))
        try:
            return self._opened(item, answer)
        except MessageError as error:
            return self._failure(item, "reply", str(error))
        except Exception as error:  # noqa: BLE001  # any error from a site's bytes is that site's failure
            _LOG.warning("the reply of %s: %s", item.request.client, type(error).__name__, exc_info=True)
            return self._failure(item, "reply", f"the reply cannot be read: {type(error).__name__}")

    def _opened(self, item: _Waiting, answer: Message) -> Reply | Failure:
        """What a site's answer holds; of a failure only its code is believed, if it is on the list."""
        envelope, data = unpack(answer.content)
        if envelope.get("nonce") != item.digest:
            raise MessageError("a reply answers another request")
        if envelope.get("status") != "reply":
            code, stage = envelope.get("reason", ""), envelope.get("stage", "")
            reason = envelope.get("detail", "") if self._job.is_simulated else ""
            stage = stage if _STAGE.fullmatch(stage) else "site"
            failure = self._failure(item, stage, reason or sentence_of(code), up=len(data))
            return replace(failure, rule=code if code in RULES else "")
        reply = self._codec.decode(data, item.request)
        if reply.client != item.request.client:
            raise MessageError(f"{item.request.client!r} sent a reply in the name of another")
        return replace(reply, bytes_down=len(item.sent), bytes_up=len(data))

    def _failure(self, item: _Waiting, stage: str, reason: str, *, up: int = 0) -> Failure:
        request = item.request
        down = len(item.sent) if item.node else 0
        return Failure(request.client, request.round_number, stage, reason, bytes_down=down, bytes_up=up)


def _gone_codes() -> set[int]:
    from flwr.common.constant import ErrorCode

    return {getattr(ErrorCode, name) for name in _GONE}


# --- the site's side -------------------------------------------------------------------------------------------------

Work = Callable[[Mapping[str, str], bytes, bytes], Frame]
"""(envelope with the run's and the client's name, setup, encoded request) -> the trainer's answer."""


def client_app(work: Work) -> ClientApp:
    """Flower's ClientApp of a site: hands every message to ``work``, and knows nothing of models."""
    app = ClientApp()
    for register in (app.train, app.evaluate, app.query):
        register()(lambda message, context: answer(message, context, work))
    return app


def answer(message: Message, context: Context, work: Work) -> Message:
    """The reply to one of Flower's messages; of an error at the site only its code is sent."""
    nonce = ""
    try:
        envelope, data = unpack(message.content)
        nonce = envelope.get("nonce", "")
        frame = work(envelope, envelope.get("setup", "").encode("utf-8", "surrogatepass"), data)
    except Exception as error:  # noqa: BLE001  # one message never ends a node, and its text must not leave
        _LOG.warning("a message was not answered: %s", error if isinstance(error, FederationError) else type(error))
        frame = Frame({"status": "failure", "stage": "site", "reason": code_of(error)})
    said = {name: str(frame.header.get(name, "")) for name in ("status", "stage", "reason", "detail")}
    return Message(pack({**said, "nonce": nonce}, frame.payload), reply_to=message)


# --- Flower's simulation ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def simulated_grid(work: Work, *, clients: int, cpus: float, gpus: float) -> Iterator[Grid]:
    """A Grid whose nodes are actors of Ray, on this machine or the cluster that it belongs to.

    Args:
        work: What an actor does with a request; it is pickled to the actors by reference.
        clients: How many nodes.
        cpus: Cores that an actor holds.
        gpus: GPUs, or a share of one, that an actor holds.

    Raises:
        FederationError: The simulation ended before it gave its Grid.
    """
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    ready: queue.SimpleQueue[Grid | None] = queue.SimpleQueue()
    done = threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        ready.put(grid)
        done.wait()

    def simulate() -> None:
        try:
            resources: dict[str, Any] = {"client_resources": {"num_cpus": cpus, "num_gpus": gpus}}
            run_simulation(server, client_app(work), clients, backend_config=resources)
        finally:
            ready.put(None)

    thread = threading.Thread(target=simulate, daemon=True)
    thread.start()
    try:
        grid = ready.get(timeout=SIMULATION_SECONDS)
        if grid is None:
            raise FederationError("Flower's simulation ended before it began: see its lines above")
        yield grid
    except queue.Empty:
        raise FederationError(f"Flower's simulation did not start within {SIMULATION_SECONDS:g} s") from None
    finally:
        done.set()
        thread.join(SIMULATION_SECONDS)


def by_number(sites: Sequence[str]) -> Naming:
    """Names the nodes of a simulation: the smallest number is the first site; any actor can serve any site."""
    return lambda nodes: dict(zip(sites, sorted(nodes, key=lambda node: int(node.node_id)), strict=False))
