"""Audits DP-SGD on whole local rounds of a LoRA adapter: what an attacker can prove of it against what is claimed.

Canaries are examples with texts and answers at random; a fair coin puts each into an institution's data or leaves it
out (Steinke, Nasr and Jagielski 2023). The attacker sees the adapter before and after every local round, and explains
each update by least squares as a sum of the canaries' own clipped gradients: a canary's score is its coefficient.
With n canaries no bound above about ln(n / 4) can be proved, so the claim must be smaller. Prints one JSON object.

    python benchmarks/privacy_audit.py --canaries 200 --rounds 4 --noise 4
    python benchmarks/privacy_audit.py --canaries 200 --rounds 4 --noise 4 --sabotage 0.05
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace

import torch

from silotune import tensors as arithmetic
from silotune.models import adapters
from silotune.models.adapters import Adapted, attach
from silotune.models.load import load_base
from silotune.privacy.accountant import Spend, epsilon
from silotune.privacy.audit import guesses_right, lower_bound
from silotune.settings.adapters import Lora
from silotune.settings.sections import ModelSection, TrainingSection
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.examplewise import gradients, losses_of
from silotune.training.local import RoundPlace, train_round
from silotune.training.private import DpSgd, sampling_rate
from silotune.training.probe import probed

DELTA = 1e-5
LENGTH = 12
"""Ids of a canary's prompt."""


def canaries_of(count: int, adapted: Adapted, draw: random.Random) -> list[Encoded]:
    """Examples of random ids: nothing in the base speaks for them."""
    size = adapted.base.model.config.vocab_size
    return [
        Encoded(tuple(draw.randrange(size) for _ in range(LENGTH)), tuple(draw.randrange(size) for _ in range(4)))
        for _ in range(count)
    ]


def scores_of(
    adapted: Adapted, canaries: list[Encoded], rounds: list[tuple[Tensors, Tensors]], *, clip_norm: float
) -> list[float]:
    """Sum over rounds of each canary's coefficient in the update; that of a canary that was in is larger."""
    totals = torch.zeros(len(canaries), dtype=torch.float64)
    for received, delta in rounds:
        adapters.write(adapted, received)
        rows = []
        for start in range(0, len(canaries), 20):
            by_example, _ = gradients(adapted, canaries[start : start + 20], losses_of(TrainingSection()))
            flat = torch.cat([by_example[name].flatten(1) for name in sorted(by_example)], dim=1)
            rows.append(flat / (flat.norm(dim=1, keepdim=True) / clip_norm).clamp(min=1))
        every = torch.cat(rows).double()  # [canaries, values]
        gram = every @ every.T
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        totals -= torch.linalg.solve(gram + ridge, every @ arithmetic.flatten(delta).double())
    return totals.tolist()


def main() -> None:
    """Runs the audit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--canaries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4, help="local rounds of one step over all examples")
    parser.add_argument("--noise", type=float, default=4.0)
    parser.add_argument("--sabotage", type=float, default=1.0, help="share of the claimed noise that is really added")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)  # noqa: S311
    model = ModelSection(name=given.model)
    adapted = probed(attach(load_base(model), Lora(targets="all-linear"), seed=given.seed), model)
    noise = torch.Generator().manual_seed(given.seed)
    weights = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in adapters.read(adapted).items()
    }
    canaries = canaries_of(given.canaries, adapted, draw)
    was_in = [draw.random() < 0.5 for _ in canaries]
    held = [canary for canary, is_in in zip(canaries, was_in, strict=True) if is_in]
    settings = TrainingSection(optimizer="sgd", learning_rate=0.5, batch_size=20, max_steps=1)
    settings = settings.model_copy(update={"gradient_accumulation": -(-len(held) // 20)})
    rate = sampling_rate(len(held), settings.batch_size, settings.gradient_accumulation)
    seen = []
    for number in range(1, given.rounds + 1):
        private = DpSgd(given.noise * given.sabotage, 1.0)
        place = replace(RoundPlace(given.seed, number, given.rounds), private=private)
        made = train_round(adapted, weights, held, settings=settings, place=place)
        seen.append((weights, made.delta))
        weights = arithmetic.add(weights, made.delta)
    scores = scores_of(adapted, canaries, seen, clip_norm=1.0)
    tried = sorted({max(2, len(canaries) // part) // 2 * 2 for part in (1, 2, 4, 8)})
    confidence = 1 - 0.05 / len(tried)  # Bonferroni: the best of several numbers of guesses is taken
    found = {}
    for guesses in tried:
        right = guesses_right(scores, was_in, guesses)
        bound = lower_bound(right, guesses, len(canaries), delta=DELTA, confidence=confidence)
        found[guesses] = (right, bound)
    claimed = epsilon([Spend(given.noise, rate, given.rounds)], DELTA)
    best = max(bound for _, bound in found.values())
    print(
        json.dumps(
            {
                "claimed_epsilon": claimed,
                "lower_bound": best,
                "holds": best <= claimed,
                "guesses": {str(key): {"right": right, "lower_bound": bound} for key, (right, bound) in found.items()},
                **vars(given),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
