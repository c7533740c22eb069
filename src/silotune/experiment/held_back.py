"""What of a client's examples is held back from training, so that the run can be attacked with an answer at hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from silotune.config import Config
from silotune.errors import DataError
from silotune.evaluation.leakage.canaries import with_odd_end
from silotune.seeds import derive
from silotune.training.encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_LEFT = 2
"""Examples that have to be left to train on."""


@dataclass(frozen=True)
class HeldBack:
    """A client's examples, parted.

    Attributes:
        members: Those that are trained on.
        rows: Place of each member among the client's examples, from 0 on.
        reserve: Those that nothing is trained on.
        canaries: Those with odd ends.
        was_in: Whether the coin of each canary put it into the training.
    """

    members: tuple[Encoded, ...]
    rows: tuple[int, ...]
    reserve: tuple[Encoded, ...] = ()
    canaries: tuple[Encoded, ...] = ()
    was_in: tuple[bool, ...] = ()

    @property
    def trained(self) -> list[Encoded]:
        """All that is trained on: the members, and the canaries whose coins said so."""
        inserted = [canary for canary, is_in in zip(self.canaries, self.was_in, strict=True) if is_in]
        return [*self.members, *inserted]


def sampled(count: int, most: int, *, seed: int, purpose: str) -> list[int]:
    """At most ``most`` of so many places, drawn by the run's seed, in order."""
    places = list(range(count))
    random.Random(derive(seed, purpose)).shuffle(places)  # noqa: S311
    return sorted(places[:most])


def hold_back(
    examples: Sequence[Encoded], config: Config, *, client: str, tokenizer: PreTrainedTokenizerBase, classes: int = 0
) -> HeldBack:
    """Parts a client's examples by the run's seed, the same in every round and in an audit afterwards.

    Args:
        examples: The client's.
        config: The run's.
        client: Its name.
        tokenizer: Of the base, whose ids canaries are made of.
        classes: Of a classifier, whose canaries have other labels; 0 for a language model.

    Raises:
        DataError: Too few would be left to train on.
    """
    count, canaries = len(examples), config.privacy.canaries
    reserved = round(count * config.audit.reserve) if config.audit.leakage else 0
    if not examples or not (reserved or canaries):
        return HeldBack(tuple(examples), tuple(range(count)))
    if count - reserved - canaries < LEAST_LEFT:
        raise DataError(
            f"client {client!r} has {count} examples: privacy.canaries = {canaries} and audit.reserve, which takes "
            f"{reserved}, leave too few to train on; make them smaller"
        )
    order = list(range(count))
    random.Random(derive(config.seed, "held-back", client=client)).shuffle(order)  # noqa: S311
    odd, aside, left = order[:canaries], order[canaries : canaries + reserved], sorted(order[canaries + reserved :])
    coins = random.Random(derive(config.seed, "canary-coins", client=client))  # noqa: S311
    words = [token for token in range(len(tokenizer)) if token not in set(tokenizer.all_special_ids)] if odd else []
    return HeldBack(
        tuple(examples[place] for place in left),
        tuple(left),
        tuple(examples[place] for place in aside),
        tuple(
            with_odd_end(
                examples[place],
                seed=derive(config.seed, "canary", round_number=place, client=client),
                vocabulary=words,
                classes=classes,
            )
            for place in odd
        ),
        tuple(coins.random() < 0.5 for _ in odd),
    )
