"""Number formats for what is sent: a vector of float32 to bytes of a known length, and back.

``int8`` and ``int4`` share a scale per block and round at random to one of the two nearest levels, so that the mean of
what arrives is what was meant (QSGD, Alistarh et al. 2017, with a maximum norm per block). ``sign`` sends one bit a
value and the block's mean magnitude (signSGD with error feedback, Karimireddy et al. 2019). Scales are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from silotune.errors import MessageError
from silotune.settings.links import ValueFormat

SCALE_BYTES = 2


@dataclass(frozen=True)
class Format:
    """One pair of encoder and decoder.

    Attributes:
        size: (values, block) to the exact number of bytes.
        encode: (vector float32 [values], block, generator) to bytes [size] as uint8; without a generator int8 and int4
            round to the nearest level.
        decode: (bytes [size], values, block) to float32 [values].
        is_biased: The mean of what arrives is not what was meant, so what was left out must be sent later.
    """

    size: Callable[[int, int], int]
    encode: Callable[[torch.Tensor, int, torch.Generator | None], torch.Tensor]
    decode: Callable[[torch.Tensor, int, int], torch.Tensor]
    is_biased: bool = False


def _floating(dtype: torch.dtype) -> Format:
    """Each value rounded to the nearest of a narrower type; exact for float32."""

    def encode(vector: torch.Tensor, block: int, generator: torch.Generator | None) -> torch.Tensor:
        made = vector.to(dtype)
        if not bool(torch.isfinite(made).all()) and bool(torch.isfinite(vector).all()):
            raise MessageError(f"a value does not fit {dtype}: send bfloat16, which has the range of float32")
        return made.contiguous().view(torch.uint8)

    def decode(data: torch.Tensor, count: int, block: int) -> torch.Tensor:
        return data.clone().view(dtype).to(torch.float32)  # a copy: a slice of bytes need not be aligned

    return Format(lambda count, block: count * dtype.itemsize, encode, decode)


def _levels(largest: int, pack: Callable[[np.ndarray], np.ndarray], unpack: Callable[..., np.ndarray]) -> Format:
    """Whole numbers from -largest to largest times the block's scale, rounded at random without bias."""
    bits = largest.bit_length() + 1

    def size(count: int, block: int) -> int:
        return SCALE_BYTES * _num_blocks(count, block) + -(-count * bits // 8)

    def encode(vector: torch.Tensor, block: int, generator: torch.Generator | None) -> torch.Tensor:
        blocks = _blocks(vector, block)
        scales = _rounded_up(blocks.abs().amax(dim=1) / largest)  # [blocks]
        steps = blocks / torch.where(scales > 0, scales.float(), 1.0)[:, None]
        chance = torch.rand(steps.shape, generator=generator) if generator is not None else 0.5
        whole = (steps + chance).floor_().clamp_(-largest, largest)
        numbers = whole.reshape(-1)[: vector.numel()].to(torch.int8).numpy()
        return torch.cat([scales.view(torch.uint8), torch.from_numpy(pack(numbers))])

    def decode(data: torch.Tensor, count: int, block: int) -> torch.Tensor:
        cut = SCALE_BYTES * _num_blocks(count, block)
        numbers = torch.from_numpy(unpack(data[cut:].numpy(), count)).float()
        return _scaled(numbers, data[:cut], block)

    return Format(size, encode, decode)


def _pack_nibbles(numbers: np.ndarray) -> np.ndarray:
    """Two numbers of -8 to 7 a byte, the first in the low half."""
    halves = np.zeros(numbers.size + numbers.size % 2, dtype=np.uint8)
    halves[: numbers.size] = numbers + 8
    return halves[::2] | (halves[1::2] << 4)


def _unpack_nibbles(data: np.ndarray, count: int) -> np.ndarray:
    halves = np.stack([data & 15, data >> 4], axis=1).reshape(-1)[:count]
    return halves.astype(np.int8) - 8


def _sign_size(count: int, block: int) -> int:
    return SCALE_BYTES * _num_blocks(count, block) + -(-count // 8)


def _encode_sign(vector: torch.Tensor, block: int, generator: torch.Generator | None) -> torch.Tensor:
    sums = _blocks(vector, block).abs().sum(dim=1)  # what fills the last block up is zero
    members = torch.full_like(sums, block)
    members[-1:] -= len(sums) * block - vector.numel()
    bits = np.packbits((vector >= 0).numpy(), bitorder="little")
    return torch.cat([(sums / members).to(torch.bfloat16).view(torch.uint8), torch.from_numpy(bits)])


def _decode_sign(data: torch.Tensor, count: int, block: int) -> torch.Tensor:
    cut = SCALE_BYTES * _num_blocks(count, block)
    bits = np.unpackbits(data[cut:].numpy(), count=count, bitorder="little")
    return _scaled(torch.from_numpy(bits).float() * 2 - 1, data[:cut], block)


def _num_blocks(count: int, block: int) -> int:
    return -(-count // block)


def _blocks(vector: torch.Tensor, block: int) -> torch.Tensor:
    """The vector as [blocks, block], the last one filled up with zeros."""
    missing = -vector.numel() % block
    return torch.nn.functional.pad(vector, (0, missing)).reshape(-1, block)


def _rounded_up(values: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 as bfloat16 that is not smaller, so that no value lies beyond the last level."""
    near = values.to(torch.bfloat16)
    return (near.view(torch.int16) + (near.float() < values).to(torch.int16)).view(torch.bfloat16)


def _scaled(numbers: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    factors = scales.clone().view(torch.bfloat16).float()
    return (_blocks(numbers, block) * factors[:, None]).reshape(-1)[: numbers.numel()]


FORMATS: Mapping[ValueFormat, Format] = {
    "float32": _floating(torch.float32),
    "float16": _floating(torch.float16),
    "bfloat16": _floating(torch.bfloat16),
    "int8": _levels(127, lambda numbers: numbers.view(np.uint8), lambda data, count: data.view(np.int8)),
    "int4": _levels(7, _pack_nibbles, _unpack_nibbles),
    "sign": Format(_sign_size, _encode_sign, _decode_sign, is_biased=True),
}
"""Name -> pair; the names are those of ``link_settings.ValueFormat`` (a test compares them)."""
