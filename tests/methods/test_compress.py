"""Compression: identities, numbers by hand, bounds of the quantisers, error feedback, and what a receiver refuses."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from silotune.errors import MessageError
from silotune.federation.wire.messages import layout_of
from silotune.methods.compress.formats import FORMATS
from silotune.methods.compress.pack import (
    PACKED,
    is_biased,
    is_exact,
    pack,
    pack_update,
    packed_layout,
    unpack,
)
from silotune.methods.compress.reductions import REDUCERS, decode_places, encode_places, places_bytes
from silotune.settings.links import CompressionSection, Reduction, ValueFormat

few = settings(max_examples=20, deadline=None)
shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)
links = st.builds(
    CompressionSection,
    keep=st.sampled_from(get_args(Reduction)),
    values=st.sampled_from([name for name in get_args(ValueFormat) if name != "float16"]),
    share=st.floats(0.01, 1.0),
    rank=st.integers(1, 3),
    block=st.integers(1, 9),
)


def made(found: list[tuple[int, ...]], seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {f"t{place}": size * torch.randn(shape, generator=noise) for place, shape in enumerate(found)}


def there_and_back(tensors: dict[str, torch.Tensor], link: CompressionSection, seed: int = 0):
    return unpack(pack(tensors, link, seed=seed), link, layout_of(tensors))


def test_tables_and_names_agree() -> None:
    assert set(FORMATS) == set(get_args(ValueFormat)) and set(REDUCERS) == set(get_args(Reduction))


@few
@given(shapes, st.integers(0, 99))
def test_everything_kept_in_float32_is_the_identity(found, seed: int) -> None:
    tensors = made(found, seed)
    for link in (
        CompressionSection(),
        CompressionSection(keep="top-k", share=1.0),
        CompressionSection(keep="low-rank", rank=100),
    ):
        tiny.assert_same_bits(there_and_back(tensors, link), tensors)
    assert pack(tensors, CompressionSection(keep="top-k", share=1.0), seed=0) is tensors


@few
@given(shapes, links, st.integers(0, 99))
def test_the_receiver_knows_the_layout_beforehand(found, link: CompressionSection, seed: int) -> None:
    tensors = made(found, seed)
    packed = pack(tensors, link, seed=seed)
    assert layout_of(packed) == packed_layout(layout_of(tensors), link)
    assert layout_of(unpack(packed, link, layout_of(tensors))) == layout_of(tensors)


@few
@given(shapes, links, st.integers(0, 99), st.sampled_from([1e-20, 1.0, 1e20]))
def test_what_was_sent_and_what_is_left_are_what_was_meant(found, link, seed: int, size: float) -> None:
    update, residual = made(found, seed, size), made(found, seed + 100, size)
    kept = residual if is_biased(link) else {}
    try:
        packed, left = pack_update(update, kept, link, layout=layout_of(update), seed=seed)
    except MessageError:  # the product of two coarse factors
        assert size == 1e20 and link.keep == "low-rank"
        return
    if not is_biased(link):
        assert left == {}
        return
    arrived = unpack(packed, link, layout_of(update))
    for name, tensor in update.items():
        meant = tensor + residual[name]
        rounding = 1e-6 * max(float(meant.abs().max()), float(arrived[name].abs().max()))
        torch.testing.assert_close(arrived[name] + left[name], meant, rtol=1e-5, atol=rounding)
        assert torch.equal(left[name], meant - arrived[name])


def test_an_update_that_would_arrive_as_infinite_is_not_sent() -> None:
    link = CompressionSection(keep="low-rank", values="sign", rank=1, block=4)
    update = made([(1,), (2, 3)], 0, 1e20)
    with pytest.raises(MessageError, match=r"up to 2e\+20 does not survive keep = 'low-rank' with values = 'sign'"):
        pack_update(update, {}, link, layout=layout_of(update), seed=0)


@few
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["int8", "int4"]))
def test_a_decoded_value_lies_within_a_step_and_on_the_right_side_of_the_largest(count, block, seed, name) -> None:
    vector = made([(count,)], seed)["t0"]
    link = CompressionSection(values=name, block=block)
    arrived = there_and_back({"a": vector}, link, seed)["a"]
    largest = {"int8": 127, "int4": 7}[name]
    for start in range(0, count, block):
        part, back = vector[start : start + block], arrived[start : start + block]
        step = float(part.abs().max()) / largest * (1 + 2**-7)  # the scale is rounded up to bfloat16
        assert float((part - back).abs().max()) <= step
        assert float(back.abs().max()) <= step * largest


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_random_rounding_has_no_bias(name: str) -> None:
    vector = made([(32,)], 5)["t0"]
    draws = 4000
    arrived = there_and_back({"a": vector.repeat(draws)}, CompressionSection(values=name, block=32))["a"]
    mean = arrived.double().reshape(draws, 32).mean(dim=0)
    step = float(vector.abs().max()) / {"int8": 127, "int4": 7}[name]
    assert float((mean - vector).abs().max()) < 5 * step / 2 / math.sqrt(draws)  # 5 standard errors at the widest


def test_known_numbers() -> None:
    tensors = {"a": torch.tensor([7.0, -7.0, 0.0, 1.0, 14.0, 0.0])}
    assert there_and_back(tensors, CompressionSection(values="int4", block=4))["a"].tolist() == [7, -7, 0, 1, 14, 0]
    assert pack(tensors, CompressionSection(values="int4", block=4), seed=0)[PACKED].tolist() == [
        0x80, 0x3F, 0x00, 0x40,  # scales 1 and 2 in bfloat16
        0x1F, 0x98, 0x8F,  # 7 and -7, 0 and 1, 7 and 0, each plus 8
    ]  # fmt: skip
    signs = there_and_back({"a": torch.tensor([3.0, -1.0, 2.0, -6.0, 0.5])}, CompressionSection(values="sign", block=4))
    assert signs["a"].tolist() == [3.0, -3.0, 3.0, -3.0, 0.5]
    top = there_and_back(tensors, CompressionSection(keep="top-k", share=0.5))
    assert top["a"].tolist() == [7, -7, 0, 0, 14, 0]
    assert there_and_back({"a": torch.tensor([1.0 + 2**-9])}, CompressionSection(values="bfloat16"))["a"].item() == 1
    matrix = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 2.0, 0.5]))
    low = CompressionSection(keep="low-rank", rank=1)
    assert layout_of(pack({"a": matrix}, low, seed=0)) == {PACKED: ("U8", (4 * 7,))}
    tiny.assert_close(there_and_back({"a": matrix}, low), {"a": matrix}, 1e-6)


def test_top_k_takes_the_largest_over_all_tensors() -> None:
    tensors = {"b": torch.tensor([[9.0, 1.0]]), "a": torch.tensor([-8.0, 2.0])}
    arrived = there_and_back(tensors, CompressionSection(keep="top-k", share=0.5))
    assert list(arrived) == ["b", "a"]
    assert arrived["b"].tolist() == [[9.0, 0.0]] and arrived["a"].tolist() == [-8.0, 0.0]


@few
@given(st.data(), st.integers(1, 300))
def test_places_come_back(data, total: int) -> None:
    kept = data.draw(st.integers(1, total))
    places = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=kept, max_size=kept))))
    code = encode_places(places, total)
    assert code.size == places_bytes(kept, total)
    assert decode_places(code, kept, total).tolist() == places.tolist()
    assert code.size <= kept * (2 + math.log2(total / kept)) / 8 + 2


@few
@given(st.binary(min_size=places_bytes(7, 100), max_size=places_bytes(7, 100)))
def test_any_bytes_are_places_or_an_error(code: bytes) -> None:
    try:
        places = decode_places(np.frombuffer(code, dtype=np.uint8), 7, 100)
    except MessageError:
        return
    assert len(places) == 7 and (np.diff(places) > 0).all() and places[0] >= 0 and places[-1] < 100


def test_what_is_no_number_of_the_reals_travels_as_it_is() -> None:
    tensors = {"a": torch.full((4,), 127.0, dtype=torch.float64), "masked": torch.arange(3, dtype=torch.int32)}
    link = CompressionSection(values="int8")
    packed = pack(tensors, link, seed=0)
    assert packed.keys() == {PACKED, "masked"} and packed["masked"] is tensors["masked"]
    tiny.assert_same_bits(unpack(packed, link, layout_of(tensors)), tensors)
    only = {"masked": tensors["masked"]}
    assert pack(only, link, seed=0) is only and packed_layout(layout_of(only), link) == layout_of(only)


def test_what_is_refused() -> None:
    layout = layout_of({"a": torch.zeros(6)})
    with pytest.raises(MessageError, match=r"has \(9,\) bytes, expected 8"):
        unpack({PACKED: torch.zeros(9, dtype=torch.uint8)}, CompressionSection(values="int8"), layout)
    with pytest.raises(MessageError, match="bfloat16"):
        pack({"a": torch.tensor([1e6])}, CompressionSection(values="float16"), seed=0)
    with pytest.raises(MessageError, match="has shape"):
        link = CompressionSection(values="sign")
        pack_update({"a": torch.zeros(6)}, {"a": torch.zeros(5)}, link, layout=layout, seed=0)


def test_rounding_follows_the_seed() -> None:
    tensors, link = made([(50,)], 1), CompressionSection(values="int4")
    first, again, other = (pack(tensors, link, seed=seed)[PACKED] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_which_links_are_exact_and_which_need_feedback() -> None:
    assert is_exact(CompressionSection(zstd=3)) and is_exact(CompressionSection(keep="top-k", share=1))
    assert not is_exact(CompressionSection(values="bfloat16")) and not is_biased(CompressionSection(values="int4"))
    assert is_biased(CompressionSection(values="sign")) and is_biased(CompressionSection(keep="low-rank"))


def test_error_feedback_delivers_everything_in_time() -> None:
    link = CompressionSection(keep="top-k", share=0.2, values="sign")
    update, residual, arrived = made([(40,)], 3), {}, torch.zeros(40)
    for number in range(60):
        packed, residual = pack_update(update, residual, link, layout=layout_of(update), seed=number)
        arrived += unpack(packed, link, layout_of(update))["t0"]
    torch.testing.assert_close(arrived + residual["t0"], 60 * update["t0"], rtol=1e-4, atol=1e-4)
    assert float((arrived / 60 - update["t0"]).norm() / update["t0"].norm()) < 0.15
