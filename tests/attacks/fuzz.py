"""Fuzzes the receivers: structured changes of valid messages, against a real trainer host and a coordinator in process.

``make fuzz`` does so for five minutes and prints what it did. Whatever comes, a site answers with a reply or a code of
its list, writes it into a trail that verifies, and touches nothing but its own files; a coordinator has a believed
reply or a failure under the name of the site that answered.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import tiny
from acting import ORDER
from attacks.hostile import OTHERS, SITE, Coordinator, House, configuration, kinds_of, leaks, outcome, packed
from line import NAMES, line, transport
from silotune.federation.coordinator.settlement import Settlement
from silotune.federation.kinds import KINDS
from silotune.federation.wire.messages import decode_request, encode, layout_of
from silotune.federation.wire.reasons import REASONS
from silotune.privacy.secure_sum.terms import Terms
from silotune.record.plain_json import sha256
from silotune.structs import Failure, Reply, Request
from silotune.transports.frames import Frame

SUMS = {"privacy": {"protection": {"type": "secure_sum", "max_examples": 64}}, "evaluation": {"per_client": False}}
SLOWEST_SECONDS = 20.0
"""Of one answer: a round of the tiny model takes a tenth of a second."""
EQUAL = {0: (False, 0.0, "0", -0.0), 1: (True, 1.0, "1", [1])}
EDGES: tuple[Any, ...] = (
    0, 1, -1, True, False, None, 1.0, "1", "", [], {}, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**300, -(2**63),
    1e308, 1e-320, "\ud800", "\x00", "\x1b[2J", "\u202e", "a" * 5000, "../../x", "/etc/passwd",
    "ä" * 300, "${HOME}", "NaN",
    [[[[[]]]]], {"a": {"a": {"a": 1}}}, "train", "evaluate", "generation",
)  # fmt: skip


class Raw(str):
    """A text that stands in the JSON as it is."""


@dataclass
class Mutator:
    """Changes values of JSON, one or a few at a time."""

    draw: random.Random

    def of(self, value: Any) -> Any:
        """A copy with one value changed somewhere in it."""
        if isinstance(value, dict) and value and self.draw.random() < 0.85:
            name = self.draw.choice(list(value))
            return self._in_object(value, name)
        if isinstance(value, list) and value and self.draw.random() < 0.85:
            place = self.draw.randrange(len(value))
            changed = [*value[:place], self.of(value[place]), *value[place + 1 :]]
            return self.draw.choice([changed, value[:place] + value[place + 1 :], [*value, value[place]], value[::-1]])
        return self._leaf(value)

    def _in_object(self, value: dict[str, Any], name: str) -> dict[str, Any]:
        roll = self.draw.random()
        if roll < 0.08:
            return {key: item for key, item in value.items() if key != name}
        if roll < 0.14:
            return {
                **value,
                self.draw.choice(["more", "\ud800", "", "__class__", "job", "train"]): self.draw.choice(EDGES),
            }
        if roll < 0.18:
            other = self.draw.choice(list(value))
            return {**value, name: value[other], other: value[name]}
        return {**value, name: self.of(value[name])}

    def _leaf(self, value: Any) -> Any:
        if type(value) is int and value in EQUAL and self.draw.random() < 0.5:
            return self.draw.choice(EQUAL[value])
        if type(value) is int and self.draw.random() < 0.5:
            return self.draw.choice([value + 1, value - 1, -value, value * 10**9, float(value), str(value)])
        if type(value) is float and self.draw.random() < 0.5:
            return self.draw.choice([-value, value * 1e12, value / 1e12, int(value), str(value), 1e308])
        if type(value) is str and value and self.draw.random() < 0.5:
            place = self.draw.randrange(len(value))
            other = self.draw.choice(["\ud800", "\x00", "\n", "é", value[place].swapcase(), ""])
            return value[:place] + other + value[place + 1 :]
        return self.draw.choice(EDGES)

    def text(self, value: Any) -> bytes:
        """The value as JSON, now and then with something that no parser should take."""
        made = json.dumps(value)
        roll = self.draw.random()
        if roll < 0.02:
            made = made.replace(": 1,", ": 1" + "0" * self.draw.choice([30, 400, 4300, 5000]) + ",", 1)
        elif roll < 0.04:
            made = made.replace(": 0,", f": {self.draw.choice(['NaN', 'Infinity', '1e999', '-1e999'])},", 1)
        elif roll < 0.05:
            depth = self.draw.choice([20, 30, 900, 5000])
            made = made.replace(": 0,", ": " + "[" * depth + "]" * depth + ",", 1)
        elif roll < 0.06:
            made = made[: self.draw.randrange(len(made))]
        return made.encode()

    def bytes(self, data: bytes) -> bytes:
        """Bytes cut, flipped or doubled."""
        place = self.draw.randrange(max(1, len(data)))
        flipped = data[:place] + bytes([self.draw.randrange(256)]) + data[place + 1 :]
        return self.draw.choice([data[:place], flipped, data + data[place:], data[place:]])

    def tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors with one changed in name, type, shape or value."""
        name = self.draw.choice(list(tensors)) if tensors else "w"
        tensor = tensors.get(name, torch.zeros(2))
        rest = {key: value for key, value in tensors.items() if key != name}
        made: list[Callable[[], dict[str, torch.Tensor]]] = [
            lambda: rest,
            lambda: {**rest, name + ".x": tensor},
            lambda: {**rest, "\u202e": tensor},
            lambda: {**rest, name: tensor.double()},
            lambda: {**rest, name: tensor.half()},
            lambda: {**rest, name: tensor.reshape(-1)},
            lambda: {**rest, name: tensor[:0]},
            lambda: {**rest, name: torch.full_like(tensor, self.draw.choice([float("nan"), float("inf"), 1e30, 0.0]))},
            lambda: {**tensors, "more": torch.zeros(1)},
        ]
        return self.draw.choice(made)()


@dataclass
class Found:
    """What a fuzzing came to: how many messages, and what became of them."""

    messages: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0


def fuzz_site(house: House, model: Path, *, seconds: float, seed: int) -> Found:
    """Fuzzes the trainer host of a site.

    Raises:
        AssertionError: Something else came of a message than a reply or a recorded refusal.
    """
    draw, found = random.Random(seed), Found()
    mutator, serial = Mutator(draw), seed * 1_000_000
    runs: list[Coordinator] = []
    sent: list[tuple[bytes, bytes, str]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not runs or draw.random() < 0.01:
            serial += 1
            sections = draw.choice([{}, SUMS])
            it = Coordinator(house, configuration(model, **sections), run=f"fuzz-{serial}", number=f"{serial:032x}")
            runs = [*runs[-3:], it]
        message, setup, run = _request(draw.choice(runs), mutator, sent)
        sent = [*sent[-50:], (message, setup, run)]
        began = time.monotonic()
        frame = house.asked(message, setup=setup, run=run)
        found.slowest_seconds = max(found.slowest_seconds, time.monotonic() - began)
        _check_answer(house, frame, began)
        found.messages += 1
        found.outcomes[outcome(frame)] += 1
        if found.messages % 500 == 0:
            house.trail()
        if draw.random() < 0.002:
            house.restarted()
    house.trail()
    return found


def _check_answer(house: House, frame: Frame, began: float) -> None:
    said = outcome(frame)
    assert said == "reply" or (said in REASONS and said != "error"), frame.header
    assert said == "reply" or not leaks(frame), frame.header
    assert house.watch.seen == [], house.watch.seen
    assert time.monotonic() - began < SLOWEST_SECONDS, frame.header
    assert house.host._guard is not None and house.host._guard.trail._last_event in (
        "reply",
        "refusal",
        "failure",
        "privacy",
    )


def _request(it: Coordinator, mutator: Mutator, sent: list[tuple[bytes, bytes, str]]) -> tuple[bytes, bytes, str]:
    """A request, its setup and its run, changed in one way or a few."""
    draw = mutator.draw
    if sent and draw.random() < 0.05:
        return draw.choice(sent)
    kind = draw.choice([*KINDS, *4 * kinds_of(it.config)])
    it, body = _signed(it, kind, mutator)
    fields: dict[str, Any] = {
        "type": "request", "kind": kind, "round": draw.choice([1, 1, 2, 3, 4]), "client": SITE, "body": body,
        "head": it.head(),
    }  # fmt: skip
    if draw.random() < 0.25:
        fields = mutator.of(fields)
    tensors = it.model(draw.choice([1.0, 1.0, 1.0, 2.0])) if KINDS[kind].uses_examples else {}
    if draw.random() < 0.15:
        tensors = mutator.tensors(tensors)
    message = packed(mutator.text(fields), save(tensors))
    setup = mutator.text(it.setup) if draw.random() < 0.1 else json.dumps(it.setup).encode()
    if draw.random() < 0.03:
        message = mutator.bytes(message)
    if draw.random() < 0.03:
        setup = mutator.bytes(setup)
    return (
        message,
        setup,
        it.run if draw.random() < 0.97 else draw.choice([it.run[:-1], "../x", "", "a/b", "\x00", "x" * 300]),
    )


def _signed(it: Coordinator, kind: str, mutator: Mutator) -> tuple[Coordinator, Any]:
    """A body, parts of which a submitter who means no good has signed so; and the coordinator with its setup."""
    draw, changes = mutator.draw, {}
    it = replace(it)
    if draw.random() < 0.15:
        it.setup = mutator.of(it.setup)
        changes["setup_sha256"] = sha256(it.setup) if _is_sane(it.setup) else "0" * 64
    order: Any = it.order(setup=changes.get("setup_sha256"))
    if draw.random() < 0.3:
        order = mutator.of(order)
    job = it.job(**changes)
    if draw.random() < 0.2 and _is_sane(changed := mutator.of(job["job"])) and isinstance(changed, dict):
        job = it.job(**{"setup_sha256": "0" * 64, **changed})  # what cannot be hashed was not signed
    body: dict[str, Any] = {**_steps(it, kind, draw), "job": job}
    if KINDS[kind].uses_examples:
        body = (
            {**body, "train": order}
            if KINDS[kind].is_protected
            else {**(order if isinstance(order, dict) else {}), **body}
        )
    return it, mutator.of(body) if draw.random() < 0.3 else body


def _is_sane(value: Any) -> bool:
    """Whether a value can be hashed as canonical JSON at all: what is signed must be."""
    try:
        sha256(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _steps(it: Coordinator, kind: str, draw: random.Random) -> dict[str, Any]:
    """What the steps of a sum say beside job and order."""
    if kind == "secure_sum.keys":
        made = Terms(
            session=f"{draw.getrandbits(128):032x}", round_number=1, cohort=tuple(sorted((SITE, *OTHERS))),
            threshold=2 / 3, bits=32, bound=1.0, max_examples=64, size=100, work="0" * 64,
        )  # fmt: skip
        return {"terms": made.model_dump(mode="json")}
    parts: dict[str, dict[str, Any]] = {
        "secure_sum.shares": {
            "keys": dict.fromkeys(OTHERS, {"mask": "0" * 64, "share": "0" * 64, "signature": "0" * 128}),
        },
        "secure_sum.input": {
            "bits": 32, "size": 100, "arrived": [SITE, *OTHERS], "shares": dict.fromkeys(OTHERS, "0" * 164),
        },
        "secure_sum.check": {"survivors": [SITE, *OTHERS]},
        "secure_sum.unmask": {"signatures": {name: "0" * 128 for name in OTHERS}},
        "he.input": {"packing": 3, "bound": 1.0, "clients": 4, "num_examples": 9, "size": 9},
        "he.open": {"packing": 3, "size": 0, "num_figures": 2},
    }  # fmt: skip
    return parts.get(kind, {})


REPORT = {"num_examples": 5, "loss": 0.25, "steps": 2, "tokens": 90, "seconds": 0.1, "joules": 1.0}


def fuzz_coordinator(*, seconds: float, seed: int) -> Found:
    """Fuzzes what a coordinator reads of one of three sites.

    Raises:
        AssertionError: Something else came of an answer than a believed reply or that site's failure.
    """
    draw, found = random.Random(seed), Found()
    mutator, start = Mutator(draw), {"w": torch.zeros(2, 3), "b": torch.zeros(4)}
    liar, end = NAMES[1], time.monotonic() + seconds
    while time.monotonic() < end:

        def work(envelope: Any, setup: bytes, data: bytes) -> Frame:
            request = decode_request(data, layout_of(start))
            reply = Reply("train", 1, request.client, {name: value + 1 for name, value in start.items()}, REPORT)
            return _lie(mutator, reply) if request.client == liar else Frame({"status": "reply"}, encode(reply))

        requests = {name: Request("train", 1, name, start, ORDER) for name in NAMES}
        way = transport(line(work, seed=draw.randrange(1000)))
        began = time.monotonic()
        settlement = Settlement(requests, shapes=dict.fromkeys(NAMES, start))
        outcomes = list(settlement.settled(way.exchange(requests, timeout_seconds=30)))
        found.slowest_seconds = max(found.slowest_seconds, time.monotonic() - began)
        assert [each.client for each in outcomes] == list(NAMES)
        assert all(isinstance(each, Reply) for each in outcomes if each.client != liar)
        lie = outcomes[1]
        if isinstance(lie, Failure):
            assert lie.reason.isprintable() and len(lie.reason) < 1000 and lie.stage.isprintable(), lie
        found.messages += 1
        found.outcomes["believed" if isinstance(lie, Reply) else f"refused ({lie.stage})"] += 1
    return found


def _lie(mutator: Mutator, reply: Reply) -> Frame:
    draw, tensors = mutator.draw, reply.tensors
    fields: dict[str, Any] = {
        "type": "reply", "kind": reply.kind, "round": reply.round_number, "client": reply.client,
        "body": dict(reply.body),
    }  # fmt: skip
    fields = mutator.of(fields) if draw.random() < 0.8 else fields
    tensors = mutator.tensors(tensors) if draw.random() < 0.4 else tensors
    message = packed(mutator.text(fields), save(tensors))
    header: dict[str, Any] = {"status": "reply"}
    if draw.random() < 0.2:
        header = {
            "status": "failure",
            "stage": draw.choice(EDGES),
            "reason": draw.choice(EDGES),
            "rule": draw.choice(EDGES),
        }
        header = {
            name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
            for name, value in header.items()
        }
    return Frame(header, mutator.bytes(message) if draw.random() < 0.1 else message)


def _printed(name: str, found: Found, seconds: float) -> Iterator[str]:
    yield f"{name}: {found.messages} messages in {seconds:.0f} s, slowest {found.slowest_seconds:.2f} s"
    yield "  " + ", ".join(f"{said} {count}" for said, count in found.outcomes.most_common())


def main() -> None:
    """Fuzzes both receivers for as many seconds as the argument says."""
    from flwr.supercore.task_identity import TaskIdentity

    import silotune.transports.flower as flower

    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    logging.getLogger("silotune").setLevel(logging.CRITICAL)  # each refusal is a line of a trainer's log
    torch.set_num_threads(1)
    flower.POLL_SECONDS = 0.0
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.save(Path(folder) / "model")
        house = House(Path(folder) / "house", model, policy="most_steps = 20\nmost_seconds = 10\nmost_models = 1000000")
        first = Coordinator(house, configuration(model), run="first", number="f" * 32)
        first.send(first.request())
        house.watch.seen.clear()
        found = fuzz_site(house, model, seconds=0.75 * seconds, seed=seed)
        sys.stdout.write("\n".join(_printed("site", found, 0.75 * seconds)) + "\n")
    found = fuzz_coordinator(seconds=0.25 * seconds, seed=seed)
    sys.stdout.write("\n".join(_printed("coordinator", found, 0.25 * seconds)) + "\n")


if __name__ == "__main__":
    main()
