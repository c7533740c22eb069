"""The last layer at needed positions only: the numbers of the whole layer, and no more of its work than is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from silotune.models import lora_layers
from silotune.models.adapters import Adapted
from silotune.models.fast.last_layer import last_layer, needed_only
from silotune.training.batches import Batch
from silotune.training.encode import Encoded
from silotune.training.scores import answer_losses, logits_at, option_scores

INSTRUCTION = tuple(range(30, 44))


def examples(lengths: Sequence[int] = (12, 20, 9), *, instruction: tuple[int, ...] = ()) -> list[Encoded]:
    """Long prompts and short answers of one to three ids."""
    made = []
    for number, length in enumerate(lengths):
        own = (10 + (number * 7 + place * 13) % 290 for place in range(length))
        made.append(Encoded((*instruction, *own), (50, 51, 52)[: (2, 0, 1)[number % 3]] + (2,)))
    return made


def positions_through(model: Adapted, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions go through the last layer's MLP from now on, a call each."""
    layer: Any = last_layer(model.base.model)
    forward, seen = layer.mlp.forward, []
    monkeypatch.setattr(
        layer.mlp, "forward", lambda hidden: seen.append(hidden.numel() // hidden.shape[-1]) or forward(hidden)
    )
    return seen


def compare(model: Adapted, given: list[Encoded], *, packed: bool = False) -> None:
    """Losses and gradients of the fast way against one sequence at a time."""
    slow = torch.cat([-tiny.log_probabilities(model, example.prompt, example.answer) for example in given])
    expected = tiny.gradients(model, slow.mean())
    fast, owner = answer_losses(model, given, packed=packed)
    torch.testing.assert_close(fast[owner.argsort(stable=True)], slow, rtol=1e-5, atol=1e-5)
    tiny.assert_close(tiny.gradients(model, fast.mean()), expected, 1e-5)
    assert any(bool(value.abs().max() > 1e-3) for value in expected.values())


@pytest.mark.parametrize("instruction", [(), INSTRUCTION], ids=["apart", "shared beginning"])
@pytest.mark.parametrize(
    ("name", "positions"), [*((name, 3 * 3) for name in tiny.ARCHITECTURES), *((name, 0) for name in tiny.WINDOWED)]
)
def test_every_architecture_gives_the_numbers_of_the_whole_layer(
    name: str, positions: int, instruction: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of at most three ids to learn; of a beginning keys and values alone. Short windows keep all of it."""
    model = tiny.adapted(name, targets="all-linear")
    given = examples(instruction=instruction)
    compare(model, given)
    seen = positions_through(model, monkeypatch)
    answer_losses(model, given)
    assert seen == [positions or 3 * (len(instruction) + 20)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_with_eager_attention(name: str) -> None:
    model = tiny.adapted(name, attention="eager", targets="all-linear")
    compare(model, examples())
    compare(model, examples(instruction=INSTRUCTION))


def test_with_other_adapters_with_none_and_with_a_residual() -> None:
    for section in ({"type": "ia3"}, {"type": "lora", "dora": True, "targets": "all-linear"}, {"type": "none"}):
        compare(tiny.adapted(stirred=section["type"] != "none", **section), examples(instruction=INSTRUCTION))
    model = tiny.adapted(targets="all-linear")
    modules = [name.removesuffix(".lora_A.weight") for name in tiny.read(model) if name.endswith(".lora_A.weight")]
    draw = torch.Generator().manual_seed(0)
    pairs = {}
    for name in modules:
        layer: Any = model.model.get_submodule(name)
        sizes = (layer.out_features, 1), (1, layer.in_features)
        pairs[name] = (torch.randn(sizes[0], generator=draw) / 9, torch.randn(sizes[1], generator=draw) / 9)
    lora_layers.set_residuals(model.model, pairs)
    compare(model, examples(instruction=INSTRUCTION))


def test_packed_rows_have_their_positions_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted(targets="all-linear")
    given = examples((9, 24, 8, 10))
    compare(model, given, packed=True)
    seen = positions_through(model, monkeypatch)
    answer_losses(model, given, packed=True)
    assert len(seen) == 1
    assert seen[0] < sum(example.length for example in given) / 2


def test_options_that_begin_at_one_position_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted()
    options = ((50,), (51,), (52,))
    given = [replace(example, options=options, label=0) for example in examples((12, 20, 15))]
    slow = torch.stack(
        [
            torch.stack([tiny.log_probabilities(model, example.prompt, option).sum() for option in options])
            for example in given
        ]
    )
    seen = positions_through(model, monkeypatch)
    torch.testing.assert_close(option_scores(model, given), slow, rtol=1e-5, atol=1e-5)
    assert seen == [3]


def test_more_than_half_of_a_row_is_worth_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted()
    seen = positions_through(model, monkeypatch)
    answer_losses(model, [Encoded((9, 8), (50, 51, 52, 2))])
    assert seen == [5]


def test_what_draws_checkpoints_or_keeps_rows_apart_has_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, checkpointed = tiny.adapted(dropout=0.1), tiny.adapted()
    drawing.model.train()
    checkpointed.base.model.activation_checkpointing_enable()
    apart = replace(tiny.adapted(), keeps_rows_apart=True)
    for model in (drawing, checkpointed, apart):
        seen = positions_through(model, monkeypatch)
        answer_losses(model, examples())
        assert seen == [3 * 20]


def test_the_layer_is_as_before_whatever_happens_within() -> None:
    model = tiny.adapted()
    layer = last_layer(model.base.model)
    assert layer is not None
    before = layer.forward
    with pytest.raises(ZeroDivisionError), needed_only(layer, torch.tensor([3]), torch.Size([1, 9])):
        assert layer.forward != before
        raise ZeroDivisionError
    assert layer.forward == before
    held = vars(layer)["forward"] = before  # as accelerate's hooks hold it
    with needed_only(layer, torch.tensor([3]), torch.Size([1, 9])):
        assert vars(layer)["forward"] is not held
    assert vars(layer)["forward"] is held


def test_a_layer_that_asks_no_cache_does_all_of_its_work() -> None:
    class Plain(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
            return hidden_states * 2

    layer, hidden = Plain(), torch.randn(2, 8, 4)
    with needed_only(layer, torch.tensor([3]), hidden.shape[:2]):
        assert torch.equal(layer(hidden), hidden * 2)


def test_other_positions_are_zero_and_needed_ones_right() -> None:
    model = tiny.adapted()
    layer, ids = last_layer(model.base.model), torch.arange(40, 58).view(2, 9)
    assert layer is not None
    made: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, given, output: made.append(output))
    needed = torch.tensor([17, 4, 4, 10])
    with torch.no_grad():
        model.model(input_ids=ids)
        with needed_only(layer, needed, ids.shape):
            model.model(input_ids=ids)
    handle.remove()
    whole, part = (each.flatten(0, 1) for each in made)
    torch.testing.assert_close(part[needed], whole[needed], rtol=1e-5, atol=1e-5)
    others = [place for place in range(18) if place not in needed.tolist()]
    assert not part[others].any()


def test_layers_that_borrow_keys_or_cannot_be_told_are_left_alone() -> None:
    model = tiny.model("llama")
    assert last_layer(model) is model.model.layers[-1]
    model.config.num_kv_shared_layers = 1
    assert last_layer(model) is None
    assert last_layer(tiny.model("bloom")) is not None, "it takes a cache; alibi is what keeps it out"


def test_logits_need_no_position_at_all() -> None:
    model = tiny.adapted()
    empty = Batch(torch.tensor([[5, 6, 7]]), torch.empty(0, dtype=torch.long))
    assert logits_at(model, empty).shape == (0, 320)
