"""Tensors packed into one buffer whose length the receiver knows, and opened again; what was left out is kept.

A packed message has one tensor, ``packed``, for all its floating-point tensors in the order of their names: the places
of the values that are sent, then the values. Whole numbers (masked sums, counters) travel beside it as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from silotune.errors import MessageError
from silotune.methods.compress.formats import FORMATS
from silotune.methods.compress.reductions import REDUCERS, Shapes
from silotune.settings.links import CompressionSection
from silotune.structs import Tensors
from silotune.tensors import add, all_finite, check_alike, largest, subtract

Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""As ``federation.messages.Layout``: tensor name -> (safetensors dtype, shape)."""

PACKED = "packed"
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def is_exact(settings: CompressionSection) -> bool:
    """Whether tensors travel as they are."""
    return settings.values == "float32" and _keeps_all(settings)


def is_biased(settings: CompressionSection) -> bool:
    """Whether what arrives is biased, so that what was left out must be sent later."""
    return not _keeps_all(settings) or FORMATS[settings.values].is_biased


def _keeps_all(settings: CompressionSection) -> bool:
    return settings.keep == "all" or (settings.keep == "top-k" and settings.share == 1)


def packed_layout(layout: Layout, settings: CompressionSection) -> Layout:
    """The exact layout of what ``pack`` makes of tensors with this layout, known before any byte of it has come."""
    names = _packed_names(layout, settings)
    if not names:
        return layout
    beside = {name: entry for name, entry in layout.items() if name not in names}
    places, values = _sizes([layout[name][1] for name in names], settings)
    return {PACKED: ("U8", (places + values,)), **beside}


def pack(tensors: Tensors, settings: CompressionSection, *, seed: int) -> Tensors:
    """The tensors as they are sent.

    Args:
        tensors: Any names and shapes; floating-point values are sent as float32 or narrower.
        settings: The link's section.
        seed: Of random rounding.

    Raises:
        MessageError: A value does not fit the format.
    """
    names = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())
    if is_exact(settings) or not names:
        return tensors
    plain = [tensors[name].detach().to("cpu", torch.float32) for name in names]
    values, places = REDUCERS[settings.keep].encode(plain, settings)
    generator = torch.Generator().manual_seed(seed)
    data = FORMATS[settings.values].encode(values, settings.block, generator)
    beside = {name: tensor for name, tensor in tensors.items() if name not in names}
    return {PACKED: torch.cat([places, data]), **beside}


def unpack(packed: Tensors, settings: CompressionSection, layout: Layout) -> Tensors:
    """Tensors of ``layout``, in its order, from what ``pack`` made of such.

    Raises:
        MessageError: The bytes are not such a message.
    """
    names = _packed_names(layout, settings)
    if not names:
        return packed
    shapes = [layout[name][1] for name in names]
    cut, size = _sizes(shapes, settings)
    data = packed[PACKED]
    if data.dtype != torch.uint8 or tuple(data.shape) != (cut + size,):
        raise MessageError(f"a compressed message has {tuple(data.shape)} bytes, expected {cut + size}")
    count, _ = REDUCERS[settings.keep].sizes(shapes, settings)
    values = FORMATS[settings.values].decode(data[cut:], count, settings.block)
    made = REDUCERS[settings.keep].decode(values, data[:cut], shapes, settings)
    opened = {name: tensor.to(FLOATS[layout[name][0]]) for name, tensor in zip(names, made, strict=True)}
    return {name: opened[name] if name in opened else packed[name] for name in layout}


def pack_update(
    update: Tensors, residual: Tensors, settings: CompressionSection, *, layout: Layout, seed: int
) -> tuple[Tensors, Tensors]:
    """An update as it is sent, and what of it was left out (error feedback: Seide et al. 2014, Stich et al. 2018).

    Args:
        update: What is meant.
        residual: What earlier rounds left out; empty where there is nothing.
        settings: The link's section.
        layout: Of ``update``.
        seed: Of random rounding.

    Returns:
        The packed update, and ``update + residual`` minus what the receiver will make of it; empty where the
        compression is exact or unbiased and needs no feedback.

    Raises:
        MessageError: A value does not fit the format, or the receiver would make values of it that are not finite.
    """
    if not is_biased(settings):
        return pack(update, settings, seed=seed), {}
    meant = update
    if residual:
        check_alike({name: update[name] for name in residual}, residual)
        meant = {**update, **add({name: update[name] for name in residual}, residual)}
    packed = pack(meant, settings, seed=seed)
    arrived = unpack(packed, settings, layout)
    names = _packed_names(layout, settings)
    left = subtract({name: meant[name] for name in names}, {name: arrived[name] for name in names})
    if not all_finite(left) and all_finite(meant):  # the factors share a scale with far larger values
        raise MessageError(
            f"an update of values up to {largest(meant):.0e} does not survive keep = {settings.keep!r} with "
            f"values = {settings.values!r}: lower training.learning_rate, or send wider values"
        )
    return packed, left


def lost_for_good(update: Tensors, packed: Tensors, settings: CompressionSection, *, layout: Layout) -> Tensors:
    """What of an update neither arrives nor is sent later, by unbiased rounding; empty where there is no such thing.

    Args:
        update: What was meant.
        packed: What ``pack_update`` made of it.
        settings: The link's section.
        layout: Of ``update``.
    """
    if is_exact(settings) or is_biased(settings):
        return {}
    return subtract(update, unpack(packed, settings, layout))


def _packed_names(layout: Layout, settings: CompressionSection) -> list[str]:
    return [] if is_exact(settings) else sorted(name for name, (dtype, _) in layout.items() if dtype in FLOATS)


def _sizes(shapes: Shapes, settings: CompressionSection) -> tuple[int, int]:
    """Bytes of the places and of the values."""
    count, places = REDUCERS[settings.keep].sizes(shapes, settings)
    return places, FORMATS[settings.values].size(count, settings.block)
