"""Zstandard frames in messages: there and back, and bounded before anything is allocated."""

from __future__ import annotations

import pytest
import torch

from silotune.errors import MessageError
from silotune.federation.wire.messages import (
    MAGIC_ZSTD,
    Header,
    Layout,
    decode_reply,
    decode_request,
    encode,
    layout_of,
)
from silotune.structs import Reply, Request

zstandard = pytest.importorskip("zstandard")
TENSORS = {"a": torch.zeros(1000), "b.ä": torch.arange(6, dtype=torch.int32)}
REPLY = Reply("train", 3, "bank-1", TENSORS, {"loss": 0.25})
SENT = encode(REPLY, zstd=3)
START = 8 + int.from_bytes(SENT[4:8], "little")


def test_there_and_back_in_fewer_bytes() -> None:
    assert len(SENT) < len(encode(REPLY)) / 5 and SENT[:4] == MAGIC_ZSTD
    back = decode_reply(SENT, layout_of(TENSORS))
    assert back.body == REPLY.body and all(torch.equal(back.tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_size_does_not_depend_on_what_was_measured() -> None:
    other = Reply("train", 3, "bank-1", TENSORS, {"loss": 0.123456789012345678})
    assert len(encode(other, zstd=3)) == len(SENT)


def test_a_frame_that_claims_more_than_is_expected_is_refused_unopened() -> None:
    bomb = zstandard.ZstdCompressor().compress(b"\0" * 20_000_000)
    assert len(bomb) < 20_000
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * 100)
    for frame in (bomb, unsaid):
        with pytest.raises(MessageError, match="a compressed message claims"):
            decode_reply(SENT[:START] + frame, layout_of(TENSORS))


def test_a_list_of_tensors_is_read_before_the_rest_and_bounded() -> None:
    def expected(header: Header, claimed: Layout) -> Layout:
        assert claimed == layout_of(TENSORS) and header.kind == "train"
        return claimed

    request = Request("train", 3, "bank-1", TENSORS, {})
    sent = encode(request, zstd=3)
    assert decode_request(sent, expected).tensors.keys() == TENSORS.keys()
    start = 8 + int.from_bytes(sent[4:8], "little")
    for length, why in ((1 << 40, "is impossible"), (100, "ends inside")):
        frame = zstandard.ZstdCompressor().compress(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(MessageError, match=why):
            decode_request(sent[:start] + frame, expected)
    for frame in (b"", b"no frame", sent[start : start + 20]):
        with pytest.raises(MessageError):
            decode_request(sent[:start] + frame, expected)


@pytest.mark.parametrize("change", [lambda f: f[:-1], lambda f: f + b"x", lambda f: b"", lambda f: b"no frame" + f])
def test_what_is_no_frame_is_refused(change) -> None:
    with pytest.raises(MessageError, match="decompress|claims"):
        decode_reply(SENT[:START] + change(SENT[START:]), layout_of(TENSORS))


def test_no_broken_byte_gives_anything_but_a_message_error() -> None:
    for place in range(START, len(SENT)):
        broken = SENT[:place] + bytes([SENT[place] ^ 0x55]) + SENT[place + 1 :]
        try:
            decode_reply(broken, layout_of(TENSORS))
        except MessageError:
            continue
