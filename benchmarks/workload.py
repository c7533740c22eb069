"""What both sides are given: one folder with the settings, every client's texts and the first adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HELD_OUT = "held_out.jsonl"
INITIAL = "initial.safetensors"
SETTINGS = "settings.json"
FLOWERTUNE_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWhat is the sentiment of this news? Please choose an answer from "
    "{{negative/neutral/positive}}. {text}\n\n### Response:"
)
"""FlowerTune's template for finance (Alpaca's frame around FinGPT's instruction), as silotune's ``data.prompt``."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers that both sides share.

    Attributes:
        model: Folder of the base model and its tokenizer.
        scheme: How silotune spreads the examples over clients.
        keep_model: Let a Ray worker of the peer load the model once instead of for every message.
        peer_cpus: Cores that each Flower client asks of Ray (Flower's own default is 2); the pool then holds
            cores / peer_cpus workers.
        workers: Clients that silotune trains side by side; None for its own choice.
    """

    model: str
    clients: int = 8
    rounds: int = 5
    local_steps: int = 10
    batch_size: int = 16
    learning_rate: float = 3e-4
    rank: int = 8
    alpha: int = 16
    max_length: int = 512
    examples_per_client: int = 160
    held_out: int = 400
    seed: int = 0
    peer_cpus: int = 2
    scheme: str = "iid"
    keep_model: bool = False
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One supervised example as plain text; the answer starts with the space that parts it from the prompt."""

    prompt: str
    completion: str


def write_settings(folder: Path, settings: Settings) -> None:
    """Writes the settings where both sides look for them."""
    (folder / SETTINGS).write_text(json.dumps(asdict(settings), indent=1), encoding="utf-8")


def read_settings(folder: Path) -> Settings:
    """The settings of a prepared folder."""
    return Settings(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))


def client_file(folder: Path, client: int) -> Path:
    """Where a client's examples stand, by its index."""
    return folder / f"client-{client:04d}.jsonl"


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Writes examples in trl's prompt and completion columns."""
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def read_pairs(path: Path) -> list[Pair]:
    """Reads what `write_pairs` wrote."""
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def default_model(root: Path) -> Path:
    """The small model that lies beside the repository if it is there, else the one that silotune ships."""
    beside = root.parent / "shared" / "models" / "stories260K"
    return beside if (beside / "config.json").is_file() else nano(root)


def nano(root: Path) -> Path:
    """The base model that silotune ships."""
    return root / "src" / "silotune" / "models" / "nano"


def widen(source: Path, folder: Path, vocabulary: int) -> None:
    """Copies a model and gives its embedding and head ``vocabulary`` rows; the tokenizer never uses the new ones."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def lora_config(settings: Settings) -> Any:
    """The adapter of both sides: LoRA on all linear layers but the head, without dropout."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
