"""What each protection leaves to the span attack: one table and one picture, on a model and sentences of your own.

Every row trains LoRA on q, k and v from one start, as an institution does, and attacks what leaves it: the tokens that
are named, false ones, the AUC of ranking the vocabulary by presence, beside what word frequency alone gives. Word
frequency is counted in sentences of the same file that nobody trains on. The last line of output is a JSON object.

    python benchmarks/leakage.py MODEL SENTENCES.jsonl --picture leakage.png
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from silotune import tensors as arithmetic
from silotune.evaluation.leakage import span
from silotune.federation.wire.messages import layout_of
from silotune.methods.compress.pack import pack_update, unpack
from silotune.models import adapters
from silotune.models.adapters import attach
from silotune.models.load import load_base, rows_of
from silotune.privacy.accountant import noise_for
from silotune.seeds import derive
from silotune.settings.adapters import Lora
from silotune.settings.links import CompressionSection
from silotune.settings.sections import ModelSection, TrainingSection
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace, train_round
from silotune.training.private import DpSgd

DELTA = 1e-5
PUBLIC = 400
"""Sentences that word frequency is counted in."""
STEPS_OF_ADAMW = 16


@dataclass(frozen=True)
class Case:
    """One row: how many texts of how many tokens, by which rule, under which protection."""

    name: str
    texts: int = 1
    length: int = 24
    rank: int = 16
    steps: int = 1
    rounds: int = 1
    clients: int = 1
    optimizer: str = "sgd"
    values: str = "float32"
    noise: float = 0.0
    epsilon: float | None = None
    in_order: bool = False
    from_zero: bool = False


CASES = (
    Case("none, one step", in_order=True),
    Case("none, four steps", steps=4, in_order=True),
    Case("none, two texts", texts=2, length=20, in_order=True),
    Case("rank 8, first round (B = 0)", texts=4, length=16, rank=8, steps=4, from_zero=True),
    Case("rank 8, two rounds", texts=4, length=16, rank=8, steps=4, rounds=2, from_zero=True),
    Case("rank 8, three rounds", texts=4, length=16, rank=8, steps=4, rounds=3, from_zero=True),
    Case("secure sum of four", texts=4, length=12, clients=4),
    Case("upload in bfloat16", values="bfloat16"),
    Case("upload in int8", values="int8"),
    Case("noise, 0.01 % of the norm", noise=1e-4),
    Case("noise, 1 % of the norm", noise=1e-2),
    Case("AdamW", steps=STEPS_OF_ADAMW, optimizer="adamw"),
    Case("AdamW, four texts", texts=4, steps=STEPS_OF_ADAMW, optimizer="adamw"),
    Case("DP-SGD, epsilon 100", epsilon=100.0),
    Case("DP-SGD, epsilon 8", epsilon=8.0),
    Case("DP-SGD, epsilon 2", epsilon=2.0),
)


class Bench:
    """The model, its sentences as ids, and how often each id stands in those that nobody trains on."""

    def __init__(self, model: str, sentences: Path, seed: int) -> None:
        self.model, self.seed = model, seed
        self.base = load_base(ModelSection(name=model))
        with sentences.open(encoding="utf-8") as file:
            lines = [json.loads(line)["text"] for line, _ in zip(file, range(PUBLIC + 64), strict=False)]
        self.ids = [self.base.tokenizer(line)["input_ids"] for line in lines[:64]]
        counts = torch.full((rows_of(self.base.model),), 0.5, dtype=torch.float64)
        for line in lines[64:]:
            for token in self.base.tokenizer(line)["input_ids"]:
                counts[token] += 1
        self.log_frequency = counts.log()

    def texts(self, case: Case) -> list[Encoded]:
        long = [ids for ids in self.ids if len(ids) >= case.length][: case.texts]
        return [Encoded(tuple(ids[:1]), tuple(ids[1 : case.length])) for ids in long]

    def row(self, case: Case) -> dict[str, Any]:
        """Trains as the case says, attacks, and gives the figures."""
        self.base = load_base(ModelSection(name=self.model))
        section = Lora(rank=case.rank, alpha=2 * case.rank, targets=["q_proj", "k_proj", "v_proj"])
        adapted = attach(self.base, section, seed=self.seed)
        start = adapters.read(adapted)
        if not case.from_zero:
            draw = torch.Generator().manual_seed(self.seed + 1)
            start = {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in start.items()}
        texts, weights, seen = self.texts(case), start, []
        for number in range(1, case.rounds + 1):
            update = self.update(adapted, weights, texts, case, number)
            seen.append(protected(update, case, seed=self.seed))
            weights = arithmetic.add(weights, update)
        adapters.write(adapted, start)
        began = time.perf_counter()
        found = span.attack(adapted, seen, weights=start, in_order=case.in_order)
        assert found is not None
        return {**vars(case), **self.figures(found, texts), "seconds": time.perf_counter() - began}

    def update(self, adapted: Any, start: Tensors, texts: Sequence[Encoded], case: Case, number: int) -> Tensors:
        """One round of all clients together."""
        rate = 0.1 if case.optimizer == "sgd" else 1e-3
        share = len(texts) // case.clients
        settings = TrainingSection(
            optimizer=case.optimizer, learning_rate=rate, batch_size=share, max_steps=case.steps, clip_norm=0
        )
        private = None
        if case.epsilon is not None:
            private = DpSgd(noise_for(case.epsilon, DELTA, steps=case.steps), 1.0)
        total: Tensors = {}
        for client in range(case.clients):
            place = RoundPlace(derive(self.seed, "train", round_number=number, client=str(client)))
            own = texts[client * share : (client + 1) * share]
            place = replace(place, private=private)
            made = train_round(adapted, start, own, settings=settings, place=place).delta
            total = arithmetic.add(total, made) if total else made
        return total

    def figures(self, found: span.Found, texts: Sequence[Encoded]) -> dict[str, Any]:
        """What was found, beside word frequency with as many guesses."""
        present = {token for text in texts for token in (*text.prompt, *text.answer)}
        guesses = len(found.tokens)
        likeliest = set(torch.topk(self.log_frequency, guesses).indices.tolist()) if guesses else set()
        whole = [(*text.prompt, *text.answer) for text in texts]
        return {
            "present": len(present),
            "found": len(found.tokens & present),
            "false": len(found.tokens - present),
            "by_frequency": len(likeliest & present),
            "directions": found.rank,
            "auc": span.area(2 * found.presence + self.log_frequency, present),
            "auc_of_frequency": span.area(self.log_frequency, present),
            "rouge_l": [max((span.rouge_l(each, text) for each in found.texts), default=0.0) for text in whole],
            "longest": max((len(each) for each in found.texts), default=0),
            "prefixes": found.tried,
        }


def protected(update: Tensors, case: Case, *, seed: int) -> Tensors:
    """The update as the coordinator gets it."""
    if case.values != "float32":
        settings = CompressionSection(values=case.values)
        layout = layout_of(update)
        packed, _ = pack_update(update, {}, settings, layout=layout, seed=seed)
        return unpack(packed, settings, layout)
    if case.noise:
        draw = torch.Generator().manual_seed(seed)
        size = case.noise * arithmetic.norm(update) / arithmetic.count(update) ** 0.5
        return {name: value + size * torch.randn(value.shape, generator=draw) for name, value in update.items()}
    return update


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    names = "protection | rank, texts x tokens, steps | directions | found | false | by frequency | AUC | of frequency"
    yield f"| {names} | order |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        order = f"{max(row['rouge_l']):.2f}, {row['longest']} tokens" if row["in_order"] else ""
        yield (
            f"| {row['name']} | {row['rank']}, {row['texts']} x {row['length']}, {row['rounds'] * row['steps']} | "
            f"{row['directions']} | {row['found']} of {row['present']} | {row['false']} | {row['by_frequency']} | "
            f"{row['auc']:.3f} | {row['auc_of_frequency']:.3f} | {order} |"
        )


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """What each protection leaves: tokens named, and how much better than frequency the vocabulary is ranked."""
    from silotune.report.pictures import canvas, save_picture

    figure, axes = canvas(8, 0.34 * len(rows) + 1)
    names = [row["name"] for row in rows][::-1]
    shares = [row["found"] / row["present"] for row in rows][::-1]
    lifts = [max(0.0, row["auc"] - row["auc_of_frequency"]) / (1 - row["auc_of_frequency"]) for row in rows][::-1]
    places = list(range(len(rows)))
    axes.barh([place + 0.2 for place in places], shares, 0.38, color="#35618f", label="tokens named exactly")
    axes.barh(
        [place - 0.2 for place in places], lifts, 0.38, color="#d18f3c", label="of what word frequency leaves unranked"
    )
    axes.set_yticks(places, names)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share recovered")
    axes.legend(frameon=False, loc="lower right")
    save_picture(figure, out)


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a Llama-like model")
    parser.add_argument("sentences", type=Path, help="JSON lines with a key text")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bench = Bench(given.model, given.sentences, given.seed)
    rows = []
    for case in CASES:
        rows.append(bench.row(case))
        print(f"{case.name}: {rows[-1]['found']} of {rows[-1]['present']}, {rows[-1]['seconds']:.1f} s", flush=True)
    for line in table(rows):
        print(line)
    if given.picture:
        draw(rows, given.picture)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
