"""Attention over short texts: torch's numbers and gradients where it is made for that, torch's kernel elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from silotune.models.adapters import Adapted, attach, write
from silotune.models.fast import attention
from silotune.models.load import load_base
from silotune.settings.adapters import Lora
from silotune.settings.sections import ModelSection
from silotune.training.encode import Encoded
from silotune.training.scores import answer_losses, option_scores, sees_branches

GROUPED = ("llama", "mistral", "qwen2", "gemma", "gemma3", "phi")
CAUSAL = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def tensors(queries: int = 5, keys: int = 9, *, heads: int = 4, groups: int = 2, width: int = 16) -> list[torch.Tensor]:
    """Query, key and value of two examples, as layers hand them over: heads before lengths by a transposition."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((2, queries, heads, width), (2, keys, groups, width), (2, keys, groups, width))
    return [torch.randn(size, generator=draw).transpose(1, 2).requires_grad_() for size in sizes]


def slow(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale Q K' + mask) V with the keys of a group repeated for each of its heads [examples, queries, ...]."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    return (torch.softmax(query @ key.mT * scale + mask, -1) @ value).transpose(1, 2)


def compare(
    module: Any, given: list[torch.Tensor], mask: torch.Tensor | None, expected: torch.Tensor, **more: Any
) -> None:
    assert attention.is_short(*given, mask)
    made, weights = attention.attend(module, *given, mask, **more)
    by_hand = slow(*given, expected, more.get("scaling", given[0].shape[-1] ** -0.5))
    assert weights is None
    torch.testing.assert_close(made, by_hand, rtol=1e-5, atol=1e-5)
    along = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    for left, right in zip(
        torch.autograd.grad(made, given, along), torch.autograd.grad(by_hand, given, along), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (4, 4, 8), (6, 2, 8), (8, 1, 4), (4, 2, 64)])
def test_masks_of_every_kind_give_torchs_numbers_and_gradients(heads: int, groups: int, width: int) -> None:
    given = tensors(heads=heads, groups=groups, width=width)
    visible = torch.ones(2, 1, 5, 9, dtype=torch.bool).tril(4)
    visible[1, 0, :, 2] = False
    compare(CAUSAL, given, visible, additive(visible))
    compare(CAUSAL, given, additive(visible), additive(visible))
    compare(CAUSAL, given, visible[1:], additive(visible[1:]))
    compare(CAUSAL, given, additive(visible), additive(visible), scaling=0.5)
    square = tensors(9, 9, heads=heads, groups=groups, width=width)
    triangle = additive(torch.ones(9, 9, dtype=torch.bool).tril())
    compare(CAUSAL, square, None, triangle)
    compare(SimpleNamespace(), square, None, triangle)
    compare(CAUSAL, square, None, torch.zeros(9, 9), is_causal=False)
    compare(CAUSAL, tensors(1, 9, heads=heads, groups=groups, width=width), None, torch.zeros(1, 9))


def test_what_it_is_not_made_for_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    one_a_head = tensors(groups=4)
    long = tensors(2, attention.LONGEST + 1)
    wide = torch.zeros(2, 4, 5, 9)
    half = [each.detach().bfloat16().requires_grad_() for each in given]
    frozen = [each.detach() for each in given]
    assert attention.is_short(*given, None)
    for each, mask in ((one_a_head, None), (long, None), (given, wide), (half, None), (frozen, None)):
        assert not attention.is_short(*each, mask)
    with torch.no_grad():
        assert not attention.is_short(*given, None)
    monkeypatch.setattr(attention, "MOST_WEIGHTS", 2 * 4 * 5 * 9 - 1)
    assert not attention.is_short(*given, None)


def test_dropout_and_special_scores_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.sdpa_attention as own

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        own, "sdpa_attention_forward", lambda *tensors, **given: (seen.append(given), (tensors[1], None))[1]
    )
    for given in ({"dropout": 0.5}, {"position_bias": torch.zeros(1)}, {"softcap": 30.0}):
        attention.attend(CAUSAL, *tensors(), None, **given)
        assert seen.pop() == given
    attention.attend(CAUSAL, *tensors(), None, dropout=0.0, softcap=None)
    assert not seen


def adapted(name: str) -> Adapted:
    """A tiny model as `load_base` leaves one on the CPU, with an adapter as after training."""
    base = tiny.base(name)
    attention.use_for_short_texts(base.model)
    made = attach(base, Lora(rank=2, alpha=4, targets="all-linear"), seed=0)
    write(made, tiny.stir(tiny.read(made)))
    return made


@pytest.mark.parametrize("name", GROUPED)
def test_models_with_grouped_heads_learn_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = adapted(name), adapted(name)
    assert sees_branches(model.base.model, 20)
    own.base.model.set_attn_implementation("eager")
    calls: list[int] = []
    short = attention.ShortAttention.apply
    monkeypatch.setattr(attention.ShortAttention, "apply", lambda *given: calls.append(1) or short(*given))
    beginning = tuple(range(30, 44))
    given = [
        Encoded((*beginning, *range(60, 60 + length)), (50 + label, 2), ((50,), (51,), (52,)), label)
        for label, length in enumerate((9, 3, 6))
    ]
    labels = torch.arange(3)
    for loss in (
        lambda each: answer_losses(each, given)[0].mean(),
        lambda each: torch.nn.functional.cross_entropy(option_scores(each, given), labels),
    ):
        expected, made = loss(own), loss(model)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
        tiny.assert_close(tiny.gradients(model, made), tiny.gradients(own, expected), 1e-5)
    assert calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "llama")


def section(folder: Path, **more: Any) -> ModelSection:
    return ModelSection(name=str(folder), max_length=64, device="cpu", **more)


def test_a_base_on_the_cpu_gets_it_unless_another_is_asked_for(folder: Path) -> None:
    assert load_base(section(folder)).model.config._attn_implementation == attention.NAME
    for asked in ("sdpa", "eager"):
        assert load_base(section(folder, attention=asked)).model.config._attn_implementation == asked


def test_a_saved_model_knows_nothing_of_it_and_generates_as_before(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = load_base(section(folder))
    base.model.save_pretrained(tmp_path / "again")
    assert attention.NAME not in (tmp_path / "again" / "config.json").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.tensor([[5, 60, 70, 80]])
    assert again.config._attn_implementation == "sdpa"
    made = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True) for model in (base.model, again)]
    assert torch.equal(*made)
