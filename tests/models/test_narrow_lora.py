"""LoRA as one product on narrow layers: peft's numbers and gradients, and peft's own way where it is not made for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear

import tiny
from silotune.models.adapters import Adapted, frozen, merged, replicate
from silotune.models.fast import narrow_lora
from silotune.models.fast.narrow_lora import MergedLinear, NarrowLora, is_worth_it
from silotune.training.encode import Encoded
from silotune.training.scores import answer_losses

EXAMPLES = [Encoded(tuple(range(20 + number, 36 + 2 * number)), (50 + number, 2), (), 0) for number in range(4)]


def drawn(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw, dtype=dtype).requires_grad_() for size in sizes]


def adapted(name: str = "llama", **section: Any) -> Adapted:
    return tiny.adapted(name, targets="all-linear", **section)


def as_peft(model: Adapted) -> Adapted:
    """The same model in peft's own layers."""
    for module in model.model.modules():
        if isinstance(module, NarrowLora):
            module.__class__ = Linear
    return model


def layer(model: Adapted, place: str = "q_proj") -> Any:
    return next(module for name, module in model.model.named_modules() if name.endswith(place))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each layer that takes the short way."""
    calls: list[int] = []
    apply = MergedLinear.apply
    monkeypatch.setattr(MergedLinear, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


def test_gradients_and_gradients_of_gradients_are_those_of_the_sum() -> None:
    x, weight, a, b = drawn((3, 4, 5), (6, 5), (2, 5), (6, 2), dtype=torch.float64)
    weight.requires_grad_(False)
    torch.testing.assert_close(MergedLinear.apply(x, weight, a, b, 0.7), x @ weight.mT + 0.7 * (x @ a.mT @ b.mT))
    assert torch.autograd.gradcheck(lambda *given: MergedLinear.apply(given[0], weight, *given[1:], 0.7), (x, a, b))
    assert torch.autograd.gradgradcheck(lambda *given: MergedLinear.apply(given[0], weight, *given[1:], 0.7), (x, a, b))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt_neox", "phi"])
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_models_learn_the_same_with_and_without_it(name: str, options: dict, products: list[int]) -> None:
    own, theirs = adapted(name, **options), as_peft(adapted(name, **options))
    losses = [answer_losses(model, EXAMPLES)[0].mean() for model in (own, theirs)]
    layers = sum(isinstance(module, NarrowLora) for module in own.model.modules())
    assert len(products) > layers / 2 > 3  # of the last layer only a few positions are needed
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(own, losses[0]), tiny.gradients(theirs, losses[1]), 1e-5)


def test_one_factor_can_rest() -> None:
    own, theirs = adapted(), as_peft(adapted())
    for ending in ("lora_A.weight", "lora_B.weight"):
        names = [name for name in own.parameters if name.endswith(ending)]
        with frozen(own, names), frozen(theirs, names):
            for model in (own, theirs):
                answer_losses(model, EXAMPLES)[0].mean().backward()
        for name, parameter in own.parameters.items():
            if name in names:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, theirs.parameters[name].grad, rtol=1e-5, atol=1e-5)
        for model in (own, theirs):
            model.model.zero_grad(set_to_none=True)


def test_nothing_but_what_was_given_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []
    x, weight, a, b = drawn((64, 8), (8, 8), (2, 8), (8, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        MergedLinear.apply(x, weight, a, b, 1.0)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, weight, a, b)}


def _dropping(model: Adapted) -> None:
    layer(model).lora_dropout["default"] = torch.nn.Dropout(0.5)
    model.model.train()


def _second(model: Adapted) -> None:
    layer(model).update_layer("other", r=2, lora_alpha=4, config=model.model.peft_config["default"])
    layer(model).set_adapter(["default", "other"])


NOT_MADE_FOR: dict[str, Callable[[Adapted], object]] = {
    "dropout at work": _dropping,
    "two adapters": _second,
    "switched off": lambda model: layer(model).enable_adapters(False),
    "merged": lambda model: layer(model).merge(),
    "a watched factor": lambda model: layer(model).lora_A["default"].register_forward_hook(lambda *given: None),
    "a factor watched backward": lambda model: (
        layer(model).lora_B["default"].register_full_backward_hook(lambda *given: None)
    ),
    "none at work": lambda model: layer(model).delete_adapter("default"),
    "a watched base": lambda model: layer(model).base_layer.register_forward_pre_hook(lambda *given: None),
    "another type": lambda model: layer(model).to(torch.bfloat16),
}


@pytest.mark.parametrize("case", NOT_MADE_FOR)
def test_the_rest_is_peft_s(case: str, products: list[int]) -> None:
    model = adapted()
    NOT_MADE_FOR[case](model)
    own = layer(model)
    x = drawn((64, 32))[0].to(own.base_layer.weight.dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = own(x)
    assert not products
    own.__class__ = Linear
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(made, own(x))


def test_autocast_and_a_few_rows_are_peft_s(products: list[int]) -> None:
    own = layer(adapted())
    (x,) = drawn((64, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own(x).dtype == torch.bfloat16
    own(x[:15])
    assert not products
    own(x[:16])  # eight for each of two ranks
    assert products


def test_worth_it_up_to_a_width_and_from_a_number_of_rows() -> None:
    assert is_worth_it(512, narrow_lora.MOST_VALUES, 8) and not is_worth_it(10**6, narrow_lora.MOST_VALUES + 1, 8)
    assert is_worth_it(64, 64 * 64, 8) and not is_worth_it(63, 64 * 64, 8)
    assert is_worth_it(171, 128 * 128, 8) and not is_worth_it(170, 128 * 128, 8)


@pytest.mark.parametrize(
    ("name", "section"),
    [("gpt2", {}), ("llama", {"dora": True}), ("llama", {"type": "ia3", "targets": "auto"})],
)
def test_layers_that_are_no_plain_linear_lora_stay_as_they_are(
    name: str, section: dict[str, Any], products: list[int]
) -> None:
    model = tiny.adapted(name, **{"targets": "all-linear", **section})
    answer_losses(model, EXAMPLES)[0].mean().backward()
    assert not products


def test_a_layer_whose_base_is_trained_too_or_whose_factor_has_a_bias_stays_as_it_is() -> None:
    trained, biased = as_peft(adapted()), as_peft(adapted())
    layer(trained).base_layer.weight.requires_grad_(True)
    layer(biased).lora_B["default"].bias = torch.nn.Parameter(torch.zeros(32))
    for model in (trained, biased):
        narrow_lora.use_for_narrow_layers(model.model)
        assert [type(layer(model, place)) for place in ("q_proj", "down_proj")] == [Linear, NarrowLora]


def test_wide_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_lora, "MOST_VALUES", 32 * 32)
    model = adapted()
    assert [type(layer(model, place)) for place in ("q_proj", "down_proj")] == [NarrowLora, Linear]


@pytest.mark.parametrize("copied", [replicate, copy.deepcopy])
def test_a_copy_has_factors_of_its_own(copied: Callable[[Adapted], Adapted]) -> None:
    model = adapted()
    other = copied(model)
    answer_losses(other, EXAMPLES)[0].mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters.values())
    assert all(parameter.grad is not None for parameter in layer(other).lora_A.parameters())


def test_merging_leaves_plain_layers() -> None:
    plain = merged(adapted())
    assert {type(module) for name, module in plain.named_modules() if name.endswith("_proj")} == {torch.nn.Linear}
