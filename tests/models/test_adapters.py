"""Adapters: found on every architecture, read and written bit for bit, stored as peft stores them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny
from silotune import tensors as arithmetic
from silotune.errors import MessageError, ModelError
from silotune.models.adapters import CONFIGS, attach, linear_names, read, write
from silotune.models.load import load_base
from silotune.record.runs import RunFolder
from silotune.settings.adapters import ADAPTERS, AllWeights, Lora, PeftSettings, QLora
from silotune.settings.sections import ModelSection
from silotune.training.local import RoundPlace, train_round

KINDS = {
    "lora": {"type": "lora"},
    "rslora": {"type": "lora", "rslora": True},
    "dora": {"type": "lora", "dora": True},
    "ia3": {"type": "ia3"},
    "lora on all": {"type": "lora", "targets": "all-linear"},
    "ia3 on all": {"type": "ia3", "targets": "all-linear"},
}
IDS = torch.tensor([[5, 60, 70, 80, 9]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_table_is_the_configuration_s() -> None:
    assert [each.type for each in CONFIGS] == [name for name in ADAPTERS if not ADAPTERS[name].is_whole]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_targets_are_found_and_train(name: str, kind: str) -> None:
    model = tiny.adapted(name, stirred=False, **KINDS[kind])
    before = logits(tiny.model(name))
    torch.testing.assert_close(logits(model.model), before, rtol=1e-5, atol=1e-5)  # a fresh adapter changes nothing
    start = read(model)
    examples = tiny.encoded(tiny.closed(4))
    settings = tiny.training(learning_rate=0.05, max_steps=1)
    delta = train_round(model, start, examples, settings=settings, place=RoundPlace(1)).delta
    assert start.keys() == delta.keys() == model.parameters.keys()
    assert {parameter.requires_grad for parameter in model.parameters.values()} == {True}
    assert not torch.allclose(logits(model.model), before, atol=1e-4)
    head = model.base.model.get_output_embeddings()
    assert type(head) is torch.nn.Linear


def test_all_linear_layers_but_the_head_are_known() -> None:
    expected = {
        "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "gpt2": ["c_attn", "c_fc", "c_proj"],
        "gpt_neox": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
        "phi": ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"],
    }
    assert {name: linear_names(tiny.model(name)) for name in expected} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_write_are_exact_and_copies(kind: str) -> None:
    model = tiny.adapted(**KINDS[kind])
    first = read(model)
    other = tiny.stir(first, seed=9)
    kept = arithmetic.digest(other)
    write(model, other)
    tiny.assert_same_bits(read(model), other)
    for parameter in model.parameters.values():
        parameter.data.zero_()
    assert arithmetic.digest(other) == kept
    write(model, first)
    tiny.assert_same_bits(read(model), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's, not ours
def test_a_saved_adapter_is_peft_s_own(name: str, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    model = tiny.adapted(name, **KINDS[kind])
    model.model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = read(model)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    RunFolder(tmp_path / "ours").save_adapter(ours, model.config, card="")
    loaded = PeftModel.from_pretrained(tiny.model(name), tmp_path / "ours" / "adapter")
    torch.testing.assert_close(logits(loaded.eval()), logits(model.model), rtol=0, atol=0)


def test_configuration_is_the_same_in_every_process_and_names_the_base_as_given(tmp_path: Path) -> None:
    first, second = tiny.adapted(targets="all-linear").config, tiny.adapted(targets="all-linear").config
    assert json.dumps(first) == json.dumps(second)
    assert first["target_modules"] == sorted(first["target_modules"])
    assert first["base_model_name_or_path"] == "llama"
    assert first["inference_mode"] is True


def test_the_initial_adapter_comes_from_the_seed() -> None:
    def initial(seed: int) -> str:
        torch.manual_seed(torch.seed())
        return arithmetic.digest(read(attach(tiny.base(), Lora(rank=2), seed=seed)))

    assert initial(1) == initial(1) != initial(2)


def test_rank_and_scale_are_what_was_asked() -> None:
    for options, scale in (({}, 2.0), ({"rslora": True}, 4 / 2**0.5)):
        model = tiny.adapted(targets=("q_proj",), **options)
        (name, layer), *_ = [
            item for item in model.model.named_modules() if item[0].endswith("layers.0.self_attn.q_proj")
        ]
        down, up = (read(model)[f"{name}.lora_{part}.weight"] for part in "AB")
        assert down.shape == (2, 32) and up.shape == (32, 2)
        hidden = torch.randn(3, 32)
        expected = hidden @ layer.base_layer.weight.T + scale * (hidden @ down.T) @ up.T
        torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-5)


def test_no_adapter_trains_all_weights_once() -> None:
    base = tiny.base("gpt2")  # its head shares the embedding's memory
    model = attach(base, AllWeights(), seed=0)
    assert model.config == {} and model.model is base.model
    assert model.parameters.keys() == dict(base.model.named_parameters()).keys()
    start = read(model)
    assert arithmetic.count(start) == sum(item.numel() for item in base.model.parameters())
    settings = tiny.training(learning_rate=0.01)
    result = train_round(model, start, tiny.encoded(tiny.closed(4)), settings=settings, place=RoundPlace(1))
    assert all(bool(tensor.any()) for name, tensor in result.delta.items() if "wpe" not in name)
    write(model, start)
    tiny.assert_same_bits(read(model), start)


@pytest.mark.parametrize(
    ("target", "near"), [("q_prj", "did you mean 'q_proj'?"), ("query", "allowed: down_proj, gate_proj")]
)
def test_an_unknown_target_names_the_nearest(target: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        tiny.adapted(targets=("v_proj", target))
    assert near in str(caught.value) and target in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_rank_that_no_layer_has_is_refused_before_memory_is_taken(name: str) -> None:
    base = tiny.base(name)
    width = base.model.config.hidden_size
    attach(base, Lora(rank=2 * width), seed=0)  # factors and residual of a run that is gone on with
    attach(tiny.base(name), Lora(rank=3 * width), seed=0, known_rank=3 * width)
    with pytest.raises(ModelError, match=rf"adapter.rank = {10**9}: .*; take at most {width}$"):
        attach(tiny.base(name), Lora(rank=10**9), seed=0)


def test_a_scale_that_leaves_no_finite_number_is_refused() -> None:
    attach(tiny.base(), Lora(rank=2, alpha=2e4), seed=0)
    with pytest.raises(ModelError, match=r"adapter.alpha = 1e\+300 scales .*; take at most 20000$"):
        attach(tiny.base(), Lora(rank=2, alpha=1e300), seed=0)


class _LoHa(PeftSettings):
    """As CONTRIBUTING.md has it."""

    type = "loha"

    rank: int = 8
    alpha: float = 16


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("gpt2", {}, r"adapter.type = 'loha' does not go with this model: .*Conv1D"),
        ("llama", {"rank": 10**9}, "adapter.rank = 1000000000: no layer"),
        ("llama", {"alpha": 1e9}, r"adapter.alpha = 1e\+09 scales"),
    ],
)
def test_what_peft_has_not_for_a_model_and_absurd_sizes_are_one_line_for_any_adapter(
    name: str, sizes: dict[str, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoHaConfig

    def made(base, section: _LoHa) -> LoHaConfig:
        targets = "c_attn" if name == "gpt2" else "q_proj"
        return LoHaConfig(r=section.rank, alpha=section.alpha, target_modules=[targets], task_type="CAUSAL_LM")

    monkeypatch.setitem(CONFIGS, _LoHa, made)
    with pytest.raises(ModelError, match=said) as caught:
        attach(tiny.base(name), _LoHa(**sizes), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_target_that_is_no_layer_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"adapter.type = '{kind}'"):
        tiny.adapted(type=kind, targets=("layers",))


def test_write_refuses_what_does_not_fit() -> None:
    model = tiny.adapted()
    tensors = read(model)
    name = next(iter(tensors))
    with pytest.raises(MessageError, match="one side only"):
        write(model, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(MessageError, match="shape"):
        write(model, {**tensors, name: torch.zeros(1)})


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_trains_on_an_int4_base_without_touching_it(tiny_folder: Path) -> None:
    base = load_base(ModelSection(name=str(tiny_folder), max_length=128, precision="int4"))
    packed = {name: item for name, item in base.model.named_parameters() if item.dtype == torch.uint8}
    assert any("q_proj" in name for name in packed)
    before = arithmetic.digest(packed)
    model = attach(base, QLora(rank=2, targets="all-linear"), seed=0)
    start = read(model)
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    settings = tiny.training(learning_rate=0.01, objective="choice", batch_size=8, max_steps=6)
    place = RoundPlace(1)
    first = train_round(model, start, tiny.encoded(tiny.closed()), settings=settings, place=place)
    again = train_round(model, start, tiny.encoded(tiny.closed()), settings=settings, place=place)
    tiny.assert_same_bits(first.delta, again.delta)
    assert arithmetic.digest(packed) == before
    after = arithmetic.add(start, first.delta)
    assert train_round(model, after, tiny.encoded(tiny.closed()), settings=settings, place=place).loss < first.loss


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_one_end_of_a_tied_pair_leaves_the_other_as_it_is(target: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from silotune.models.adapters import merged

    base = load_base(ModelSection(name="nano"))
    assert base.model.config.tie_word_embeddings
    adapted = attach(base, Lora(rank=2, alpha=8, targets=[target, "q_proj"]), seed=0)
    noise = torch.Generator().manual_seed(1)
    stirred = {name: torch.randn(tensor.shape, generator=noise) for name, tensor in read(adapted).items()}
    write(adapted, stirred)
    adapted.model.eval()
    expected = logits(adapted.model)
    plain = merged(adapted)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-3)
    plain.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-3)
