"""Flower's Grid as a transport: the bits of one process in whatever order replies come, and nothing believed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

import tiny
from acting import ORDER, acting
from line import NAMES, Line, line, node, transport
from silotune.errors import MessageError, TrainerLostError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.client import client_round
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import decode_request, encode, layout_of
from silotune.federation.wire.reasons import sentence_of
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings.sections import FederationSection
from silotune.structs import Failure, Reply, Request, ServerState
from silotune.transports.flower import Ending, answer, pack, unpack
from silotune.transports.frames import Frame
from silotune.transports.in_process import InProcess

EXAMPLES = tiny.encoded(tiny.closed(9))
SETTINGS = acting(tiny.training(learning_rate=0.01), rounds=2)


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def sites(model) -> dict[str, Site]:  # noqa: ANN001
    return {name: Site(name, EXAMPLES[number::3], model, settings=SETTINGS) for number, name in enumerate(NAMES)}


def worker(model, start) -> Any:  # noqa: ANN001
    """What a trainer does with a request's bytes."""
    own = sites(model)

    def work(envelope: Any, setup: Any, data: bytes) -> Frame:
        assert (envelope["job"], json.loads(setup)) == ("run-1", {"seed": 1})
        request = decode_request(data, layout_of(start))
        return Frame({"status": "reply"}, encode(client_round(request, own[request.client])))

    return work


def requests(start, number: int = 1) -> dict[str, Request]:  # noqa: ANN001
    return {name: Request("train", number, name, start, ORDER) for name in NAMES}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bits_are_those_of_one_process_in_whatever_order_replies_come(model, start, tmp_path, seed) -> None:  # noqa: ANN001
    plan = Plan(rounds=2, method=method(FederationSection()), body=ORDER, seed=3, settings=SETTINGS, timeout_seconds=60)
    ways = {"near": InProcess(sites(model)), "far": transport(line(worker(model, start), seed=seed))}
    ends = {}
    for name, way in ways.items():
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        ends[name] = (run_rounds(plan, way, ServerState(0, start), run), run.read_rows("metrics"))
    tiny.assert_same_bits(ends["near"][0].weights, ends["far"][0].weights)
    near, far = (ends[name][1] for name in ways)
    assert [(row["bytes_up"], row["bytes_down"], row["train_loss"]) for row in near] == [
        (row["bytes_up"], row["bytes_down"], row["train_loss"]) for row in far
    ]


def test_replies_come_in_the_order_of_the_requests(model, start) -> None:
    for seed in range(3):
        found = transport(line(worker(model, start), seed=seed)).exchange(requests(start), timeout_seconds=60)
        assert [reply.client for reply in found] == list(NAMES)


def test_a_site_that_comes_back_is_asked_once_more(model, start) -> None:
    grid = line(worker(model, start))
    lost = grid.nodes["b"]

    def pull(message_ids: Iterable[str]) -> list[Message]:
        if lost is grid.nodes["b"]:  # it was killed with its request: another process starts under its name
            for name, number in grid.pushed:
                if name == "b":
                    grid.waiting.pop(number, None)
            grid.nodes["b"] = node("b", 8, "later")
            return []
        return Line.pull_messages(grid, message_ids)

    grid.pull_messages = pull  # type: ignore[method-assign]
    found = list(transport(grid).exchange(requests(start), timeout_seconds=60))
    assert all(isinstance(reply, Reply) for reply in found)
    assert [name for name, _ in grid.pushed].count("b") == 2


def test_a_site_that_flower_calls_gone_is_asked_once_more(model, start) -> None:
    grid, told = line(worker(model, start)), []

    def pull(message_ids: Iterable[str]) -> list[Message]:
        if not told:
            number = next(number for name, number in grid.pushed if name == "a")
            told.append(number)
            return [Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=grid.waiting.pop(number))]
        return Line.pull_messages(grid, message_ids)

    grid.pull_messages = pull  # type: ignore[method-assign]
    assert all(isinstance(reply, Reply) for reply in transport(grid).exchange(requests(start), timeout_seconds=60))


def test_a_site_that_is_not_there_is_waited_for_until_the_limit(model, start) -> None:
    grid = line(worker(model, start), names=("a", "c"))
    found = {item.client: item for item in transport(grid).exchange(requests(start), timeout_seconds=1.0)}
    assert isinstance(found["a"], Reply)
    late = found["b"]
    assert isinstance(late, Failure) and late.stage == "network" and late.bytes_down == 0
    assert late.reason == "is not connected within federation.timeout_seconds = 1"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_round_is_over_with_the_replies_that_it_wants(model, start, seed: int) -> None:  # noqa: ANN001
    way = transport(line(worker(model, start), seed=seed), ending=Ending(wanted=2))
    found = list(way.exchange(requests(start), timeout_seconds=60))
    assert [item.client for item in found] == list(NAMES)
    (late,) = [item for item in found if isinstance(item, Failure)]
    assert (late.stage, late.reason) == ("late", "2 clients had replied already") and late.bytes_down > 0
    scored = {name: replace(request, kind="countersign", tensors={}) for name, request in requests(start).items()}
    assert len([item for item in way.exchange(scored, timeout_seconds=60) if item.client]) == 3


def test_a_reply_beyond_those_that_are_wanted_is_discarded(model, start) -> None:  # noqa: ANN001
    grid = line(worker(model, start))

    def pull(message_ids: Iterable[str]) -> list[Message]:
        return [message for number in list(message_ids) for message in Line.pull_messages(grid, [number])]

    grid.pull_messages = pull  # type: ignore[method-assign]
    found = list(transport(grid, ending=Ending(wanted=1)).exchange(requests(start), timeout_seconds=60))
    assert [isinstance(item, Reply) for item in found] == [True, False, False]
    assert all(item.bytes_up > 0 for item in found)


def test_a_deadline_ends_a_round_of_training(start) -> None:
    grid = line(None)
    grid.pull_messages = lambda message_ids: []  # type: ignore[method-assign]
    found = list(transport(grid, ending=Ending(2, 0.3)).exchange(requests(start), timeout_seconds=60))
    assert {(item.stage, item.reason) for item in found} == {
        ("deadline", "gave no reply within federation.clock.deadline_seconds = 0.3")
    }


def test_a_site_that_never_answers_is_given_up(start) -> None:
    grid = line(None)
    grid.pull_messages = lambda message_ids: []  # type: ignore[method-assign]
    found = list(transport(grid).exchange(requests(start), timeout_seconds=0.4))
    assert [item.reason.split(" within")[0] for item in found] == ["gave no reply"] * 3
    assert all(item.bytes_down > 0 for item in found)


def altered(change: Any) -> Any:
    """A reply to a request, changed by a site that means ill."""

    def work(envelope: Any, setup: Any, data: bytes) -> Frame:
        request = decode_request(data, layout_of(TENSORS))
        reply = Reply("train", request.round_number, request.client, request.tensors, {"num_examples": 1})
        return Frame({"status": "reply"}, change(reply))

    return work


TENSORS = {"w": torch.zeros(2, 3), "v": torch.ones(4)}
BAD = {
    "nan": (lambda reply: encode(replace(reply, tensors={**TENSORS, "w": torch.full((2, 3), torch.nan)})), "finite"),
    "shape": (lambda reply: encode(replace(reply, tensors={**TENSORS, "w": torch.zeros(3, 2)})), "expected"),
    "names": (lambda reply: encode(replace(reply, tensors={"w": torch.zeros(2, 3)})), "missing"),
    "dtype": (lambda reply: encode(replace(reply, tensors={**TENSORS, "v": torch.ones(4).half()})), "expected"),
    "truncated": (lambda reply: encode(reply)[:-5], "do not decode"),
    "announced": (lambda reply: encode(reply)[:4] + b"\xff\xff\xff\xff" + encode(reply)[8:], "is impossible"),
    "name": (lambda reply: encode(replace(reply, client="c")), "in the name of another"),
    "pickle": (lambda reply: b"\x80\x04\x95", "not a silotune message"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_reply_that_does_not_hold_is_a_failure_of_its_site_alone(fault: str) -> None:
    change, reason = BAD[fault]
    grid = line(altered(change))
    asked = {"a": Request("train", 1, "a", TENSORS, ORDER)}
    (found,) = transport(grid).exchange(asked, timeout_seconds=20)
    assert isinstance(found, Failure) and (found.client, found.stage) == ("a", "reply")
    assert reason in found.reason


def test_a_replayed_reply_is_refused() -> None:
    grid = line(altered(encode))
    kept: list[RecordDict] = []
    asked = {"a": Request("train", 1, "a", TENSORS, ORDER)}
    real = grid.app

    def app(message: Message, context: Context) -> Message:
        reply = real(message, context)
        kept.append(reply.content)
        return Message(kept[0], reply_to=message)

    grid.app = app
    way = transport(grid)
    assert isinstance(next(way.exchange(asked, timeout_seconds=20)), Reply)
    again = next(way.exchange(asked, timeout_seconds=20))
    assert isinstance(again, Failure) and again.reason == "a reply answers another request"


def test_what_a_site_says_of_its_failure_reaches_the_coordinator() -> None:
    said = {"status": "failure", "stage": "train", "reason": "tasks"}
    (found,) = transport(line(lambda *_: Frame(said))).exchange(
        {"a": Request("train", 1, "a", TENSORS, ORDER)}, timeout_seconds=20
    )
    assert (found.stage, found.reason, found.rule) == ("train", sentence_of("tasks"), "tasks")


@pytest.mark.parametrize("is_simulated", [False, True])
def test_no_text_of_a_site_reaches_the_coordinator(is_simulated: bool) -> None:
    """A site may say what it likes: what is not on the list is not repeated, but for a simulation of one's own."""
    said = {
        "status": "failure",
        "stage": "\x1b[31mtrain",
        "reason": "\x1b]0;owned\x07",
        "detail": "not finite",
    }
    way = transport(line(lambda *_: Frame(said)))
    way._job = replace(way._job, is_simulated=is_simulated)
    (found,) = way.exchange({"a": Request("train", 1, "a", TENSORS, ORDER)}, timeout_seconds=20)
    wanted = "not finite" if is_simulated else sentence_of("")
    assert (found.stage, found.reason, found.rule) == ("site", wanted, "")


def test_a_trainer_that_is_gone_is_a_failure_of_the_site() -> None:
    def work(envelope: Any, setup: Any, data: bytes) -> Frame:
        raise TrainerLostError("the trainer died 3 times over one request")

    (found,) = transport(line(work)).exchange({"a": Request("train", 1, "a", TENSORS, ORDER)}, timeout_seconds=20)
    assert found.reason == sentence_of("trainer")


def test_content_that_is_not_ours_is_refused() -> None:
    with pytest.raises(MessageError):
        unpack(RecordDict())
    envelope, data = unpack(pack({"job": "x"}, b"abc"))
    assert (envelope, data) == ({"job": "x"}, b"abc")
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "m"
    envelope, _ = unpack(answer(message, Context(1, 1, {}, RecordDict(), {}), lambda *_: Frame({})).content)
    assert envelope["status"] == "failure"


def test_sites_keep_their_own_state(start) -> None:
    way = transport(line(None))
    way.restore({})
    assert way.states() == {} and tuple(way.clients()) == NAMES
