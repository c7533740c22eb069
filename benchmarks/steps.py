"""One local training step in one process: SFTTrainer's against silotune's, on the same model and the same texts."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from workload import Pair, Settings

VOCABULARY = 32_000
LABELS = ("w10", "w11 w12", "w13 w14 w15")
WARM_UP = 2
"""Steps at the start of every repetition that are not counted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama with random weights."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


SHAPES: Mapping[str, Shape] = {
    "llama-32k": Shape(288, 768, 6, 6, 6, VOCABULARY),
    "smollm2": Shape(576, 1536, 30, 9, 3, 49_152),
}
"""Name -> a small model with a real vocabulary, and SmolLM2-135M's shape."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """Seconds of each counted step of both sides, and the mean training loss of both."""

    peer: tuple[float, ...]
    silotune: tuple[float, ...]
    peer_loss: float
    silotune_loss: float


def closed_ended(count: int, seed: int) -> list[Pair]:
    """Prompts of 25 to 40 tokens with a label of one to three tokens, as sentences of financial news have."""
    draw = random.Random(seed)  # noqa: S311
    return [Pair(_words(draw, draw.randint(25, 40)), " " + draw.choice(LABELS)) for _ in range(count)]


def instructions(count: int, seed: int) -> list[Pair]:
    """Prompts of about 40 tokens with answers of about 100, both varying widely (lognormal lengths)."""
    draw = random.Random(seed)  # noqa: S311

    def length(middle: float, least: int, most: int) -> int:
        return min(most, max(least, round(middle * draw.lognormvariate(0.0, 0.5))))

    return [Pair(_words(draw, length(40, 12, 120)), " " + _words(draw, length(100, 20, 300))) for _ in range(count)]


KINDS: Mapping[str, Callable[[int, int], list[Pair]]] = {"fpb-like": closed_ended, "instruct": instructions}


def _words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(100, VOCABULARY)}" for _ in range(count))


def make_model(folder: Path, shape: Shape) -> None:
    """Writes a randomly initialised Llama of this shape and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, shape.vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


@contextmanager
def step_clock(ends: list[float]) -> Any:
    """Notes when every optimiser step in the process ends, whoever takes it."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handle = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        yield
    finally:
        handle.remove()


def _gaps(ends: Sequence[float]) -> tuple[float, ...]:
    """Seconds from one step's end to the next: batching, forward, backward, clipping and the step itself."""
    gaps = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
    return tuple(gaps[WARM_UP - 1 :])


def peer_steps(settings: Settings, pairs: Sequence[Pair], folder: Path) -> tuple[tuple[float, ...], float]:
    """One epoch of SFTTrainer; tokenizing and set-up are not counted."""
    from datasets import Dataset
    from flower_trl_app import load_model, trainer_config
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=load_model(settings),
        args=trainer_config(settings, str(folder / "trainer"), seed=settings.seed, epochs=1.0),
        train_dataset=Dataset.from_list([asdict(pair) for pair in pairs]),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
    )
    ends: list[float] = []
    with step_clock(ends):
        result = trainer.train()
    return _gaps(ends), float(result.training_loss)


def make_silotune(settings: Settings, pairs: Sequence[Pair]) -> Callable[[], tuple[tuple[float, ...], float]]:
    """One epoch of silotune's local round, ready to be run again and again from the same adapter."""
    from silotune.models import adapters
    from silotune.models.load import load_base
    from silotune.settings.adapters import Lora
    from silotune.settings.sections import ModelSection, TrainingSection
    from silotune.structs import Example
    from silotune.training.encoder import Encoder
    from silotune.training.local import RoundPlace, train_round
    from silotune.training.probe import probed

    model = ModelSection(name=settings.model, device="cpu", max_length=settings.max_length, offline=True)
    adapter = Lora(rank=settings.rank, alpha=settings.alpha, targets="all-linear")
    training = TrainingSection(learning_rate=settings.learning_rate, batch_size=settings.batch_size, epochs=1.0)
    adapted = probed(adapters.attach(load_base(model), adapter, seed=settings.seed), model)
    first = adapters.read(adapted)
    examples = [Example((("user", pair.prompt),), pair.completion.strip()) for pair in pairs]
    encoded = Encoder(adapted.base.tokenizer, max_length=settings.max_length)(examples)

    def once() -> tuple[tuple[float, ...], float]:
        ends: list[float] = []
        with step_clock(ends):
            result = train_round(adapted, first, encoded, settings=training, place=RoundPlace(settings.seed))
        return _gaps(ends), result.loss

    return once


def compare(settings: Settings, kind: str, *, examples: int, repetitions: int, folder: Path) -> list[Repetition]:
    """Alternating repetitions of both sides over the same epoch of examples."""
    pairs = KINDS[kind](examples, settings.seed)
    own = make_silotune(settings, pairs)
    found = []
    for number in range(repetitions):
        order = ("peer", "silotune") if number % 2 == 0 else ("silotune", "peer")
        seen = {side: own() if side == "silotune" else peer_steps(settings, pairs, folder) for side in order}
        found.append(Repetition(seen["peer"][0], seen["silotune"][0], seen["peer"][1], seen["silotune"][1]))
    return found


def main() -> None:
    """Measures one kind of data and writes the mean step of every repetition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-32k")
    parser.add_argument("--threads", type=int, help="of both sides; default: as torch decides")
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.output.resolve().parent
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = folder / arguments.shape
    if not model.is_dir():
        make_model(model, SHAPES[arguments.shape])
    settings = Settings(model=str(model), batch_size=arguments.batch_size, learning_rate=1e-3, max_length=448)
    found = compare(
        settings, arguments.kind, examples=arguments.examples, repetitions=arguments.repetitions, folder=folder
    )
    sides = {
        "peer": [statistics.fmean(one.peer) for one in found],
        "silotune": [statistics.fmean(one.silotune) for one in found],
        "peer_median": [statistics.median(one.peer) for one in found],
        "silotune_median": [statistics.median(one.silotune) for one in found],
        "peer_loss": [one.peer_loss for one in found],
        "silotune_loss": [one.silotune_loss for one in found],
    }
    arguments.output.write_text(json.dumps(sides), encoding="utf-8")


if __name__ == "__main__":
    main()
