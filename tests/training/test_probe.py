"""Shortcuts are taken where they give the plain way's losses and gradients, and nowhere else, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from silotune.errors import ModelError
from silotune.models import adapters
from silotune.models.adapters import Adapted, attach
from silotune.models.fast import paths
from silotune.models.fast.attention import ShortAttention
from silotune.models.fast.paths import ALL, PLAIN, SHORTCUTS, longest_alike
from silotune.models.load import Base
from silotune.settings.adapters import Lora
from silotune.settings.sections import ModelSection
from silotune.structs import Tensors
from silotune.training import probe
from silotune.training.encode import Encoded
from silotune.training.local import LocalResult, RoundPlace, train_round
from silotune.training.probe import probed, tolerance
from silotune.training.scores import answer_losses

AUTO, OFF = ModelSection(max_length=64), ModelSection(max_length=64, fast="off")
EVERY = set(SHORTCUTS)
OWN_ATTENTION = EVERY - {"attention"}
WITHOUT_LAYER = EVERY - {"attention", "last_layer"}
WITHOUT_MASKS = {"attention", "narrow_lora", "head"}
HOLDING: Mapping[str, set[str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3", "gpt2", "gpt_neox"), EVERY
    ),
    **dict.fromkeys(("opt", "stablelm", "glm4", "glm", "cohere", "granite", "starcoder2", "olmo2", "smollm3"), EVERY),
    **dict.fromkeys(("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"), EVERY),
    "gemma2": OWN_ATTENTION,
    **dict.fromkeys(("mistral-window", "gemma3-window"), WITHOUT_MASKS),
    "gemma2-window": WITHOUT_MASKS - {"attention"},
    **dict.fromkeys(("gptj", "codegen", "falcon"), WITHOUT_LAYER),
    **dict.fromkeys(("gpt_neo", "bloom", "mpt"), {"narrow_lora", "head"}),
}
"""Architecture -> the shortcuts that hold for it; windows of 8 and 16 ids are shorter than the texts."""
INSTRUCTION = tuple(range(30, 48))
WORDS = tiny.tokenizer()


def loaded(name: str, *, dtype: torch.dtype = torch.float32, **section: Any) -> Adapted:
    """A tiny model with a fresh adapter, as loading leaves it."""
    base = Base(tiny.model(name).to(dtype), WORDS, torch.device("cpu"), name)
    targets = {} if section.get("type") == "none" else {"targets": "all-linear"}
    return attach(base, tiny.adapter(**{**targets, **section}), seed=0)


def examples(objective: str) -> list[Encoded]:
    """Four examples behind one instruction, longer than the short windows."""
    options = ((50,), (51, 61, 62), (52, 63))
    made = []
    for number, length in enumerate((9, 3, 12, 6)):
        own = tuple(60 + (number * 7 + place * 13) % 200 for place in range(length))
        prompt, label = (*INSTRUCTION, *own), number % 3
        closed = Encoded(prompt, (*options[label], 2), options, label)
        made.append(closed if objective == "choice" else Encoded(prompt, (50, 51, 52)[: number % 3 + 1] + (2,)))
    return made


def trained(adapted: Adapted, objective: str) -> LocalResult:
    settings = tiny.training(objective=objective, optimizer="sgd", learning_rate=0.01, batch_size=4, max_steps=1)
    received = tiny.stir(adapted.start)
    return train_round(adapted, received, examples(objective), settings=settings, place=RoundPlace(seed=0))


def size(tensors: Tensors) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors.values())) ** 0.5


def off_by(made: Tensors, expected: Tensors) -> float:
    return size({name: made[name] - own for name, own in expected.items()}) / size(expected)


@pytest.mark.parametrize("name", HOLDING)
def test_every_architecture_learns_as_in_the_plain_way(name: str) -> None:
    model = loaded(name)
    plain = probed(model, OFF)
    assert plain.fast == PLAIN
    expected = {objective: trained(plain, objective) for objective in ("sft", "choice")}
    fast = probed(model, AUTO)
    assert set(fast.fast.names()) == HOLDING[name], fast.fast.note
    for objective, own in expected.items():
        made = trained(fast, objective)
        assert made.loss == pytest.approx(own.loss, rel=1e-4)
        assert off_by(made.delta, own.delta) < 1e-4


def test_what_is_switched_off_is_said_with_the_reason() -> None:
    assert not probed(loaded("llama"), AUTO).fast.note
    note = probed(loaded("gptj"), AUTO).fast.note
    assert note.startswith(
        "model.fast: gptj is computed in the plain way instead of the last layer at needed positions"
    )
    assert "raised AttributeError: 'tuple'" in note and "\n" not in note
    assert "windows of 16 ids" in probed(loaded("gpt_neo"), AUTO).fast.note
    assert not probed(loaded("gptj"), OFF).fast.note
    longer = ModelSection(max_length=tiny.CONTEXT + 1)
    assert "for texts of more than 256 ids" in probed(loaded("gemma3"), longer).fast.note


def test_a_window_that_the_configuration_does_not_name_is_found_by_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPT-Neo did before: layers with a window of 16 ids counted columns behind a shared beginning."""
    monkeypatch.setattr(paths, "WINDOWS", ())
    model = loaded("gpt_neo")
    unchecked = adapters.on(model, replace(ALL, attention=False, last_layer=False))
    plain = trained(probed(model, OFF), "choice")
    assert off_by(trained(unchecked, "choice").delta, plain.delta) > 0.01
    fast = probed(model, AUTO)
    assert "branches" not in fast.fast.names() and "gradient that is" in fast.fast.note
    assert off_by(trained(fast, "choice").delta, plain.delta) < 1e-4


def test_a_kernel_with_wrong_gradients_is_switched_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ShortAttention.backward
    monkeypatch.setattr(
        ShortAttention,
        "backward",
        staticmethod(lambda ctx, along: tuple(own if own is None else 1.5 * own for own in right(ctx, along))),
    )
    found = probed(loaded("llama"), AUTO)
    assert set(found.fast.names()) == EVERY - {"attention"}
    assert found.base.model.config._attn_implementation == "sdpa"
    assert "the attention for short texts (gave a gradient that is" in found.fast.note


@pytest.mark.parametrize("factor", [1.0, 1.33])
def test_half_precision_has_room_for_rounding_and_none_for_a_third(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama", dtype=torch.bfloat16)
    assert tolerance(model) == 0.1
    monkeypatch.setattr(
        probe,
        "answer_losses",
        lambda adapted, given: (answer_losses(adapted, given)[0] * (factor if adapted.fast.prefix else 1), None),
    )
    assert ("prefix" in probed(model, AUTO).fast.names()) == (factor == 1)


def _raising(*given: Any) -> Any:
    raise ZeroDivisionError("no\nway")


def test_shortcuts_that_fail_beside_each_other_alone_are_all_left(monkeypatch: pytest.MonkeyPatch) -> None:
    both = lambda adapted, given: (_raising if len(adapted.fast.names()) > 1 else answer_losses)(adapted, given)  # noqa: E731
    monkeypatch.setattr(probe, "answer_losses", both)
    found = probed(loaded("llama"), AUTO).fast
    assert not found.names() and "beside the others raised ZeroDivisionError: no)" in found.note


@pytest.mark.parametrize("section", [AUTO, OFF])
def test_a_model_that_cannot_train_at_all_is_refused_in_one_line(
    section: ModelSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"^'phimoe' \(phimoe\) cannot do a training step with[^\n]* AttributeError"):
        probed(loaded("phimoe"), section)
    monkeypatch.setattr(probe, "answer_losses", _raising)
    with pytest.raises(ModelError, match="ZeroDivisionError: no; aim adapter.targets"):
        probed(loaded("llama"), section)


@pytest.mark.parametrize("section", [{}, {"type": "ia3"}, {"type": "none"}, {"dora": True}])
def test_weights_gradients_and_generators_are_as_before(section: dict[str, Any]) -> None:
    model = loaded("llama", **section)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    draws = torch.get_rng_state()
    first, again = probed(model, AUTO), probed(model, AUTO)
    assert first.fast == again.fast and first.fast.names()
    assert torch.equal(torch.get_rng_state(), draws)
    tiny.assert_same_bits(model.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not model.model.training


def test_a_classifier_is_probed_by_its_classes() -> None:
    from transformers import AutoModelForSequenceClassification

    body = AutoModelForSequenceClassification.from_config(tiny.configuration("bert")).requires_grad_(False).eval()
    base = Base(body, WORDS, torch.device("cpu"), "bert", labels=("a", "b"), head=("classifier",))
    found = probed(attach(base, Lora(rank=2, targets="all-linear"), seed=0), AUTO).fast
    assert found.names() == ("attention", "narrow_lora") and not found.note


CHANGES: Mapping[str, Callable[[Adapted], object]] = {
    "checkpointing": lambda model: model.base.model.activation_checkpointing_enable(),
    "eager": lambda model: model.base.model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize(("change", "left"), [("checkpointing", {"prefix", "last_layer"}), ("eager", {"attention"})])
def test_what_the_settings_leave_no_room_for_is_not_tried_and_not_noted(change: str, left: set[str]) -> None:
    model = loaded("llama")
    CHANGES[change](model)
    found = probed(model, AUTO).fast
    assert set(found.names()) == EVERY - left and not found.note


def test_bounds_of_what_may_be_computed_in_parts() -> None:
    config = tiny.configuration("llama")
    assert longest_alike(config) is None
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert longest_alike(config) == tiny.CONTEXT
    config.rope_parameters = {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 40}}
    assert longest_alike(config) == 40
    config.attention_chunk_size = 24
    assert longest_alike(config) == 24
