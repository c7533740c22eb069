"""The classification head: found on every architecture, drawn from the seed, never quantised, loaded by plain peft."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from silotune import tensors as arithmetic
from silotune.errors import ModelError
from silotune.models.adapters import Adapted, attach, merged, read, write
from silotune.models.head import Classes
from silotune.models.load import Base, load_base
from silotune.record.runs import RunFolder
from silotune.settings.adapters import Lora
from silotune.settings.objectives import Classify
from silotune.settings.sections import ModelSection
from silotune.training.local import RoundPlace, train_round
from silotune.training.objectives import encoder_of
from silotune.training.scores import class_logits

HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "modernbert": ("head", "classifier"),
    "llama": ("score",),
    "gpt2": ("score",),
}
KINDS = {
    "lora": {"type": "lora"},
    "lora on all": {"type": "lora", "targets": "all-linear"},
    "dora": {"type": "lora", "dora": True},
    "ia3": {"type": "ia3"},
    "ia3 on all": {"type": "ia3", "targets": "all-linear"},
    "none": {"type": "none"},
}
IDS = torch.tensor([[5, 60, 70, 80, 9]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bodies")
    return {name: tiny.save_body(root / name, name) for name in HEADS}


def load(folder: Path, *, seed: int = 0, labels: tuple[str, ...] = tiny.LABELS, **section: Any) -> Base:
    return load_base(ModelSection(name=str(folder), **{"max_length": 128, **section}), Classes(labels, seed))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain(folder: Path, **options: Any) -> Any:
    """What a user of transformers loads."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def learn(model: Adapted, **changes: Any) -> arithmetic.Tensors:
    examples = encoder_of(model.base, Classify(), max_length=128)(tiny.closed())
    settings = tiny.training(objective="classify", **{"learning_rate": 0.02, **changes})
    start = read(model)
    return arithmetic.add(start, train_round(model, start, examples, settings=settings, place=RoundPlace(1)).delta)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_stands_around_the_body(folders: dict[str, Path], name: str) -> None:
    base = load(folders[name])
    assert base.head == HEADS[name] and base.labels == tiny.LABELS
    assert base.is_encoder == (name in tiny.ENCODERS)
    assert base.model.config.num_labels == 3 and base.model.config.id2label[1] == "neutral"
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.context_length == (None if name == "deberta" else tiny.CONTEXT)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_comes_from_the_seed_and_the_body_from_the_folder(folders: dict[str, Path], name: str) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(torch.seed())
        model = load(folders[name], seed=seed).model
        state = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(HEADS[name])}
        assert state and all(bool(tensor.any()) for key, tensor in state.items() if key.endswith("classifier.weight"))
        made.append(arithmetic.digest(state))
    assert made[0] == made[1] != made[2]
    from transformers import AutoModel

    body = AutoModel.from_pretrained(folders[name]).state_dict()
    own = model.base_model.state_dict()
    assert all(torch.equal(tensor, body[key]) for key, tensor in own.items())


def test_loading_leaves_the_random_numbers_of_others_alone(folders: dict[str, Path]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(folders["bert"])
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's, not ours
def test_head_and_adapter_train_and_plain_peft_gives_the_same_logits(
    folders: dict[str, Path], name: str, kind: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = load(folders[name])
    before = logits(base.model)
    model = attach(base, tiny.adapter(**KINDS[kind]), seed=0)
    torch.testing.assert_close(logits(model.model), before, rtol=1e-5, atol=1e-5)  # a fresh adapter changes nothing
    start = read(model)
    learnt = learn(model)
    for part in HEADS[name]:
        own = [key for key in start if f"{part}." in f"{key}."]
        assert own and any(not torch.equal(start[key], learnt[key]) for key in own), part
    adapter = [key for key in start if "lora_B" in key or "ia3" in key]
    assert adapter or kind == "none"
    assert not any(f".{part}." in key for key in adapter for part in HEADS[name])
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    write(model, learnt)
    if kind == "none":
        return
    RunFolder(tmp_path).save_adapter(learnt, model.config, card="")
    theirs = PeftModel.from_pretrained(plain(folders[name], num_labels=3), tmp_path / "adapter").eval()
    assert torch.equal(logits(theirs), logits(model.model))
    merged(model).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_sent(tmp_path: Path) -> None:
    folder = tiny.save_body(tmp_path / "masked", "bert", purpose="AutoModelForMaskedLM")
    base = load(folder, seed=4)
    assert base.head == ("bert.pooler", "classifier")
    again = load(folder, seed=4)
    assert torch.equal(logits(base.model), logits(again.model))
    model = attach(base, Lora(rank=2, targets=("query", "dense")), seed=0)
    names = [name for name in model.parameters if "pooler" in name]
    assert names == ["base_model.model.bert.pooler.dense.weight", "base_model.model.bert.pooler.dense.bias"]


def test_a_head_for_the_same_classes_is_kept_and_any_other_is_drawn(folders: dict[str, Path], tmp_path: Path) -> None:
    base = load(folders["bert"], seed=1)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    kept = load(tmp_path, seed=2).model.classifier
    assert torch.equal(kept.weight, base.model.classifier.weight)
    for labels in (tiny.LABELS[::-1], ("no", "yes")):
        other = load(tmp_path, seed=2, labels=labels).model.classifier
        assert torch.equal(other.weight, load(folders["bert"], seed=2, labels=labels).model.classifier.weight)


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_padding_is_known_to_decoders_without_a_padding_token(tmp_path: Path, pad: str | None) -> None:
    folder = tiny.save_body(tmp_path / "body", "llama", pad=pad)
    configuration = tiny.configuration("llama")
    configuration.pad_token_id = None
    configuration.save_pretrained(folder)
    base = load(folder)
    assert base.pad_id == base.model.config.pad_token_id == (0 if pad == "<pad>" else 2)
    model = attach(base, Lora(rank=2), seed=0)
    examples = encoder_of(base, Classify(), max_length=64)(tiny.closed(5))
    with torch.no_grad():
        together = class_logits(model, examples)
        alone = torch.cat([class_logits(model, [example]) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_a_head_stays_in_float32_on_a_bfloat16_body(folders: dict[str, Path], name: str) -> None:
    base = load(folders[name], precision="bfloat16")
    exact = logits(load(folders[name]).model)
    model = attach(base, Lora(rank=2), seed=0)
    assert {tensor.dtype for tensor in read(model).values()} == {torch.float32}
    assert any(parameter.dtype == torch.bfloat16 for parameter in base.model.parameters())
    made = logits(model.model)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, exact, rtol=0.1, atol=0.3)
    assert arithmetic.all_finite(learn(model))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["qlora", "ia3"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "llama"])
def test_an_int4_body_has_a_whole_head(folders: dict[str, Path], name: str, kind: str) -> None:
    base = load(folders[name], precision="int4")
    packed = {key for key, item in base.model.named_parameters() if item.dtype == torch.uint8}
    assert packed and not any(key.startswith(HEADS[name]) for key in packed)
    exact = load(folders[name]).model
    for part in HEADS[name]:  # the same seed gives the same head, whatever the body's precision
        tiny.assert_same_bits(base.model.get_submodule(part).state_dict(), exact.get_submodule(part).state_dict())
    model = attach(base, tiny.adapter(type=kind), seed=0)
    start = read(model)
    learnt = learn(model)
    assert all(bool((learnt[key] != start[key]).any()) for key in learnt if "lora_B" in key or "ia3" in key)
    write(model, start)
    tiny.assert_same_bits(learn(model), learnt)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_gradient_checkpointing_learns_the_same(folders: dict[str, Path], name: str) -> None:
    made = [
        learn(attach(load(folders[name], gradient_checkpointing=checkpointing), Lora(rank=2), seed=0))
        for checkpointing in (False, True)
    ]
    tiny.assert_close(made[0], made[1], 1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast_is_near_float32(folders: dict[str, Path], name: str) -> None:
    made = []
    for autocast in (False, True):
        model = attach(load(folders[name], autocast=autocast), Lora(rank=2), seed=0)
        examples = encoder_of(model.base, Classify(), max_length=64)(tiny.closed(4))
        with torch.no_grad():
            made.append(class_logits(model, examples))
        assert made[-1].dtype == torch.float32
    torch.testing.assert_close(made[0], made[1], rtol=0.1, atol=0.3)


def test_what_is_no_classifier_or_no_writer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import transformers as hf

    with pytest.raises(ModelError, match="is an encoder .bert., which writes no text"):
        load_base(ModelSection(name=str(folders["bert"]), max_length=64))
    base = load(folders["llama"])
    base.model.save_pretrained(tmp_path / "made")
    base.tokenizer.save_pretrained(tmp_path / "made")
    with pytest.raises(ModelError, match="is a classifier, which writes no text"):
        load_base(ModelSection(name=str(tmp_path / "made"), max_length=64))
    sizes = {"vocab_size": 320, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    hf.BartConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path / "both")
    tiny.configuration("mamba").save_pretrained(tmp_path / "mamba")
    for family, said in (("both", "is an encoder-decoder .bart."), ("mamba", "is a state-space model .mamba.")):
        tiny.tokenizer().save_pretrained(tmp_path / family)
        for refused in (load, lambda folder: load_base(ModelSection(name=str(folder), max_length=64))):
            with pytest.raises(ModelError, match=said):
                refused(tmp_path / family)


def test_a_checkpoint_without_its_body_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["bert"], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    save_file({key: item for key, item in tensors.items() if "layer.1." not in key}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ModelError, match="has no weights for 'bert.encoder.layer.1.*take a whole checkpoint") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_text_may_be_as_long_as_the_positions_of_the_encoder(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="exceeds the 255 positions|exceeds the 256 positions"):
        load(folders["roberta"], max_length=tiny.CONTEXT + 1)
    for name in ("bert", "roberta", "distilbert"):
        base = load(folders[name], max_length=tiny.CONTEXT)
        ids = torch.full((1, tiny.CONTEXT), 60)
        assert base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
