"""A site that lies in every way a reply can: the other three finish with the bits they would have had without it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from attacks.hostile import packed
from deployed import Deployed, document, over_tls, quickly, without_waiting
from silotune.config import from_mapping
from silotune.deploy.kits import site_folder
from silotune.experiment.audit import verify_run
from silotune.federation.kinds import KINDS
from silotune.federation.site.state import Site
from silotune.record.chain import read_chain
from silotune.record.runs import RunFolder
from silotune.structs import Reply, Request
from silotune.transports.frames import Frame

pytestmark = pytest.mark.end_to_end
NAMES, LIAR = ("client-0", "client-1", "client-2", "client-3"), "client-1"
Lie = Callable[[Frame], Frame]


def in_header(old: str, new: str) -> Lie:
    """The JSON of the reply's header changed as text."""

    def lie(frame: Frame) -> Frame:
        length = int.from_bytes(frame.payload[4:8], "little")
        text = frame.payload[8 : 8 + length].decode()
        assert old in text, text
        return Frame(frame.header, packed(text.replace(old, new, 1).encode(), frame.payload[8 + length :]))

    return lie


def figure(name: str, value: str) -> Lie:
    """A figure of the report in the place of what it was, as it stands in JSON."""

    def lie(frame: Frame) -> Frame:
        length = int.from_bytes(frame.payload[4:8], "little")
        document = json.loads(frame.payload[8 : 8 + length])
        document["body"][name] = "@"
        text = json.dumps(document).replace('"@"', value)
        return Frame(frame.header, packed(text.encode(), frame.payload[8 + length :]))

    return lie


def with_bytes(change: Callable[[bytes], bytes]) -> Lie:
    return lambda frame: Frame(frame.header, change(frame.payload))


def says(**header: str) -> Lie:
    """A failure of the site's own wording."""
    return lambda frame: Frame({"status": "failure", "stage": "train", **header})


def tensors(change: Callable[[bytes], bytes]) -> Lie:
    """The values of the tensors changed, their list as it was."""

    def lie(frame: Frame) -> Frame:
        front = 8 + int.from_bytes(frame.payload[4:8], "little")
        start = front + 8 + int.from_bytes(frame.payload[front : front + 8], "little")
        return Frame(frame.header, frame.payload[:start] + change(frame.payload[start:]))

    return lie


def many_names(payload: bytes) -> bytes:
    front = 8 + int.from_bytes(payload[4:8], "little")
    listed = {f"{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(100_000)}
    text = json.dumps(listed).encode()
    return payload[:front] + struct.pack("<Q", len(text)) + text


LIES: Mapping[str, tuple[Lie, str]] = {
    "a lone surrogate": (in_header('"kind":"train"', '"kind":"train\\ud800"'), "control characters or broken UTF-8"),
    "a surrogate in a figure": (figure("energy_source", '"\\ud800"'), "control characters or broken UTF-8"),
    "4,300 digits": (figure("num_examples", "9" * 4300), "is not JSON within bounds"),
    "a nested body": (figure("loss", "[" * 900 + "]" * 900), "nested more than"),
    "a body nested deeper": (figure("loss", "[" * 100_000), "is not JSON within bounds"),
    "joules = 1e308": (figure("joules", "1e308"), "not valid at 'joules'"),
    "more joules than there can be": (figure("joules", "9e9"), "joules are more than 'client-1' can have used"),
    "an infinite loss": (figure("loss", "1e999"), "holds a number that is not finite"),
    "a huge loss": (figure("loss", "1e300"), "not valid at 'loss'"),
    "true examples": (figure("num_examples", "true"), "not valid at 'num_examples'"),
    "examples with a fraction": (figure("num_examples", "3.0"), "not valid at 'num_examples'"),
    "endless examples": (figure("num_examples", "1e18"), "not valid at 'num_examples'"),
    "no examples": (figure("num_examples", "0"), "not valid at 'num_examples'"),
    "more than was done": (figure("num_examples", "7"), "does not fit: another key"),
    "a figure more": (figure("x", "1"), "not valid at 'x'"),
    "another kind": (in_header('"kind":"train"', '"kind":"evaluate"'), "answers no request of round"),
    "a round that is true": (in_header('"round":', '"round":true,"x":'), "does not have the expected fields"),
    "in another's name": (in_header('"client":"client-1"', '"client":"client-0"'), "in the name of another"),
    "no values": (tensors(lambda values: values[:-4]), "do not decode"),
    "NaN": (tensors(lambda values: b"\xff" * len(values)), "not finite"),
    "1e30": (tensors(lambda values: struct.pack("<f", 1e30) * (len(values) // 4)), "a value of 1e+30"),
    "100,000 tensors": (with_bytes(many_names), "list of tensors has"),
    "code": (with_bytes(lambda payload: b"\x80\x04\x95cposix\nsystem\n."), "not a silotune message"),
    "nothing": (with_bytes(lambda payload: b""), "not a silotune message"),
    "words of its own": (says(reason="see http://evil.example"), "a reason that is not on the list"),
    "a rule that there is not": (says(reason="x" * 9999), "a reason that is not on the list"),
}
"""Lie -> how the reply is changed, and what the coordinator books it with; one lie a round."""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Deployed]:
    with quickly():
        yield Deployed(tmp_path_factory.mktemp("lies") / "f", tiny_folder, NAMES)


def asked(model: Path, folder: Path, name: str, rounds: int) -> dict[str, Any]:
    return document(
        model, folder, federation={"rounds": rounds}, evaluation={"per_client": False},
        data={"partition": {"clients": 4, "scheme": "iid"}}, record={"name": name}, training={"max_steps": 1},
    )  # fmt: skip


SIGNED_LIES: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "an accuracy of 31,337": ("evaluate", {"accuracy": 31337.0}, "not valid at 'accuracy'"),
    "another's failure": ("evaluate", {"failed": "client-0 cheats"}, "not valid at 'failed'"),
    "filler": ("evaluate", {"x": ["y" * 4000] * 200}, "not valid at 'x'"),
    "a guarantee that there is not": ("train", {"epsilon": 0.001}, "the sites of this run add no noise"),
}
"""Lie -> in which reply, what the site puts into its body and signs, and what the coordinator books it with."""


class Liar:
    """What the trainer of one site answers, changed before its node sends it, round after round."""

    def __init__(self, deployed: Deployed, lies: list[Lie]) -> None:
        self.lies, host = iter(lies), deployed.hosts[LIAR]
        self.honest, self.host = host.answer, host
        host.answer = self.answer  # type: ignore[method-assign]

    def answer(self, frame: Frame) -> Frame:
        made = self.honest(frame)
        is_training = made.payload[:4] == b"ST01" and b'"kind":"train"' in made.payload
        return next(self.lies)(made) if is_training else made


@contextmanager
def signing(kind: str, changes: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the liar's own program puts this into its answers to one kind, before they are signed."""
    honest = KINDS[kind]

    def answer(request: Request, site: Site) -> Reply:
        reply: Reply = honest.answer(request, site)
        return replace(reply, body={**reply.body, **changes}) if site.name == LIAR else reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, kind, replace(honest, answer=answer))  # type: ignore[arg-type]
        yield


def failures(run: RunFolder) -> list[dict[str, str]]:
    return [item for row in run.part("federated").read_rows("metrics") for item in row["failures"]]


def check(run: RunFolder, without: RunFolder, lies: Mapping[str, tuple[Lie, str]]) -> None:
    """Every round is that of the three others, to the bit; every lie is booked under the liar's name."""
    tiny.assert_same_bits(*(made.part("federated").load_adapter()[0] for made in (run, without)))
    booked = failures(run)
    assert [failure["client"] for failure in booked] == [LIAR] * len(lies)
    for failure, (name, (_, said)) in zip(booked, lies.items(), strict=True):
        assert said in failure["reason"], (name, failure)
        assert failure["reason"].isprintable() and len(failure["reason"]) < 600
    entries = read_chain(run.part("federated").path / "audit.jsonl")
    blamed = [entry.fields["client"] for entry in entries if entry.event in ("failure", "refusal")]
    assert blamed == [LIAR] * len(lies)


@pytest.fixture(scope="module")
def without(deployed: Deployed, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run without the liar, whose trainer does nothing and says so."""
    host = deployed.hosts[LIAR]
    honest, refuses = host.answer, Frame({"status": "failure", "stage": "train", "reason": "generation"})
    host.answer = lambda frame: refuses  # type: ignore[method-assign]
    try:
        with without_waiting():
            folder = tmp_path_factory.mktemp("without")
            return deployed.run(from_mapping(asked(tiny_folder, folder, "without", len(LIES))))
    finally:
        host.answer = honest  # type: ignore[method-assign]


def test_a_site_that_lies_in_every_way_fails_alone(
    deployed: Deployed, tiny_folder: Path, tmp_path: Path, without: RunFolder
) -> None:
    liar = Liar(deployed, [lie for lie, _ in LIES.values()])
    try:
        with without_waiting():
            run = deployed.run(from_mapping(asked(tiny_folder, tmp_path, "lies", len(LIES))))
    finally:
        liar.host.answer = liar.honest  # type: ignore[method-assign]
    check(run, without, LIES)


@pytest.mark.parametrize("name", SIGNED_LIES)
def test_a_lie_that_a_site_signs_stands_in_no_file_of_the_run(
    deployed: Deployed, tiny_folder: Path, tmp_path: Path, name: str, refused: Callable[..., None]
) -> None:
    """Nor in the trail, but as that site's failure in the coordinator's own words; the others' figures are there."""
    kind, changes, said = SIGNED_LIES[name]
    made = asked(tiny_folder, tmp_path, f"signed-{name.replace(' ', '-').replace(',', '')}".replace("'", ""), 1)
    with signing(kind, changes), without_waiting():
        run = deployed.run(from_mapping({**made, "evaluation": {"bootstrap_samples": 0, "per_client": True}}))
    entries = read_chain(run.part("federated").path / "audit.jsonl")
    booked = [entry.fields for entry in entries if entry.event == "failure"]
    assert [fields["client"] for fields in booked] == [LIAR] and said in booked[0]["reason"]
    assert not [e for e in entries if e.event == "reply" and (e.fields["client"], e.fields["kind"]) == (LIAR, kind)]
    scored = run.part("federated").read_json("per_client")
    assert {name for name, row in scored.items() if 0 <= row.get("accuracy", -1) <= 1} >= {*NAMES} - {LIAR}
    if kind == "evaluate":
        assert scored[LIAR] == {"failed": booked[0]["reason"]}
    assert "privacy" not in run.part("federated").read_json("result")
    refused("a site that signs its lie", name, booked[0]["reason"][:200])


def test_the_same_over_tls(
    deployed: Deployed, tiny_folder: Path, tmp_path: Path, without: RunFolder, refused: Callable[..., None]
) -> None:
    """Through real nodes, the SuperLink and TLS."""
    with over_tls(deployed):
        liar = Liar(deployed, [lie for lie, _ in LIES.values()])
        try:
            run = deployed.submitted(asked(tiny_folder, tmp_path, "lies-over-tls", len(LIES)))
        finally:
            liar.host.answer = liar.honest  # type: ignore[method-assign]
        keys = deployed.kit.members().signing_keys()
        sites = [site_folder(deployed.site(name)) for name in NAMES]
        assert verify_run(run.path, keys=keys, sites=sites).has_adapter
    check(run, without, LIES)
    for lie, failure in zip(LIES, failures(run), strict=True):
        refused("a site that lies in a reply, over TLS", lie, failure["reason"][:200])
