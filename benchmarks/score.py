"""The one evaluation loss that judges both sides: plain transformers and peft, all logits, no silotune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from workload import HELD_OUT, Pair, Settings, lora_config, read_pairs

BATCH = 32


def evaluation_loss(settings: Settings, folder: Path, adapters: Sequence[Path]) -> list[float]:
    """Mean negative log-likelihood of an answer token (end of sequence included) on the held-out examples.

    Args:
        settings: Of the workload.
        folder: The prepared workload.
        adapters: Safetensors files, one loss each.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model = get_peft_model(base, lora_config(settings)).eval()
    examples = [_ids(pair, tokenizer) for pair in read_pairs(folder / HELD_OUT)]
    losses = []
    for adapter in adapters:
        set_peft_model_state_dict(model, load_file(adapter))
        losses.append(_mean_loss(model, examples))
    return losses


def _ids(pair: Pair, tokenizer: Any) -> tuple[list[int], int]:
    """All ids of an example, and how many of them are its prompt's."""
    prompt = tokenizer(pair.prompt)["input_ids"]
    whole = tokenizer(pair.prompt + pair.completion + tokenizer.eos_token)["input_ids"]
    if whole[: len(prompt)] != prompt:
        raise ValueError("the prompt's tokens do not begin those of prompt and answer: no fair scoring is possible")
    return whole, len(prompt)


@torch.no_grad()
def _mean_loss(model: Any, examples: Sequence[tuple[list[int], int]]) -> float:
    total, count = 0.0, 0
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch])
        labels = torch.tensor([[-100] * cut + ids[cut:] + [-100] * (length - len(ids)) for ids, cut in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        targets = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        total, count = total + float(loss), count + int((targets != -100).sum())
    return total / count
