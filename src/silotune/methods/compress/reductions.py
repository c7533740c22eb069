"""Which values of an update are sent: all, the largest, or the factors of a low-rank approximation.

``top-k`` keeps the values of largest magnitude over all tensors together (Aji and Heafield 2017; with error feedback
Stich et al. 2018) and says where they stand in Elias-Fano code (Vigna 2013): about log2(values / kept) + 2 bits each,
and a length that follows from the two counts alone, so that a receiver knows it beforehand. ``low-rank`` sends a
truncated singular value decomposition of every matrix (as PowerSGD does, Vogels et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from silotune.errors import MessageError
from silotune.settings.links import CompressionSection, Reduction

Shapes: TypeAlias = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Reducer:
    """One pair of encoder and decoder.

    Attributes:
        sizes: (shapes, settings) to the number of values that are sent, and of bytes that say where they belong.
        encode: (tensors float32, settings) to these values [values] and bytes [bytes].
        decode: (values, bytes, shapes, settings) to tensors of these shapes.
    """

    sizes: Callable[[Shapes, CompressionSection], tuple[int, int]]
    encode: Callable[[Sequence[torch.Tensor], CompressionSection], tuple[torch.Tensor, torch.Tensor]]
    decode: Callable[[torch.Tensor, torch.Tensor, Shapes, CompressionSection], list[torch.Tensor]]


def _all_sizes(shapes: Shapes, settings: CompressionSection) -> tuple[int, int]:
    return sum(map(math.prod, shapes)), 0


def _encode_all(tensors: Sequence[torch.Tensor], settings: CompressionSection) -> tuple[torch.Tensor, torch.Tensor]:
    return _flat(tensors), torch.zeros(0, dtype=torch.uint8)


def _decode_all(
    values: torch.Tensor, places: torch.Tensor, shapes: Shapes, settings: CompressionSection
) -> list[torch.Tensor]:
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _kept(total: int, share: float) -> int:
    return min(total, math.ceil(round(total * share, 6)))


def _top_sizes(shapes: Shapes, settings: CompressionSection) -> tuple[int, int]:
    total = sum(map(math.prod, shapes))
    kept = _kept(total, settings.share)
    return kept, 0 if kept == total else places_bytes(kept, total)


def _encode_top(tensors: Sequence[torch.Tensor], settings: CompressionSection) -> tuple[torch.Tensor, torch.Tensor]:
    vector = _flat(tensors)
    kept = _kept(vector.numel(), settings.share)
    if kept == vector.numel():
        return vector, torch.zeros(0, dtype=torch.uint8)
    places = vector.abs().topk(kept, sorted=False).indices.sort().values
    return vector[places], torch.from_numpy(encode_places(places.numpy(), vector.numel()))


def _decode_top(
    values: torch.Tensor, places: torch.Tensor, shapes: Shapes, settings: CompressionSection
) -> list[torch.Tensor]:
    total = sum(map(math.prod, shapes))
    if values.numel() < total:
        whole = torch.zeros(total)
        whole[torch.from_numpy(decode_places(places.numpy(), values.numel(), total))] = values
        values = whole
    return _decode_all(values, places, shapes, settings)


def _low_bits(kept: int, total: int) -> int:
    return (total // kept).bit_length() - 1


def places_bytes(kept: int, total: int) -> int:
    """Bytes of ``kept`` places below ``total`` in Elias-Fano code."""
    low = _low_bits(kept, total)
    return -(-kept * low // 8) + -(-(kept + ((total - 1) >> low) + 1) // 8)


def encode_places(places: np.ndarray, total: int) -> np.ndarray:
    """Ascending places below ``total`` as bytes: their low bits, then their high bits in unary."""
    low = _low_bits(places.size, total)
    bits = (places[:, None] >> np.arange(low)) & 1  # [kept, low]
    marks = np.zeros(places.size + ((total - 1) >> low) + 1, dtype=np.uint8)
    marks[(places >> low) + np.arange(places.size)] = 1
    packed = [np.packbits(part, bitorder="little") for part in (bits.astype(np.uint8).reshape(-1), marks)]
    return np.concatenate(packed)


def decode_places(data: np.ndarray, kept: int, total: int) -> np.ndarray:
    """The inverse of ``encode_places``.

    Raises:
        MessageError: The bytes do not name ``kept`` ascending places below ``total``.
    """
    low = _low_bits(kept, total)
    cut = -(-kept * low // 8)
    bits = np.unpackbits(data[:cut], count=kept * low, bitorder="little").reshape(kept, low).astype(np.int64)
    marks = np.unpackbits(data[cut:], count=kept + ((total - 1) >> low) + 1, bitorder="little")
    found = np.flatnonzero(marks)
    if found.size != kept:
        raise MessageError(f"a compressed message names {found.size} places, expected {kept}")
    places: np.ndarray = ((found - np.arange(kept)) << low) + (bits << np.arange(low)).sum(axis=1)
    if places[-1] >= total or bool((np.diff(places) <= 0).any()):
        raise MessageError("a compressed message names places that do not ascend or do not exist")
    return places


def _factored(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """Rows and columns of a tensor whose factors are smaller than the tensor; None for one that is sent as it is."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if rank * (rows + columns) < rows * columns else None


def _low_rank_sizes(shapes: Shapes, settings: CompressionSection) -> tuple[int, int]:
    return sum(sum(_parts(shape, settings.rank)) for shape in shapes), 0


def _parts(shape: tuple[int, ...], rank: int) -> list[int]:
    """Values of the left and the right factor, or of the tensor itself."""
    matrix = _factored(shape, rank)
    return [math.prod(shape)] if matrix is None else [rank * matrix[0], rank * matrix[1]]


def _encode_low_rank(
    tensors: Sequence[torch.Tensor], settings: CompressionSection
) -> tuple[torch.Tensor, torch.Tensor]:
    parts: list[torch.Tensor] = []
    for tensor in tensors:
        matrix = _factored(tuple(tensor.shape), settings.rank)
        if matrix is None:
            parts.append(tensor)
            continue
        left, sizes, right = torch.linalg.svd(tensor.reshape(matrix), full_matrices=False)
        root = sizes[: settings.rank].sqrt()  # half the size in each factor, so that one scale suits both
        parts += [left[:, : settings.rank] * root, root[:, None] * right[: settings.rank]]
    return _flat(parts), torch.zeros(0, dtype=torch.uint8)


def _decode_low_rank(
    values: torch.Tensor, places: torch.Tensor, shapes: Shapes, settings: CompressionSection
) -> list[torch.Tensor]:
    parts = iter(values.split([size for shape in shapes for size in _parts(shape, settings.rank)]))
    made = []
    for shape in shapes:
        if _factored(shape, settings.rank) is None:
            made.append(next(parts).reshape(shape))
        else:
            left, right = next(parts).reshape(-1, settings.rank), next(parts).reshape(settings.rank, -1)
            made.append((left @ right).reshape(shape))
    return made


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


REDUCERS: Mapping[Reduction, Reducer] = {
    "all": Reducer(_all_sizes, _encode_all, _decode_all),
    "top-k": Reducer(_top_sizes, _encode_top, _decode_top),
    "low-rank": Reducer(_low_rank_sizes, _encode_low_rank, _decode_low_rank),
}
"""Name -> pair; the names are those of ``link_settings.Reduction`` (a test compares them)."""
