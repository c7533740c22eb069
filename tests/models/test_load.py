from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny
from silotune.config import from_mapping
from silotune.errors import ConfigError, MissingPackageError, ModelError
from silotune.models.fingerprint import check_memory, weights_bytes
from silotune.models.head import Classes
from silotune.models.load import Base, load_base, load_tokenizer, pick_device, settled
from silotune.settings.adapters import Lora
from silotune.settings.sections import ModelSection


def section(folder: Path, **changes) -> ModelSection:
    return ModelSection(**{"name": str(folder), "max_length": 128, **changes})


def test_a_base_is_frozen_and_in_evaluation_mode(tiny_folder: Path) -> None:
    base = load_base(section(tiny_folder))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.config.use_cache is False
    assert base.context_length == tiny.CONTEXT
    assert base.tokenizer.chat_template
    assert base.pad_id == 0


def test_weights_are_those_of_the_folder(tiny_folder: Path, tiny_model: Base) -> None:
    expected = tiny.model("llama").state_dict()
    assert tiny_model.model.state_dict().keys() == expected.keys()
    for name, tensor in tiny_model.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_precision_attention_and_checkpointing(tiny_folder: Path) -> None:
    base = load_base(section(tiny_folder, precision="bfloat16", attention="eager", gradient_checkpointing=True))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.model.config._attn_implementation == "eager"
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in base.model.modules())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_folder: Path) -> None:
    from silotune.models.adapters import attach, read, write
    from silotune.training.scores import answer_losses

    made = []
    for checkpointing in (False, True):
        model = attach(load_base(section(tiny_folder, gradient_checkpointing=checkpointing)), Lora(rank=2), seed=0)
        write(model, tiny.stir(read(model)))
        model.model.train()
        losses, _ = answer_losses(model, tiny.encoded(tiny.closed(4)))
        made.append(tiny.gradients(model, losses.mean()))
    tiny.assert_close(*made, 1e-5)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_int4_is_near_float32_and_smaller(
    tiny_folder: Path, tiny_model: Base, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        base = load_base(section(tiny_folder, precision="int4"))
    assert not [record for record in caplog.records if "kernels" in record.getMessage()]
    line = torch.tensor([[5, 60, 70]])
    with torch.no_grad():
        rough, exact = base.model(line).logits, tiny_model.model(line).logits
    assert 0 < (rough - exact).abs().mean() < exact.abs().mean()
    quantised = [module for module in base.model.modules() if type(module).__name__ == "Linear4bit"]
    assert quantised
    for module in quantised:  # whatever this processor can do, scoring uses the weights that training uses
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


def test_int4_without_its_package_says_what_to_install(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"silotune\[int4\]"):
        load_base(section(tiny_folder, precision="int4"))


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_broken_folders(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_base(section(tmp_path / "nowhere", offline=True))
    assert "neither a local folder" in one_line(caught)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        load_base(section(tmp_path / "empty"))
    assert "not one that transformers can load" in one_line(caught)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        load_base(section(broken))
    assert "not one that transformers can load" in one_line(caught)


def test_weights_that_lack_a_layer_are_refused_rather_than_made_up(tmp_path: Path, tiny_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "lacking"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_base(section(folder))
    assert "up_proj" in one_line(caught)


def test_context_and_device_that_are_not_there(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="model.max_length to at most 256"):
        load_base(section(tiny_folder, max_length=257))
    if not torch.backends.mps.is_available():
        with pytest.raises(ModelError, match="model.device = 'mps' is not available.*cpu"):
            pick_device("mps")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(("cuda", "mps", "found"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_fastest_device_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == found
    if not cuda:
        with pytest.raises(ModelError, match="model.device = 'cuda' is not available on this machine; there is: cpu"):
            pick_device("cuda")


def test_one_of_several_gpus_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ModelError, match="'cuda:2' is not available .* there is: cpu, cuda, .*cuda:0, cuda:1"):
        pick_device(ModelSection(device="cuda:2").device)
    for wrong in ("cuda:", "cuda:-1", "gpu", "cpu:1"):
        with pytest.raises(ConfigError, match="model.device = .*unknown device"):
            from_mapping({"model": {"device": wrong}})


def test_a_gpu_that_cannot_hold_the_base_is_told_in_one_line(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(ModelError) as caught:
        load_base(section(tiny_folder))
    assert "does not fit into the GPU's memory; set model.precision" in one_line(caught)


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bfloat16", 2), ("int4", 0.5)])
def test_the_memory_of_weights_is_known_before_they_are_loaded(
    tiny_folder: Path, tmp_path: Path, precision: str, size: float
) -> None:
    values = sum(parameter.numel() for parameter in tiny.model("llama").parameters())
    assert weights_bytes(section(tiny_folder, precision=precision)) == int(values * size)
    assert weights_bytes(section(tmp_path / "nowhere", precision=precision)) is None
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    assert weights_bytes(section(tmp_path, precision=precision)) is None


@pytest.mark.parametrize(("can", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_the_precision_left_open_is_what_the_processor_multiplies(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, can: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": can, "avx2": True, "cpu_name": "any"})
    given = section(tiny_folder, precision="auto", device="cpu")
    assert settled(given).precision == precision
    assert load_base(given).model.dtype == getattr(torch, precision)
    assert settled(section(tiny_folder)).precision == "float32"


def test_a_base_that_no_memory_holds_is_refused_with_the_precision_that_fits(tiny_folder: Path) -> None:
    given = section(tiny_folder, device="cpu")
    needed = weights_bytes(given)
    assert needed is not None
    check_memory(given, needed)
    check_memory(given, None)
    with pytest.raises(ModelError, match="in float32, and this machine has .* set model.precision = 'bfloat16'"):
        check_memory(given, needed - 1)
    with pytest.raises(ModelError, match="set model.precision = 'int4'"):
        check_memory(given, needed // 3)
    with pytest.raises(ModelError, match="take a smaller model"):
        check_memory(given, needed // 10)


def test_the_tokenizer_alone(tiny_folder: Path) -> None:
    words = load_tokenizer(section(tiny_folder))
    assert words("the bank")["input_ids"] == tiny.tokenizer()("the bank")["input_ids"]


def test_pad_is_never_missing() -> None:
    assert tiny.base(words=tiny.tokenizer(pad=None)).pad_id == 2  # the end
    bare = tiny.tokenizer(pad=None)
    bare.eos_token = None
    assert tiny.base(words=bare).pad_id == 0


def with_tokens(folder: Path, *, chat_template: str | None = None, **tokens: object) -> Path:
    tiny.model("llama").save_pretrained(folder)
    words = tiny.tokenizer(pad=None)
    words.add_special_tokens(tokens)
    words.chat_template = chat_template
    words.save_pretrained(folder)
    return folder


def test_a_pad_beyond_the_rows_gives_way_to_an_id_that_exists(tmp_path: Path) -> None:
    folder = with_tokens(tmp_path / "pad", pad_token="[PAD]", additional_special_tokens=["<unused>"])
    base = load_base(section(folder))
    assert (base.tokenizer.pad_token_id, base.pad_id) == (320, 2)
    assert base.notes == (
        "the tokenizer has a padding mark of id 320, beyond the model's 320 rows: batches are filled up with '</s>' "
        "(id 2), which is masked",
    )
    assert load_base(section(folder), Classes(("a", "b"), 0)).pad_id == 0  # which the model's configuration names


def test_a_base_says_what_fills_up_batches_and_which_day_its_template_writes(tmp_path: Path, tiny_folder: Path) -> None:
    assert load_base(section(tiny_folder)).notes == ()
    base = load_base(
        section(with_tokens(tmp_path / "bare", chat_template="{{ strftime_now('%Y') }}"), date="2026-12-01")
    )
    assert base.notes == (
        "the tokenizer has no padding mark: batches are filled up with '</s>' (id 2), which is masked",
        "the chat template writes today's date, which is 2026-12-01 here (model.date)",
    )


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda words: words.add_tokens(["EBITDA"]), "EBITDA"),
        (lambda words: words.add_special_tokens({"eos_token": "<end>"}), "<end>"),
        (lambda words: words.add_special_tokens({"bos_token": "<begin>"}), "<begin>"),
        (lambda words: words.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|text|>"]}), "<|text|>"),
    ],
    ids=["a word", "the end", "the beginning", "a mark of the template"],
)
def test_ids_that_the_model_has_no_rows_for_are_refused(tmp_path: Path, change: Callable[..., object], token) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    words = tiny.tokenizer()
    words.chat_template = "<|text|>" + tiny.TEMPLATE
    change(words)
    words.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_base(section(tmp_path))
    assert f"the tokenizer's {token!r} has id 320, and the model has rows for the ids 0 to 319 alone" in one_line(
        caught
    )


@pytest.mark.end_to_end
def test_int4_prints_nothing_in_a_fresh_process(tiny_folder: Path) -> None:
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    code = (
        "from silotune.settings.sections import ModelSection; from silotune.models.load import load_base; "
        f"load_base(ModelSection(name={str(tiny_folder)!r}, max_length=128, precision='int4'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == ("", "")


AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForCausalLM": "strange.StrangeModel",
        "AutoModelForSequenceClassification": "strange.StrangeModel",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["strange.StrangeTokenizer", "strange.StrangeTokenizer"]},
}


@pytest.fixture
def strange(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a folder with code in it that says when it runs; whoever is asked about it says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))

    def make(file: str, **changes: object) -> Path:
        place = tmp_path / "strange"
        shutil.copytree(tiny_folder, place)
        (place / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        known = json.loads((place / file).read_text())
        kept = {name: value for name, value in {**known, **changes}.items() if value is not None}
        (place / file).write_text(json.dumps({**kept, "auto_map": AUTO_MAPS[file]}))
        return place

    return make


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "strange", "architectures": ["StrangeModel"]}),
        ("config.json", {"model_type": None}),
        ("tokenizer_config.json", {"tokenizer_class": "StrangeTokenizer"}),
    ],
)
@pytest.mark.parametrize("classes", [None, Classes(("a", "b"), 0)])
def test_code_that_comes_with_a_model_is_refused_in_one_line(strange, tmp_path, file, changes, classes) -> None:
    place = strange(file, **changes)
    with pytest.raises(ModelError, match="comes with code of its own .* take a model that transformers knows") as error:
        load_base(section(place), classes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", AUTO_MAPS)
@pytest.mark.parametrize("classes", [None, Classes(("a", "b"), 0)])
def test_a_known_kind_is_loaded_without_the_code_beside_it(strange, tmp_path, file, classes) -> None:
    base = load_base(section(strange(file)), classes)
    assert type(base.model).__module__.startswith("transformers.")
    assert type(base.tokenizer).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "experts_implementation"])
def test_code_on_the_hub_that_a_configuration_names_is_refused(tiny_folder: Path, tmp_path: Path, key: str) -> None:
    place = tmp_path / "kernel"
    shutil.copytree(tiny_folder, place)
    known = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**known, key: "somebody/attention"}))
    with pytest.raises(ModelError, match=rf"names code to be fetched from the Hub \({key} = 'somebody/attention'"):
        load_base(section(place))
