"""The cut of a model: the parts together are the whole, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from silotune.errors import ModelError
from silotune.models.adapters import Adapted, attach, on, read, write
from silotune.models.elsewhere import Form, Turn, row_lengths
from silotune.models.split import FAMILIES, client_part, cut_of, server_part, shares_of
from silotune.settings.objectives import OBJECTIVES
from silotune.settings.split import SplitSection
from silotune.structs import Tensors
from silotune.training.middle import Middle, joined

NAMES = (
    "llama", "mistral", "mistral-window", "qwen2", "qwen3", "gemma", "gemma2", "gemma2-window", "gemma3",
    "gemma3-window", "gpt2", "gpt_neox", "phi", "phi3", "stablelm", "glm", "glm4", "cohere", "granite", "starcoder2",
    "olmo2", "smollm3",
)  # fmt: skip


class Direct:
    """Hands tensors to the server's part as they are."""

    def __init__(self, middle: Middle) -> None:
        self.middle = middle
        self.crossed: list[int] = []

    def forward(self, turn: Turn, states: torch.Tensor, form: Form) -> torch.Tensor:
        self.crossed.append(len(states))
        return self.middle.forward(states, form)

    def backward(self, turn: Turn, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        self.crossed.append(len(gradient))
        return self.middle.backward(gradient, is_wanted=is_wanted)

    def step(self, turn: Turn, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        raise AssertionError("no step is taken here")


def deep(name: str, *, blocks: int = 5, targets: Any = "all-linear", tied: bool | None = None) -> Adapted:
    """A tiny model of more blocks, with an adapter in all of them."""
    import transformers

    config = tiny.configuration(name)
    named = "n_layer" if name == "gpt2" else "num_hidden_layers"
    document = {**config.to_dict(), named: blocks, **({} if tied is None else {"tie_word_embeddings": tied})}
    by_block = ("layer_types", "no_rope_layers")  # made anew for so many blocks
    config = type(config).from_dict({key: document[key] for key in document if key not in by_block})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = transformers.AutoModelForCausalLM.from_config(config)
    made.requires_grad_(False)
    made.config.use_cache = False
    base = replace(tiny.base("llama"), model=made.eval(), name=name)
    adapted = on(attach(base, tiny.adapter(targets=targets), seed=0), replace(tiny.USUAL, prefix=False))
    write(adapted, tiny.stir(read(adapted)))
    return adapted


def parts(whole: Adapted, **section: Any) -> tuple[Adapted, Middle]:
    """Client and server of a model."""
    cut = SplitSection(**section)
    middle = Middle(server_part(whole, cut))
    return client_part(whole, cut, Direct(middle)), middle


def trained(adapted: Adapted, name: str, examples: Sequence[Any]) -> tuple[torch.Tensor, Tensors]:
    """A training step's loss, and the gradients."""
    adapted.model.train()
    loss = tiny.loss(name, adapted, examples, OBJECTIVES[name]())
    loss.total.backward()
    adapted.model.eval()
    return loss.total.detach(), grads(adapted)


def grads(adapted: Adapted) -> Tensors:
    return {name: each.grad.clone() for name, each in adapted.parameters.items() if each.grad is not None}


@pytest.mark.parametrize("objective", ["sft", "choice"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_of_the_parts_are_those_of_the_whole_to_the_bit(name: str, objective: str) -> None:
    whole = deep(name)
    client, middle = parts(whole, first=2, last=1)
    examples = tiny.examples_for(objective)[:4]
    expected, gradients = trained(whole, objective, examples)
    loss, own = trained(client, objective, examples)
    assert torch.equal(loss, expected)
    own = {**own, **grads(middle.part)}
    tiny.assert_same_bits(gradients, {key: own[key] for key in gradients})
    assert len(own) == len(gradients)
    assert all(gradients[key].any() for key in cut_of(whole, SplitSection()).between)


def test_every_family_of_the_table_is_tested() -> None:
    found = {tiny.configuration(name).get_text_config().model_type for name in NAMES}
    assert found == set(FAMILIES)


def test_a_model_with_tied_head_is_cut_to_the_same_bits() -> None:
    whole = deep("llama", tied=True)
    assert whole.base.model.get_output_embeddings().weight is whole.base.model.get_input_embeddings().weight
    client, middle = parts(whole)
    examples = tiny.examples_for("sft")[:4]
    expected, gradients = trained(whole, "sft", examples)
    loss, own = trained(client, "sft", examples)
    assert torch.equal(loss, expected)
    own = {**own, **grads(middle.part)}
    tiny.assert_same_bits(gradients, {key: own[key] for key in gradients})


def test_only_tokens_that_matter_cross() -> None:
    whole = deep("llama")
    client, middle = parts(whole)
    examples = tiny.examples_for("sft")[:4]
    trained(client, "sft", examples)
    link = client.elsewhere.link
    assert link.crossed == [sum(len(each.prompt) + len(each.answer) - 1 for each in examples)] * 2


def test_a_client_whose_part_rests_sends_no_gradient_wish_and_trains_the_server_alone() -> None:
    whole = deep("llama")
    client, middle = parts(whole, train="server")
    assert not client.parameters
    examples = tiny.examples_for("sft")[:4]
    _, gradients = trained(whole, "sft", examples)
    trained(client, "sft", examples)
    made = grads(middle.part)
    tiny.assert_same_bits(made, {name: gradients[name] for name in made})


@pytest.mark.parametrize("objective", ["sft", "choice"])
def test_a_joined_batch_gives_the_gradient_of_the_union(objective: str) -> None:
    whole = deep("llama")
    client, middle = parts(whole)
    examples = tiny.examples_for(objective)
    one, other = examples[:3], examples[3:6]
    _, gradients = trained(whole, objective, [*one, *other])

    class Together(Direct):
        def forward(self, turn: Turn, states: torch.Tensor, form: Form) -> torch.Tensor:
            forms.append(form)
            given.append(states)
            return super().forward(turn, states, form)

        def backward(self, turn: Turn, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
            pulled.append(gradient)
            return super().backward(turn, gradient, is_wanted=is_wanted)

    forms: list[Form] = []
    given: list[torch.Tensor] = []
    pulled: list[torch.Tensor] = []
    client.elsewhere.link = Together(middle)
    for batch in (one, other):
        trained(client, objective, batch)
    for parameter in middle.parameters:
        parameter.grad = None
    middle.forward(torch.cat(given), joined(forms))
    middle.backward(torch.cat(pulled), is_wanted=False)
    made = grads(middle.part)
    tiny.assert_close(made, {name: gradients[name] for name in made}, 1e-5)


def test_lengths_of_rows_end_at_the_last_needed_logit() -> None:
    assert row_lengths(torch.tensor([1, 4, 2, 9]), (3, 4)) == (3, 1, 2)


@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 1)])
def test_a_cut_that_leaves_no_block_is_refused(first: int, last: int) -> None:
    with pytest.raises(ModelError, match="leave no block for the compute server: 'llama' has 2 blocks"):
        cut_of(deep("llama", blocks=2), SplitSection(first=first, last=last))


@pytest.mark.parametrize("name", ["gptj", "bloom", "opt", "mixtral"])
def test_a_family_that_cannot_be_cut_is_refused_by_name(name: str) -> None:
    adapted = tiny.adapted(name)
    with pytest.raises(ModelError, match=f"is of the family '{name}', which cannot be cut here"):
        cut_of(adapted, SplitSection())


def test_an_adapter_without_tensors_in_the_servers_blocks_is_refused() -> None:
    whole = deep("llama", targets=["model.layers.0.self_attn.q_proj"])
    with pytest.raises(ModelError, match="no tensor in the compute server's blocks 1 to 3"):
        cut_of(whole, SplitSection())


@pytest.mark.parametrize("tied", [False, True])
def test_what_each_party_has_is_the_arithmetic_by_hand(tied: bool) -> None:
    whole = deep("llama", tied=tied)
    width, inner, rows, heads = 32, 48, 320, 8 * 2
    block = 2 * width * width + 2 * width * heads + 3 * width * inner + 2 * width
    made = shares_of(whole, SplitSection(first=1, last=1))
    assert made.server == 3 * block
    assert made.client == 2 * block + width + (1 if tied else 2) * rows * width
    assert made.client_work == pytest.approx((2 * block + rows * width) / (5 * block + rows * width))
