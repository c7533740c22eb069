from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune import tensors
from silotune.errors import MessageError
from silotune.structs import Tensors

VALUES = st.floats(-100, 100, allow_nan=False, width=32)


def two(values: list[float]) -> Tensors:
    return {"b": torch.tensor(values[:4]).reshape(2, 2), "a": torch.tensor(values[4:])}


TENSORS = st.lists(VALUES, min_size=6, max_size=6).map(two)
ONE = {"w": torch.tensor([3.0, 4.0])}


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], atol=1e-4) for name in left)


@settings(max_examples=25, deadline=None)
@given(TENSORS, TENSORS)
def test_add_and_subtract_are_inverse_and_leave_inputs_alone(left: Tensors, right: Tensors) -> None:
    before = tensors.digest(left), tensors.digest(right)
    assert same(tensors.subtract(tensors.add(left, right), right), left)
    assert same(tensors.add_scaled(left, right, -1.0), tensors.subtract(left, right))
    assert same(tensors.add(left, tensors.zeros_like(left)), left)
    assert (tensors.digest(left), tensors.digest(right)) == before


@settings(max_examples=25, deadline=None)
@given(TENSORS)
def test_flatten_sorts_names_and_unflatten_undoes_it(value: Tensors) -> None:
    vector = tensors.flatten(value)
    assert torch.equal(vector, torch.cat([value["a"], value["b"].reshape(-1)]))
    again = tensors.unflatten(vector, value)
    assert list(again) == list(value)
    assert tensors.digest(again) == tensors.digest(value)


@settings(max_examples=25, deadline=None)
@given(TENSORS, st.floats(0.01, 500))
def test_clip_keeps_direction_and_bounds_the_norm(value: Tensors, bound: float) -> None:
    clipped = tensors.clip(value, bound)
    assert tensors.norm(clipped) <= bound * (1 + 1e-5) + 1e-6
    if tensors.norm(value) <= bound:
        assert tensors.digest(clipped) == tensors.digest(value)


def test_hand_computed_values() -> None:
    assert tensors.norm(ONE) == 5.0
    assert tensors.scale(ONE, 2.0)["w"].tolist() == [6.0, 8.0]
    assert tensors.add_scaled(ONE, ONE, 0.5)["w"].tolist() == [4.5, 6.0]
    assert tensors.clip(ONE, 1.0)["w"].tolist() == pytest.approx([0.6, 0.8])
    assert tensors.count(ONE) == 2
    assert tensors.num_bytes(ONE) == 8
    assert tensors.flatten({}).numel() == 0
    assert tensors.norm({}) == 0.0


def test_unflatten_restores_dtypes() -> None:
    like = {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(1)}
    result = tensors.unflatten(torch.tensor([1.0, 2.0, 3.0]), like)
    assert result["a"].dtype == torch.bfloat16
    assert result["b"].tolist() == [3.0]
    with pytest.raises(MessageError, match="has 2 values, expected 3"):
        tensors.unflatten(torch.zeros(2), like)


def test_clone_shares_no_memory_and_no_graph() -> None:
    source = {"w": torch.ones(2, requires_grad=True)}
    copy = tensors.clone(source)
    copy["w"].fill_(5.0)
    assert source["w"].tolist() == [1.0, 1.0]
    assert not copy["w"].requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite(bad: float) -> None:
    assert tensors.all_finite(ONE)
    assert not tensors.all_finite({**ONE, "x": torch.tensor([0.0, bad])})


def test_digest_depends_on_names_shapes_dtypes_and_bytes_but_not_on_order() -> None:
    base = {"a": torch.zeros(2), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(2, 1), "b": torch.ones(2)},
        {"a": torch.zeros(2, dtype=torch.float64), "b": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.tensor([1.0, 1.0000001])},
    ]
    assert tensors.digest(dict(reversed(base.items()))) == tensors.digest(base)
    assert len({tensors.digest(value) for value in [base, *others]}) == 5


@pytest.mark.parametrize("operation", [tensors.add, tensors.subtract, tensors.check_alike])
def test_operands_must_be_alike(operation: Callable[[Tensors, Tensors], object]) -> None:
    with pytest.raises(MessageError, match="'x' is on one side only"):
        operation(ONE, {**ONE, "x": torch.zeros(1)})
    with pytest.raises(MessageError, match=r"'w' has shape \(3,\), expected \(2,\)"):
        operation(ONE, {"w": torch.zeros(3)})
