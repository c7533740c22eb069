"""Residuals and cores: what a layer computes with them, and that plain peft computes the same from what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from silotune import lora
from silotune.errors import MessageError, ModelError
from silotune.models import adapters
from silotune.models.adapters import attach, exported, frozen, read, replicate, write
from silotune.record.runs import RunFolder
from silotune.settings.adapters import Lora
from silotune.structs import Tensors
from silotune.training.local import RoundPlace, train_round

IDS = torch.tensor([[5, 60, 70, 80, 9]])
SECTION = {"rank": 2, "alpha": 4}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def with_residuals(tensors: Tensors, ranks: tuple[int, ...] = (3, 1)) -> Tensors:
    """Residuals for the first modules, of these ranks."""
    made = dict(tensors)
    for name, rank in zip(lora.modules(tensors), ranks, strict=False):
        b, a = tensors[name + lora.B], tensors[name + lora.A]
        generator = torch.Generator().manual_seed(rank)
        made[name + lora.RESIDUAL_B] = 0.1 * torch.randn(b.shape[0], rank, generator=generator)
        made[name + lora.RESIDUAL_A] = 0.1 * torch.randn(rank, a.shape[1], generator=generator)
    return made


def cored(name: str = "llama") -> adapters.Adapted:
    return attach(tiny.base(name), Lora(**SECTION), seed=0, has_core=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_a_residual_is_the_base_s_weight_moved(name: str, options: dict) -> None:
    model = tiny.adapted(name, **options)
    start = read(model)
    bare = logits(model.model)
    tensors = with_residuals(start)
    write(model, tensors)
    found = logits(model.model)
    assert not torch.allclose(found, bare, atol=1e-3)
    write(model, start)
    torch.testing.assert_close(logits(model.model), bare, rtol=0, atol=0)  # gone again, to the bit
    for module, (b, a) in lora.residuals(tensors).items():
        layer = model.model.get_submodule(module)
        added = layer.scaling["default"] * b @ a
        weight = layer.base_layer.weight
        weight.data += added.mT if name == "gpt2" else added
    torch.testing.assert_close(logits(model.model), found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's, not ours
@pytest.mark.parametrize("options", [{}, {"rslora": True}])
def test_plain_peft_loads_what_is_exported(options: dict, tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from silotune.models.load import load_base
    from silotune.settings.sections import ModelSection

    base = load_base(ModelSection(name=str(tiny_folder), max_length=64))
    model = attach(base, Lora(**SECTION, **options), seed=0)
    tensors = with_residuals(tiny.stir(read(model)))
    write(model, tensors)
    saved, config = exported(model, tensors)
    assert config["r"] == 5 and not any(map(lora.is_residual, saved))
    RunFolder(tmp_path).save_adapter(saved, config, card="")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(model.model), rtol=1e-4, atol=1e-5)
    same, config = exported(model, read(model))
    assert config == model.config
    tiny.assert_same_bits(same, read(model))


def test_a_residual_that_does_not_fit_is_refused() -> None:
    model = tiny.adapted()
    tensors = with_residuals(read(model), (2,))
    name = next(name for name in tensors if name.endswith(lora.RESIDUAL_B))
    with pytest.raises(MessageError, match="has shapes"):
        write(model, {**tensors, name: tensors[name][1:]})
    strange = {key.replace("layers.0", "layers.7"): value for key, value in tensors.items() if lora.is_residual(key)}
    with pytest.raises(MessageError, match="no such LoRA layer"):
        write(model, {**read(model), **strange})


def test_the_base_alone_has_no_residual() -> None:
    model = tiny.adapted()
    write(model, with_residuals(read(model)))
    with model.model.disable_adapter():
        torch.testing.assert_close(logits(model.model), logits(tiny.model("llama")))


def test_a_core_changes_nothing_at_first_and_trains_alone() -> None:
    model = cored()
    start = read(model)
    assert {name.rpartition(".lora_")[2] for name in start} == {"R.weight"}
    assert {tuple(value.shape) for value in start.values()} == {(2, 2)}
    assert model.num_base_parameters == sum(value.numel() for value in tiny.model("llama").parameters())
    torch.testing.assert_close(logits(model.model), logits(tiny.model("llama")))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    examples = tiny.encoded(tiny.closed(4))
    delta = train_round(model, start, examples, settings=tiny.training(learning_rate=0.1), place=RoundPlace(1)).delta
    assert all(bool(value.any()) for value in delta.values())
    moved = {name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.endswith("original") for name in moved)
    again = read(cored())
    tiny.assert_same_bits(start, again)
    layer = model.model.get_submodule(next(iter(start)).removesuffix(lora.CORE))
    a = layer.lora_A["default"].weight
    torch.testing.assert_close(a @ a.mT, torch.eye(2), rtol=1e-5, atol=1e-5)


def test_a_core_s_mean_is_the_mean_of_the_products_and_plain_lora_when_exported() -> None:
    model = cored()
    start = read(model)
    clients = [tiny.stir(start, seed=seed) for seed in (1, 2)]
    mean = {name: (clients[0][name] + clients[1][name]) / 2 for name in start}
    plain = [exported(model, tensors)[0] for tensors in (*clients, mean)]
    products = [{name: own[name + lora.B] @ own[name + lora.A] for name in lora.modules(own)} for own in plain]
    for name, product in products[2].items():
        torch.testing.assert_close(product, (products[0][name] + products[1][name]) / 2, rtol=1e-5, atol=1e-6)
    write(model, mean)
    other = attach(tiny.base(), Lora(**SECTION), seed=5)
    write(other, plain[2])
    torch.testing.assert_close(logits(other.model), logits(model.model), rtol=1e-4, atol=1e-5)


def test_workers_can_share_a_model_with_cores_and_residuals() -> None:
    for model in (cored(), tiny.adapted()):
        tensors = tiny.stir(read(model))
        if model.parameters.keys() == set(tensors) and lora.modules(tensors):
            tensors = with_residuals(tensors)
        write(model, tensors)
        second = replicate(model)
        assert second.parameters.keys() == model.parameters.keys()
        write(second, tensors)
        torch.testing.assert_close(logits(second.model), logits(model.model))
        write(second, {name: torch.zeros_like(value) for name, value in lora.without_residuals(tensors).items()})
        assert not torch.allclose(logits(second.model), logits(model.model))


def test_a_core_wider_than_a_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="exceeds the width"):
        attach(tiny.base(), Lora(rank=20), seed=0, has_core=True)


def test_frozen_tensors_rest_and_come_back() -> None:
    model = tiny.adapted()
    names = [name for name in model.parameters if lora.is_a(name)]
    settings = tiny.training(learning_rate=0.05, weight_decay=0.1)
    with frozen(model, names):
        delta = train_round(
            model, read(model), tiny.encoded(tiny.closed(4)), settings=settings, place=RoundPlace(1)
        ).delta
    assert all(bool(value.any()) != lora.is_a(name) for name, value in delta.items())
    assert all(parameter.requires_grad for parameter in model.parameters.values())
