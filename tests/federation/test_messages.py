"""Messages: bit for bit there and back, and nothing but ``MessageError`` from bytes that are not right."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from silotune.errors import MessageError
from silotune.federation.wire import messages
from silotune.federation.wire.messages import (
    MAX_HEADER_BYTES,
    SAFETENSORS_DTYPES,
    decode_reply,
    decode_request,
    encode,
    layout_of,
    read_report,
)
from silotune.structs import Reply, Request

TENSORS = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor([-0.0, 1e-45])}
REPLY = Reply("train", 3, "bank-1", TENSORS, {"num_examples": 5, "loss": 0.25})
SENT = encode(REPLY)
REPORT = {"num_examples": 5, "loss": 0.25, "steps": 2, "tokens": 90, "seconds": 0.1}


def of_every_dtype() -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    made = {str(dtype): (torch.randn(3, 4, generator=noise) * 9).to(dtype) for dtype in SAFETENSORS_DTYPES}
    return {**made, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "strided": torch.ones(4, 3).T}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("of", [Request, Reply])
def test_there_and_back_bit_for_bit(of: type) -> None:
    tensors = of_every_dtype()
    body = {"text": "ä", "list": [1, 2.5, None, True], "inner": {"x": -1e-300}}
    message = of("train", 12, "bank-ä", tensors, body)
    decode = decode_request if of is Request else decode_reply
    back = decode(encode(message), layout_of(tensors))
    assert type(back) is of
    assert (back.kind, back.round_number, back.client, back.body) == ("train", 12, "bank-ä", body)
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype and back.tensors[name].shape == tensor.shape
        assert bits(back.tensors[name]) == bits(tensor), name


def test_the_same_message_gives_the_same_bytes() -> None:
    turned = Reply("train", 3, "bank-1", dict(reversed(TENSORS.items())), {"loss": 0.25, "num_examples": 5})
    assert encode(turned) == SENT == encode(REPLY)
    assert encode(Reply("train", 4, "bank-1", TENSORS, REPLY.body)) != SENT


def test_tensors_that_share_memory_are_sent_whole() -> None:
    vector = torch.arange(6.0)
    shared = {"all": vector, "part": vector[2:4], "again": vector}
    back = decode_reply(encode(Reply("train", 1, "c", shared)), layout_of(shared))
    assert back.tensors["part"].tolist() == [2.0, 3.0] and torch.equal(back.tensors["again"], vector)


def test_nothing_executable() -> None:
    text = open(messages.__file__).read()  # noqa: SIM115, PTH123
    assert "pickle" not in text.replace("no pickle", "") and "torch.load" not in text


def test_what_cannot_be_sent() -> None:
    for body in ({"x": float("nan")}, {"x": object()}, {"x": b"bytes"}):
        with pytest.raises(MessageError, match="JSON"):
            encode(Reply("train", 1, "c", {}, body))
    with pytest.raises(MessageError, match="bool"):
        encode(Reply("train", 1, "c", {"mask": torch.ones(2, dtype=torch.bool)}))


def test_the_layout_must_be_the_expected_one() -> None:
    expected = layout_of(TENSORS)
    wrong = {
        "missing": {key: value for key, value in TENSORS.items() if key != "a"},
        "unexpected": {**TENSORS, "c": torch.zeros(1)},
        "expected": {**TENSORS, "a": torch.zeros(3)},
        "F64": {**TENSORS, "a": TENSORS["a"].double()},
    }
    for words, tensors in wrong.items():
        with pytest.raises(MessageError, match=words):
            decode_reply(encode(Reply("train", 1, "c", tensors)), expected)
    with pytest.raises(MessageError, match="expected a request, got a reply"):
        decode_request(SENT, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_replies_must_be_finite(value: float) -> None:
    tensors = {**TENSORS, "a": torch.tensor([1.0, value])}
    with pytest.raises(MessageError, match="'bank-1'.*finite"):
        decode_reply(encode(Reply("train", 1, "bank-1", tensors)), layout_of(TENSORS))


def raw(header: bytes, payload: bytes = save(TENSORS), *, length: int | None = None) -> bytes:
    return b"ST01" + struct.pack("<I", len(header) if length is None else length) + header + payload


HEADER = {"type": "reply", "kind": "train", "round": 1, "client": "c", "body": {}}


def listed(text: bytes, values: bytes = b"\0" * 32, *, length: int | None = None) -> bytes:
    return raw(json.dumps(HEADER).encode(), struct.pack("<Q", len(text) if length is None else length) + text + values)


BROKEN = {
    "empty": b"",
    "other magic": b"PK" + SENT[2:],
    "huge header": raw(b"{}", length=2**32 - 1),
    "header above the limit": raw(b" " * (MAX_HEADER_BYTES + 1)),
    "header is a list": raw(b"[]"),
    "header lacks fields": raw(b"{}"),
    "header has more fields": raw(json.dumps({**HEADER, "more": 1}).encode()),
    "round is text": raw(json.dumps({**HEADER, "round": "1"}).encode()),
    "not utf-8": raw(b'{"type":"\xff"}'),
    "endless digits": raw(b'{"round":' + b"9" * 5000 + b"}"),
    "deep": raw(b'{"body":' * 50_000),
    "not a number": raw(json.dumps({**HEADER, "body": {"loss": float("nan")}}).encode()),
    "no payload": raw(json.dumps(HEADER).encode(), b""),
    "huge tensor list": listed(b"{}", length=2**63),
    "tensor list is a list": listed(b"[]"),
    "tensor is a number": listed(b'{"a": 3, "b": 4}'),
    "tensor without shape": listed(b'{"a": {"dtype": "F32"}, "b": {"dtype": "F32"}}'),
    "endless shape": listed(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"),
    "offsets outside": listed(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,99]}}'
    ),
    "offsets overlap": listed(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    ),
    "shape of floats": listed(
        b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'
    ),
    "named twice": listed(
        b'{"a":{"dtype":"F64","shape":[99],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}'
    ),
    "more behind": SENT + b"\0",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_messages(name: str) -> None:
    with pytest.raises(MessageError) as caught:
        decode_reply(BROKEN[name], layout_of(TENSORS))
    assert len(str(caught.value)) < 500


def survives(data: bytes) -> None:
    """A message decodes to the expected layout, or is a ``MessageError``."""
    try:
        back = decode_reply(data, layout_of(TENSORS))
    except MessageError:
        return
    assert layout_of(back.tensors) == layout_of(TENSORS)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in back.tensors.values())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SENT)), st.lists(st.tuples(st.integers(0, len(SENT) - 1), st.integers(0, 255)), max_size=4))
@example(8, [])
def test_truncated_and_flipped_messages(end: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(SENT)
    for place, value in flips:
        data[place] = value
    survives(bytes(data[:end]))
    survives(bytes(data))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(data: bytes, with_header: bool) -> None:
    survives(raw(json.dumps(HEADER).encode(), data) if with_header else data)


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_is_read() -> None:
    report = read_report(Reply("train", 1, "c", {}, REPORT))
    unsaid = {"core_seconds": 0.0, "joules": None, "energy_source": "unavailable", "epsilon": None}
    assert report.model_dump() == {**REPORT, **unsaid}


@pytest.mark.parametrize("changes", [{"core_seconds": -1.0}, {"joules": -1.0}, {"energy_source": "guessed"}])
def test_what_a_client_says_it_spent_is_checked(changes: dict) -> None:
    with pytest.raises(MessageError, match=next(iter(changes))):
        read_report(Reply("train", 1, "c", {}, {**REPORT, **changes}))


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_the_size_of_a_message_does_not_depend_on_what_was_measured(values: list[float]) -> None:
    first, second = (
        Reply("train", 1, "c", {}, {"loss": a, "deep": {"list": [b, c]}, "steps": 3})
        for a, b, c in (values, (0.0, -2.2250738585072014e-308, 1.5))
    )
    assert len(encode(first)) == len(encode(second))
    assert decode_reply(encode(first), {}) == first


def test_the_size_of_a_reply_is_the_same_whether_energy_is_known_or_not() -> None:
    known = ({"joules": 12.5, "energy_source": how} for how in ("measured", "estimated"))
    unknown = {"joules": None, "energy_source": "unavailable"}
    assert len({len(encode(Reply("train", 1, "c", {}, {**REPORT, **own}))) for own in (*known, unknown)}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": 0}, {"num_examples": -5}, {"num_examples": 2.5}, {"num_examples": "5"}, {"num_examples": True},
        {"loss": float("inf")}, {"loss": "0"}, {"steps": 0}, {"seconds": -1.0}, {"tokens": -1}, {"round": 7},
        {"num_examples": 10**309}, {"steps": 10**400}, {"loss": 1e200}, {"loss": -1e200},
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_is_refused(changes: dict) -> None:
    with pytest.raises(MessageError, match=f"'{next(iter(changes))}'"):
        read_report(Reply("train", 1, "c", {}, {**REPORT, **changes}))


def test_a_report_that_lacks_a_figure_is_refused() -> None:
    for name in REPORT:
        with pytest.raises(MessageError, match=name):
            read_report(Reply("train", 1, "c", {}, {key: value for key, value in REPORT.items() if key != name}))


def test_decoded_tensors_stand_in_the_expected_order() -> None:
    names = [f"layer.{number}" for number in (3, 1, 2, 9, 4, 8, 0, 7, 5, 6)]
    tensors = {name: torch.zeros(2) for name in names}
    request = decode_request(encode(Request("train", 1, "a", tensors, {})), layout_of(tensors))
    assert list(request.tensors) == names
