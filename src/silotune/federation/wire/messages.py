"""Encodes requests and replies as bytes, and decodes them strictly: JSON and safetensors, nothing executable.

A message is ``ST01``, the length of a JSON header (4 bytes, little-endian), the header (filled up with blanks), and a
safetensors file; ``SZ01`` says that the safetensors file is one Zstandard frame. The decoder compares every name, dtype
and shape with what the receiver expects, and the length that a frame claims with the longest such file, before it
allocates anything from them.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias, get_args

import torch
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import load, save

from silotune.errors import MessageError, require
from silotune.record.energy import EnergySource
from silotune.record.plain_json import strict_object
from silotune.settings.base import Positive, Section, SectionType, exactly
from silotune.structs import Reply, Request, Tensors
from silotune.tensors import all_finite, apart, digest

MAGIC = b"ST01"
MAGIC_ZSTD = b"SZ01"
MAX_HEADER_BYTES = 1 << 20
MAX_LISTED_BYTES = 256
"""Most bytes of one tensor's entry in a safetensors file's list, without its name."""
MAX_LIST_BYTES = 4 << 20
"""Most bytes of such a list where the receiver's layout depends on it: enough for 20,000 tensors with long names."""
MOST_ROUNDS = 1_000_000
LONGEST_NAME, LONGEST_BESIDE = 200, 512
"""Most characters of a client's name, and of the head or signature beside a body."""
_KIND = re.compile(r"[a-z][a-z_]{0,29}(\.[a-z_]{1,29})?")
LONGEST_FLOAT = len(repr(-2.2250738585072014e-308))
_SOURCES: tuple[str, ...] = get_args(EnergySource)
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}

Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape) that a receiver expects."""


@dataclass(frozen=True)
class Header:
    """What a message says beside its tensors; ``beside`` is a request's head or a reply's signature."""

    type: Literal["request", "reply"]
    kind: str
    round_number: int
    client: str
    body: Mapping[str, Any]
    beside: str = ""


Expected: TypeAlias = Layout | Callable[[Header, Layout], Layout]
"""A layout, or a function that gives it from a message's header and the layout that the message claims; it never
allows more than the receiver's own settings do."""


MOST_COUNTED = 1 << 40
"""Most examples, steps or nats in a report: far above any true value, and sums and powers of it still fit a float."""


MOST_SECONDS = 1e9
"""Most seconds in a report: thirty years, also enough for the core-seconds of any site."""
MOST_JOULES = 1e10
"""Most joules in a report: three megawatt hours in one round."""
MOST_EPSILON = 1e9


Nats = Annotated[FiniteFloat, Field(ge=-MOST_COUNTED, le=MOST_COUNTED)]
"""A loss or a margin."""


class TrainReport(Section):
    """The body of a reply to ``train``: the weight of the update and what it cost.

    Under differential privacy a site withholds what the guarantee does not cover: the values are None,
        and 0 tokens. ``epsilon`` is
    what the run has cost it so far.
    """

    num_examples: Annotated[Positive, Field(le=MOST_COUNTED)]
    loss: Nats | None
    steps: Annotated[Positive, Field(le=MOST_COUNTED)]
    tokens: Annotated[int, Field(ge=0, le=MOST_COUNTED)]
    seconds: Annotated[FiniteFloat, Field(ge=0, le=MOST_SECONDS)] | None
    core_seconds: Annotated[FiniteFloat, Field(ge=0, le=MOST_SECONDS)] | None = 0.0
    joules: Annotated[FiniteFloat, Field(ge=0, le=MOST_JOULES)] | None = None
    energy_source: EnergySource = "unavailable"
    epsilon: Annotated[FiniteFloat, Field(ge=0, le=MOST_EPSILON)] | None = None


def read_report(reply: Reply) -> TrainReport:
    """The body of a ``train`` reply, checked because another institution sent it, and it sets the update's weight.

    Raises:
        MessageError: A figure is missing, left over, or cannot be.
    """
    return read_body(TrainReport, reply)


def read_body(kind: type[SectionType], message: Request | Reply) -> SectionType:
    """The body of a message, checked because it comes from another institution.

    Every value must have exactly the type of its field in JSON: ``true`` is not a number, and 3.0 is not an integer.

    Raises:
        MessageError: A value is missing, left over, or cannot be.
    """
    side = "request" if isinstance(message, Request) else "reply"
    try:
        return exactly(kind, message.body)
    except ValueError as error:
        raise MessageError(f"the body of this {message.kind} {side} is not valid at {str(error)!r}") from error


def layout_of(tensors: Tensors) -> Layout:
    """The layout that a message with these tensors has.

    Raises:
        MessageError: A tensor has a dtype that messages do not carry.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise MessageError(f"tensor {name!r} is {tensor.dtype}, which messages do not carry")
    return {name: (SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def longest(layout: Layout) -> int:
    """Most bytes that a safetensors file with this layout takes."""
    widths = {name: dtype.itemsize for dtype, name in SAFETENSORS_DTYPES.items()}
    return longest_list(layout) + sum(widths[dtype] * math.prod(shape) for dtype, shape in layout.values())


def longest_list(layout: Layout) -> int:
    """Most bytes that the list of tensors at the beginning of such a file takes."""
    return 64 + sum(len(json.dumps(name)) + MAX_LISTED_BYTES for name in layout)


def encode(message: Request | Reply, *, zstd: int = 0) -> bytes:
    """A message as bytes; the same message gives the same bytes.

    Args:
        message: What to send.
        zstd: Level at which the tensors are compressed; 0 for none. The header is not: it holds measured figures, and
            a message's size must not depend on them.

    Raises:
        MessageError: The body holds something that JSON cannot say, or a tensor has a dtype that is not carried.
        MissingPackageError: ``zstd`` is above 0 and zstandard is not installed.
    """
    header = {
        "type": "request" if isinstance(message, Request) else "reply",
        "kind": message.kind,
        "round": message.round_number,
        "client": message.client,
        "body": dict(message.body),
        **_beside(message),
    }
    try:
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"a {message.kind} message's body is not plain JSON: {error}") from error
    text += b" " * _slack(header["body"])
    layout_of(message.tensors)
    payload = save(apart(message.tensors))
    if zstd:
        payload = require("zstandard", extra="zstd").ZstdCompressor(level=zstd).compress(payload)
    return (MAGIC_ZSTD if zstd else MAGIC) + struct.pack("<I", len(text)) + text + payload


def _beside(message: Request | Reply) -> dict[str, str]:
    """The header's one optional field: a request's head, or a reply's signature."""
    name, value = ("head", message.head) if isinstance(message, Request) else ("signature", message.signature)
    return {name: value} if value else {}


def _slack(value: Any) -> int:
    """Blanks that make up for short numbers, for numbers that are not known and for the word that says how energy was
    come by, so that a message's size does not depend on what was measured."""
    if isinstance(value, float) or value is None:
        return LONGEST_FLOAT - len(json.dumps(value))
    if isinstance(value, str) and value in _SOURCES:
        return max(map(len, _SOURCES)) - len(value)
    if isinstance(value, Mapping):
        return sum(map(_slack, value.values()))
    return sum(map(_slack, value)) if isinstance(value, (list, tuple)) else 0


def decode_request(data: bytes, expected: Expected) -> Request:
    """Decodes a request whose tensors must have the expected layout and be finite.

    Raises:
        MessageError: Anything is not as expected.
    """
    header, tensors = _decode(data, "request", expected)
    if not all_finite(tensors):
        raise MessageError("a request holds values that are not finite")
    return Request(header.kind, header.round_number, header.client, tensors, header.body, head=header.beside)


def decode_reply(data: bytes, expected: Layout) -> Reply:
    """Decodes a reply whose tensors must have the expected layout and be finite.

    Raises:
        MessageError: Anything is not as expected.
    """
    header, tensors = _decode(data, "reply", expected)
    if not all_finite(tensors):
        raise MessageError(f"the reply of {header.client!r} holds values that are not finite")
    came = digest(tensors) if header.beside else ""
    return Reply(
        header.kind, header.round_number, header.client, tensors, header.body, signature=header.beside, digest=came
    )


def read_header(data: bytes) -> Header:
    """What a message says beside its tensors, which are not read.

    Raises:
        MessageError: It is not a message.
    """
    return _header(data)[0]


def _decode(data: bytes, wanted: str, expected: Expected) -> tuple[Header, Tensors]:
    header, start = _header(data)
    if header.type != wanted:
        raise MessageError(f"expected a {wanted}, got a {header.type}")
    payload, is_plain = data[start:], data[:4] == MAGIC
    if callable(expected):
        listed = payload if is_plain else _list_in(payload)
        expected = expected(header, _layout_in(listed, MAX_LIST_BYTES))
    if not is_plain:
        payload = _decompressed(payload, expected)
    _check_layout(_layout_in(payload, longest_list(expected)), expected)
    try:
        tensors = load(payload)
    except SafetensorError as error:
        raise MessageError(f"the tensors of a message do not decode: {error}") from error
    return header, {name: tensors[name] for name in expected}  # safetensors has no fixed order, and sums depend on it


def _header(data: bytes) -> tuple[Header, int]:
    if len(data) < 8 or data[:4] not in (MAGIC, MAGIC_ZSTD):
        raise MessageError("not a silotune message, or one of another version")
    (length,) = struct.unpack("<I", data[4:8])
    if length > MAX_HEADER_BYTES or len(data) < 8 + length:
        raise MessageError(f"a message's header says {length} bytes, which is impossible")
    fields = strict_object(data[8 : 8 + length], "header")
    expected = {"type": str, "kind": str, "round": int, "client": str, "body": dict}
    optional = "head" if fields.get("type") == "request" else "signature"
    if optional in fields:
        expected[optional] = str
    if fields.keys() != expected.keys() or not all(type(fields[key]) is expected[key] for key in expected):
        raise MessageError("a message's header does not have the expected fields")
    made = Header(fields["type"], fields["kind"], fields["round"], fields["client"], fields["body"])
    made = replace(made, beside=fields.get(optional, ""))
    if not (_KIND.fullmatch(made.kind) and 0 <= made.round_number <= MOST_ROUNDS):
        raise MessageError("a message's header holds a kind or a round that cannot be")
    if not 0 < len(made.client) <= LONGEST_NAME or len(made.beside) > LONGEST_BESIDE:
        raise MessageError("a message's header holds a name or a signature that is too long")
    return made, 8 + length


def _decompressed(frame: bytes, expected: Layout) -> bytes:
    """Decompresses a safetensors file, after checking that it claims no more bytes than such a file can have."""
    zstandard = require("zstandard", extra="zstd")
    limit = longest(expected)
    try:
        claimed = zstandard.get_frame_parameters(frame)
        if claimed.content_size > limit or claimed.window_size > max(limit, 1 << 20):
            raise MessageError(
                f"a compressed message claims {claimed.content_size} bytes, at most {limit} are expected"
            )
        made: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MessageError("the tensors of a message do not decompress") from error
    return made


def _list_in(frame: bytes) -> bytes:
    """The beginning of a safetensors file, up to the end of its list of tensors, from its Zstandard frame."""
    zstandard = require("zstandard", extra="zstd")
    try:
        with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
            head = reader.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if length > MAX_LIST_BYTES:
                raise MessageError(f"a compressed message's list of tensors claims {length} bytes, which is impossible")
            made: bytes = head + reader.read(length)
    except zstandard.ZstdError as error:
        raise MessageError("the tensors of a message do not decompress") from error
    return made


def _layout_in(payload: bytes, most_bytes: int) -> Layout:
    """Names, dtypes and shapes that a safetensors file claims, read without allocating the tensors.

    Args:
        payload: The file.
        most_bytes: Longest list of tensors that is read.
    """
    if len(payload) < 8:
        raise MessageError("a message ends before its tensors")
    (length,) = struct.unpack("<Q", payload[:8])
    if length > len(payload) - 8:
        raise MessageError("a message ends inside the list of its tensors")
    if length > most_bytes:
        raise MessageError(f"a message's list of tensors has {length} bytes, at most {most_bytes} are read")
    listed = strict_object(payload[8 : 8 + length], "tensor list")
    return {name: _entry(entry) for name, entry in listed.items()}


def _entry(entry: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of one tensor in such a list."""
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MessageError("a message's tensor list does not have the expected fields")
    dtype, shape = entry["dtype"], entry["shape"]
    if type(dtype) is not str or type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise MessageError("a message's tensor list holds a dtype or a shape that cannot be")
    return dtype, tuple(shape)


def _check_layout(claimed: Layout, expected: Layout) -> None:
    if claimed.keys() != expected.keys():
        odd = sorted(claimed.keys() ^ expected.keys())[0]
        side = "unexpected" if odd in claimed else "missing"
        raise MessageError(f"tensor {odd!r} is {side} in a message")
    for name, entry in claimed.items():
        if entry != expected[name]:
            raise MessageError(f"tensor {name!r} came as {entry}, expected {expected[name]}")
