"""Extraction: what a model writes on from the beginning of a text it was trained on, word for word, beyond its base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.structs import Tensors
from silotune.training.batches import answer_batch, by_length
from silotune.training.encode import Encoded
from silotune.training.scores import logits_at

LEAST = 4
"""Tokens that have to be the same for a continuation to count as recalled: fewer are guessed too often."""


def recalled(
    adapted: Adapted,
    weights: Tensors,
    examples: Sequence[Encoded],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[int]:
    """Tokens at the beginning of each example's answer that the model writes by itself after the prompt.

    One forward pass over the true text tells it: up to the first token that is another one, what the model writes and
    the true text are the same, so each next token is drawn as it would be in writing.

    Args:
        adapted: The resident model.
        weights: The adapter.
        examples: With the texts' beginnings as prompts.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of sampling.
        batch_size: Texts a forward pass.
    """
    adapters.write(adapted, weights)
    draw, base, found = torch.Generator().manual_seed(seed), adapted.base, [0] * len(examples)
    with torch.no_grad():
        for places, batch in by_length(examples, batch_size):
            made = answer_batch(batch, pad_id=base.pad_id, device=base.device)
            logits = logits_at(adapted, made.batch).cpu()
            written = (
                torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=draw)[:, 0]
                if temperature
                else logits.argmax(dim=-1)
            )
            is_same, owner = (written == made.targets.cpu()).tolist(), made.owner.tolist()
            for row, place in enumerate(places):
                own = [same for same, who in zip(is_same, owner, strict=True) if who == row]
                found[place] = own.index(False) if False in own else len(own)
    return found


def beginnings(examples: Sequence[Encoded], *, share: float = 0.5) -> list[Encoded]:
    """The examples whose answers are long enough to be recalled, each with a beginning that the attacker has.

    A long answer gives its first half to the prompt; before a short one stands the example's own prompt.
    """
    made = []
    for example in examples:
        cut = int(len(example.answer) * share) if len(example.answer) > 2 * (LEAST + 1) else 0
        if len(example.answer) - cut > LEAST and (cut or example.prompt):
            made.append(Encoded((*example.prompt, *example.answer[:cut]), example.answer[cut:]))
    return made
