"""Families of models, as docs/families.md lists them: train a round, save, load in plain peft, merge, same logits."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from markdown import ROOT
from silotune import tensors as arithmetic
from silotune.errors import ModelError
from silotune.models.adapters import Adapted, attach, exported, merged, read, write
from silotune.models.head import STATE_SPACE, Classes
from silotune.models.load import load_base
from silotune.record.runs import RunFolder
from silotune.settings.sections import ModelSection
from silotune.training.local import RoundPlace, train_round
from silotune.training.probe import probed

PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)]
KINDS = {"LoRA": "lora", "QLoRA": "qlora", "IA3": "ia3", "all weights": "none", "classify": "lora"}
USES = [
    (row[1].strip("`"), column)
    for row in ROWS
    if row[1].startswith("`")
    for column, said in zip(ROWS[0][2:], row[2:], strict=True)
    if said == "yes"
]
IDS = torch.tensor([[5, 60, 70, 80, 9]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=IDS).logits
    return made


def test_the_page_names_families_enough() -> None:
    causal = {family for family, column in USES if column == "LoRA" and family not in tiny.ENCODERS}
    encoders = {family for family, column in USES if column == "classify" and family in tiny.ENCODERS}
    assert len(causal) >= 24 and encoders == set(tiny.ENCODERS)
    assert all(f"`{family}`" in PAGE for family in STATE_SPACE)


def loaded(folder: Path, column: str, family: str) -> Adapted:
    """The family's tiny model as a run has it, from its folder."""
    section = ModelSection(name=str(folder), max_length=128, precision="int4" if column == "QLoRA" else "float32")
    classes = Classes(tiny.LABELS, 0) if column == "classify" or family in tiny.ENCODERS else None
    targets = {} if KINDS[column] == "none" else {"targets": "all-linear"}
    return probed(attach(load_base(section, classes), tiny.adapter(type=KINDS[column], **targets), seed=0), section)


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's, not ours
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft's, too
@pytest.mark.parametrize(("family", "column"), USES)
def test_a_family_trains_and_is_the_same_in_plain_peft_and_merged(family: str, column: str, tmp_path: Path) -> None:
    import transformers

    if column == "QLoRA" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    if family in tiny.ENCODERS:
        tiny.save_body(tmp_path / "base", family)
    else:
        tiny.save(tmp_path / "base", family)
    model = loaded(tmp_path / "base", column, family)
    use = "classify" if model.base.labels else "sft"
    start = read(model)
    settings = tiny.training(objective=use, learning_rate=0.02, max_steps=1)
    delta = train_round(model, start, tiny.examples_for(use, 4), settings=settings, place=RoundPlace(1)).delta
    assert any(bool(tensor.any()) for tensor in delta.values())
    after = arithmetic.add(start, delta)
    write(model, after)
    expected = logits(model.model.eval())
    if model.config:
        from peft import PeftModel

        RunFolder(tmp_path / "run").save_adapter(*exported(model, after), card="")
        base = loaded(tmp_path / "base", column, family).base
        fresh = _fresh(tmp_path / "base", base)
        plain = PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter").eval()
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    if column != "QLoRA":  # merged into whole weights: `silotune export --merge` loads the base in float32
        merged(model).save_pretrained(tmp_path / "merged")
        kind = "SequenceClassification" if model.base.labels else "CausalLM"
        again = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-3)


def _fresh(folder: Path, base: Any) -> Any:
    """The base as a user of transformers and peft has it: its weights are those of the folder."""
    import transformers

    section = ModelSection(name=str(folder), max_length=128)
    if getattr(base.model, "is_quantized", False):
        classes = Classes(base.labels, 0) if base.labels else None
        return load_base(section.model_copy(update={"precision": "int4"}), classes).model
    if not base.labels:
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(base.labels), pad_token_id=base.pad_id
    )


@pytest.mark.parametrize("family", ["mamba", "t5"])
def test_a_family_that_cannot_be_trained_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    tiny.configuration(family).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"is an? .* \({family}\)") as caught:
        load_base(ModelSection(name=str(tmp_path), max_length=64))
    assert "\n" not in str(caught.value)
