"""Fuzzes the decoder of messages with atheris: whatever the bytes, it gives a message or ``MessageError``.

``pip install atheris``, then ``python scripts/fuzz_messages.py CORPUS -max_total_time=600``. The folder is made and
seeded with valid messages when it is empty; what follows it goes to libFuzzer. The same property is tested with
hypothesis, for seconds, by ``make test``.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["silotune.federation.wire.messages"]):
    from silotune.federation.wire.messages import MAGIC, decode_reply, decode_request, encode, layout_of, read_report
from silotune.errors import MessageError
from silotune.structs import Reply, Request

TENSORS = {
    "layers.0.lora_A": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "layers.0.lora_B": torch.tensor([[1.0], [-0.5]], dtype=torch.bfloat16),
}
EXPECTED = layout_of(TENSORS)
REPORT = {"num_examples": 5, "loss": 0.25, "steps": 2, "tokens": 90, "seconds": 0.1}
SENT = encode(Reply("train", 3, "bank-1", TENSORS, REPORT))
START = 8 + int.from_bytes(SENT[4:8], "little")
FRONT, PAYLOAD = SENT[:START], SENT[START:]
VALUES = PAYLOAD[8 + int.from_bytes(PAYLOAD[:8], "little") :]


def seeds() -> list[bytes]:
    """Valid messages to start from."""
    body = {"training": {"objective": "sft"}, "seed": 1, "rounds": 3, "list": [1, None, True, "ä"]}
    return [
        encode(Request("train", 3, "bank-1", TENSORS, body)),
        encode(Request("train", 3, "bank-1", TENSORS, body, head=f"12:{'0' * 64}:c2lnbmF0dXJl")),
        encode(Reply("train", 3, "bank-1", TENSORS, REPORT)),
        encode(Reply("train", 3, "bank-1", TENSORS, REPORT, signature="c2lnbmF0dXJl")),
        encode(Reply("evaluate", 3, "bank-1", {}, {"accuracy": 0.5})),
        FRONT[8:],
        PAYLOAD,
        PAYLOAD[8 : len(PAYLOAD) - len(VALUES)],
    ]


def variants(data: bytes) -> Iterator[bytes]:
    """The input as a whole message, and as one part of a message whose lengths are right."""
    yield data
    yield MAGIC + struct.pack("<I", len(data)) + data + PAYLOAD
    yield FRONT + data
    yield FRONT + struct.pack("<Q", len(data)) + data + VALUES


def one(data: bytes) -> None:
    """What one input must not do: raise anything else, or give tensors of another layout."""
    for message in variants(data):
        _decoded(message)


def _decoded(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            message = decode(data, EXPECTED)
        except MessageError:
            continue
        assert layout_of(message.tensors) == EXPECTED
        if isinstance(message, Reply):
            try:
                read_report(message)
            except MessageError:
                continue


def main() -> None:
    """Seeds an empty corpus, then fuzzes until libFuzzer's limit."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python scripts/fuzz_messages.py CORPUS [libFuzzer's options, such as -max_total_time=600]")
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, message in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(message)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
