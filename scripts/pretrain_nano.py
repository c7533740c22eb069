"""Pre-trains `nano`, the tiny causal LM that silotune ships, from public-domain text and generated text.

The tokenizer is a byte-level BPE; the model has the Llama architecture. Batch `n` depends on the seed and `n` alone,
so a run that was stopped and resumed sees the text of one that was not. Example:

    python scripts/pretrain_nano.py --text text_novels/train.jsonl --validation-text text_novels/validation.jsonl \
        --out nano --steps 6000 --decay-from 4800
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from silotune.data.embedded import corpus

SPECIAL = {
    "bos": "<|bos|>",
    "eos": "<|eos|>",
    "pad": "<|pad|>",
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VALIDATION_SEED = 1_000_000_007
TOKENIZER_DOCUMENTS = 40_000
CARD = Path(__file__).with_name("nano_card.md")


@dataclass
class Progress:
    """Where a run stands; together with the tensors it is the whole checkpoint."""

    step: int = 0
    tokens: int = 0
    decay_from: int = 0
    steps: int = 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="JSONL files with a field `text`")
    parser.add_argument(
        "--validation-text", type=Path, nargs="*", default=[], help="JSONL files for the validation loss only"
    )
    parser.add_argument(
        "--text-share", type=float, default=0.015, help="share of documents from --text; the rest is generated"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument(
        "--work", type=Path, help="folder for checkpoints and the log (default: OUT with -work appended)"
    )
    parser.add_argument("--steps", type=int, default=0, help="number of steps; needs --decay-from")
    parser.add_argument("--decay-from", type=int, default=0, help="first step of the decay to learning rate zero")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="instead of --steps: stop after this time, last fifth decays"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the work folder")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequence", type=int, default=256, help="tokens in a packed training sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="processor threads; 0 leaves torch's choice")
    options = parser.parse_args(arguments)
    if not options.minutes and not 0 < options.decay_from < options.steps:
        parser.error("give --minutes, or --steps and a smaller --decay-from")
    options.work = options.work or options.out.with_name(options.out.name + "-work")
    return options


def read_texts(paths: list[Path]) -> list[str]:
    """The `text` fields of JSONL files."""
    return [json.loads(line)["text"] for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def render(document: corpus.Document) -> str:
    """A generated document as the chat template writes it, or as plain prose."""
    if document[0]["role"] == "text":
        return SPECIAL["bos"] + document[0]["content"] + SPECIAL["eos"]
    turns = (SPECIAL[turn["role"]] + turn["content"] for turn in document)
    return SPECIAL["bos"] + "".join(turns) + SPECIAL["eos"]


def train_tokenizer(texts: list[str], vocabulary: int, seed: int) -> Tokenizer:
    """A byte-level BPE over generated text and a sample of `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    generated = itertools.islice(corpus.documents(seed=seed), TOKENIZER_DOCUMENTS)
    lines = [turn["content"] for document in generated for turn in document]
    lines += random.Random(seed).sample(texts, min(len(texts), TOKENIZER_DOCUMENTS // 20))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer in the form Hugging Face loads."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["eos"],
        pad_token=SPECIAL["pad"],
        additional_special_tokens=[SPECIAL["system"], SPECIAL["user"], SPECIAL["assistant"]],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(options: argparse.Namespace, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A randomly initialised model of the shape asked for."""
    torch.manual_seed(options.seed)
    ids = {name: tokenizer.token_to_id(SPECIAL[name]) for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
    )
    return LlamaForCausalLM(config)


def batch_documents(texts: list[str], text_share: float, *, seed: int) -> Iterator[str]:
    """An endless mixture of `texts` and generated documents that depends on `seed` alone."""
    generator = random.Random(f"mixture/{seed}")
    generated = corpus.documents(seed=seed)
    while True:
        if texts and generator.random() < text_share:
            yield SPECIAL["bos"] + generator.choice(texts) + SPECIAL["eos"]
        else:
            yield render(next(generated))


def pack(tokenizer: Tokenizer, documents: Iterator[str], *, batch: int, sequence: int) -> torch.Tensor:
    """Token ids of shape [batch, sequence], documents laid end to end."""
    ids: list[int] = []
    while len(ids) < batch * sequence:
        encodings = tokenizer.encode_batch(list(itertools.islice(documents, 16)), add_special_tokens=False)
        ids += [token for encoding in encodings for token in encoding.ids]
    return torch.tensor(ids[: batch * sequence]).view(batch, sequence)


def choose_device(name: str) -> tuple[torch.device, bool]:
    """The device, and whether its hardware computes in bf16."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), torch.cuda.is_bf16_supported()
    processor = Path("/proc/cpuinfo")
    return torch.device("cpu"), processor.exists() and "avx512_bf16" in processor.read_text()


def learning_rate(options: argparse.Namespace, progress: Progress) -> float:
    """Linear warm-up, constant, then linear decay to zero."""
    rate = options.learning_rate * min(1.0, (progress.step + 1) / options.warmup)
    if progress.decay_from and progress.step >= progress.decay_from:
        rate *= max(0.0, (progress.steps - progress.step) / (progress.steps - progress.decay_from))
    return rate


def save_checkpoint(folder: Path, model: LlamaForCausalLM, optimiser: torch.optim.AdamW, progress: Progress) -> None:
    """Writes tensors as safetensors and the rest as JSON; each file is replaced in one step."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).contiguous()
    save_file(tensors, folder / "checkpoint.tmp", metadata={"progress": json.dumps(asdict(progress))})
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.safetensors")
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimiser: torch.optim.AdamW) -> Progress:
    """Puts a checkpoint back into the model and the optimiser."""
    tensors = load_file(folder / "checkpoint.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        moments = {key: tensors[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device) for key in keys}
        optimiser.state[parameter] = moments
    saved = json.loads((folder / "progress.json").read_text())
    return Progress(step=saved["step"], tokens=saved["tokens"])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, documents: Iterator[str], sequence: int) -> float:
    """Mean loss in nats a token over 128 packed sequences."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for _ in range(8):
        ids = pack(tokenizer, documents, batch=16, sequence=sequence).to(device)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    model.train()
    return sum(losses) / len(losses)


def make_optimiser(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices but not norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def end_of_time(options: argparse.Namespace, progress: Progress, started: float, first: int) -> None:
    """With `--minutes`: once four fifths of the time are over, fixes where the decay ends."""
    elapsed = (time.monotonic() - started) / 60
    if options.minutes and not progress.decay_from and elapsed >= 0.8 * options.minutes:
        progress.decay_from = progress.step
        progress.steps = progress.step + max(1, round((progress.step - first) / 4))


def train(
    options: argparse.Namespace, tokenizer: Tokenizer, texts: list[str]
) -> tuple[LlamaForCausalLM, Progress, float]:
    """Runs the steps; returns the model, where it stands, and the mean training loss of the last 50 steps."""
    device, has_bf16 = choose_device(options.device)
    model = build_model(options, tokenizer).to(device)
    optimiser = make_optimiser(model, options.learning_rate)
    progress = load_checkpoint(options.work, model, optimiser) if options.resume else Progress()
    progress.decay_from, progress.steps = options.decay_from, options.steps
    precision = torch.autocast(device.type, torch.bfloat16) if has_bf16 else contextlib.nullcontext()
    started, first, losses = time.monotonic(), progress.step, []
    while not progress.steps or progress.step < progress.steps:
        documents = batch_documents(texts, options.text_share, seed=options.seed * 1_000_003 + progress.step)
        ids = pack(tokenizer, documents, batch=options.batch, sequence=options.sequence).to(device)  # [batch, sequence]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(options, progress)
        with precision:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        progress.step += 1
        progress.tokens += ids.numel()
        end_of_time(options, progress, started, first)
        if progress.step % 20 == 0:
            record = {
                **asdict(progress),
                "loss": sum(losses[-20:]) / len(losses[-20:]),
                "seconds": round(time.monotonic() - started, 1),
            }
            with (options.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        if progress.step % options.checkpoint_every == 0 and not progress.decay_from:
            save_checkpoint(options.work, model, optimiser, progress)
    return model, progress, sum(losses[-50:]) / max(1, len(losses[-50:]))


def reproduce_command(options: argparse.Namespace, progress: Progress) -> str:
    """The command that repeats this run, with paths relative to the data folder."""
    parts = ["python scripts/pretrain_nano.py", "--text", *("/".join(path.parts[-2:]) for path in options.text)]
    if options.validation_text:
        parts += ["--validation-text", *("/".join(path.parts[-2:]) for path in options.validation_text)]
    parts += ["--out nano", f"--steps {progress.steps}", f"--decay-from {progress.decay_from}"]
    for name in (
        "seed",
        "text_share",
        "vocabulary",
        "layers",
        "width",
        "heads",
        "context",
        "sequence",
        "batch",
        "learning_rate",
        "warmup",
    ):
        parts.append(f"--{name.replace('_', '-')} {getattr(options, name)}")
    return " ".join(parts)


def describe(
    options: argparse.Namespace, model: LlamaForCausalLM, progress: Progress, losses: dict[str, float | None]
) -> str:
    """The model card."""
    generated, text = losses["generated"], losses["text"]
    assert generated is not None
    values: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "text_files": ", ".join(f"`{'/'.join(path.parts[-2:])}`" for path in options.text),
        "train_loss": losses["train"],
        "generated_loss": generated,
        "generated_perplexity": math.exp(generated),
        "text_loss": "not measured" if text is None else f"{text:.3f} nats a token (perplexity {math.exp(text):.1f})",
        "command": reproduce_command(options, progress),
    }
    for name in (
        "layers",
        "width",
        "heads",
        "context",
        "text_share",
        "batch",
        "sequence",
        "learning_rate",
        "warmup",
        "seed",
    ):
        values[name] = getattr(options, name)
    return CARD.read_text(encoding="utf-8").format(**values, **asdict(progress))


def main() -> None:
    """Trains tokenizer and model, and writes the finished folder."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    texts = read_texts(options.text)
    vocabulary_file = options.work / "tokenizer.json"
    if options.resume:
        tokenizer = Tokenizer.from_file(str(vocabulary_file))
    else:
        tokenizer = train_tokenizer(texts, options.vocabulary, options.seed)
        tokenizer.save(str(vocabulary_file))
    model, progress, train_loss = train(options, tokenizer, texts)
    losses: dict[str, float | None] = {"train": train_loss, "text": None}
    losses["generated"] = mean_loss(model, tokenizer, batch_documents([], 0.0, seed=VALIDATION_SEED), options.sequence)
    if options.validation_text:
        passages = batch_documents(read_texts(options.validation_text), 1.0, seed=VALIDATION_SEED)
        losses["text"] = mean_loss(model, tokenizer, passages, options.sequence)
    options.out.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.token_to_id(SPECIAL[name]) for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(
        bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"], max_new_tokens=64
    )
    model.to("cpu").float().save_pretrained(options.out)
    wrap_tokenizer(tokenizer, options.context).save_pretrained(options.out)
    (options.out / "README.md").write_text(describe(options, model, progress, losses), encoding="utf-8")
    print(json.dumps({**asdict(progress), **losses}), file=sys.stderr)


if __name__ == "__main__":
    main()
