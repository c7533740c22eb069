"""What updates of plain gradient steps show of the text that they were made from, and the warning before such a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from silotune.config import Config
from silotune.methods.algorithms import local_training
from silotune.record.printable import counted
from silotune.structs import Tensors


@dataclass(frozen=True, slots=True)
class Exposed:
    """How much of what a model read a sum of its updates shows, where they are sums of plain gradients.

    Attributes:
        ranks: Of the adapted modules that read the same input, their ranks one by one, in the first block.
        width: Values of that input: no more directions than these can be told apart.
    """

    ranks: tuple[int, ...]
    width: int

    def tokens(self, rounds: int) -> int:
        """How many distinct tokens (and positions, if the model adds those) can be read off the updates."""
        return min(rounds * sum(self.ranks), self.width)


_READ_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("gate_proj", "up_proj"),
)
"""Modules side by side that get the same input, by the names that transformers gives them."""


def exposed_by(trained: Tensors) -> Exposed:
    """What updates of these adapter tensors show: nothing of this kind where no factor that reads inputs is trained.

    Such are those of IA3, and of LoRA with its first factor frozen: they see the inputs through a few fixed directions.

    The row space of a gradient of y = W x lies in the span of the inputs x, and so does that of LoRA's first factor.
    Local steps and sums over clients and rounds stay in it.
    """
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for name, tensor in trained.items():
        place, found, _ = name.partition(".lora_A.")
        if not found or tensor.dim() != 2:
            continue
        block, _, module = place.rpartition(".")
        together = next((names for names in _READ_TOGETHER if module in names), (module,))
        groups.setdefault((block, *together), []).append((tensor.shape[0], tensor.shape[1]))
    if not groups:
        return Exposed((), 0)
    largest = max(groups.values(), key=lambda shapes: sum(rank for rank, _ in shapes))
    return Exposed(tuple(rank for rank, _ in largest), largest[0][1])


def exposure_lines(config: Config, exposed: Exposed | None, held: Mapping[str, int] | None = None) -> list[str]:
    """The forecast of what updates of a run show of the tokens that they are made from, and what changes it.

    Args:
        config: The whole configuration.
        exposed: What its updates show; None where the adapter is not known, or where all weights are trained.
        held: Client -> distinct tokens of its examples, where they are here.
    """
    if "federated" not in config.federation.modes:
        return []
    if exposed is not None and not exposed.ranks:
        return ["exposure: nothing that is trained reads the model's inputs, so updates do not lie in their span"]
    said = f"exposure: {_visible(config, exposed)}{_holders(exposed, config.federation.rounds, held or {})}"
    if config.privacy.dp.is_promised:
        return [f"{said} if no noise were added; the noise of privacy.dp is what hides them, so test how well it does"]
    if local_training(config.federation, config.training).optimizer.is_plain:
        return [f"{said}, exactly; {_REMEDY}"]
    return [
        f"{said}; {config.training.optimizer.type} makes them inexact, and what is left ranks words better than their "
        "frequency does: 'silotune audit leakage' says by how much"
    ]


_REMEDY = (
    "what changes it: local steps with training.optimizer = 'adamw' (inexact, not hidden), privacy.dp (noise), a "
    "smaller adapter.rank or fewer rounds, larger batches of more distinct tokens"
)


def _holders(exposed: Exposed | None, rounds: int, held: Mapping[str, int]) -> str:
    """How many clients hold fewer distinct tokens than can be told; empty where nothing is known of either."""
    known = {name: count for name, count in held.items() if count}
    if exposed is None or not known:
        return ""
    few = sum(count < exposed.tokens(rounds) for count in known.values())
    return f"; all that a client holds is fewer at {few} of {len(known)}, and batches of the others may be"


def _visible(config: Config, exposed: Exposed | None) -> str:
    """How many distinct tokens an update, or a sum of them, can show: rounds times ranks of one input."""
    rounds, who = config.federation.rounds, "whoever sees updates can tell distinct tokens while they are fewer than"
    if exposed is None:
        return f"{who} {counted(rounds, 'round')} x rank of what reads them"
    return f"{who} {exposed.tokens(rounds)} ({_directions(exposed, rounds)}, at most its width of {exposed.width})"


def _directions(exposed: Exposed, rounds: int) -> str:
    return (
        f"{counted(rounds, 'round')} x rank {' + '.join(map(str, exposed.ranks))} of modules that read the same input"
    )


def sgd_warnings(config: Config, exposed: Exposed | None) -> list[str]:
    """The warning that updates of plain gradient steps without noise give back what they were made from.

    Args:
        config: The whole configuration, without differential privacy.
        exposed: What its updates show; None where the adapter is not known, or where all weights are trained.
    """
    is_plain = local_training(config.federation, config.training).optimizer.is_plain
    if not is_plain or "federated" not in config.federation.modes:
        return []
    if exposed is not None and not exposed.ranks:
        return []
    rounds = config.federation.rounds
    few = "as far as their rank goes"
    if exposed is not None:
        few = (
            f"while those are fewer than {exposed.tokens(rounds)}: {_directions(exposed, rounds)}, and no more than "
            f"its width of {exposed.width}"
        )
    algorithm = config.federation.algorithm
    given = f"federation.algorithm = {algorithm.type!r}" if algorithm.shares_step else "training.optimizer = 'sgd'"
    return [
        f"{given} without differential privacy: whoever sees updates of plain steps, or a sum of "
        f"them, can compute which distinct tokens they were made from, exactly, {few}. Local steps do not hide them, "
        "and privacy.protection hides whose they are, not what they are: privacy.dp does, and adamw makes them "
        "inexact, not safe"
    ]
