"""The span attack: which tokens an update was made from, and where one plain step was taken, in which order.

For y = W x the rows of the gradient of W lie in the span of the inputs x, and so do those of LoRA's first factor. What
the first block reads are the normed embeddings of the tokens, which everybody knows: a token was there if its embedding
lies in the span (DAGER, Petrov et al. 2024, whose full gradients are LoRA's factors here). Local steps, sums over
clients and rounds stay within that span; rounds are stacked, so that few ranks see many tokens in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from silotune.models.adapters import Adapted
from silotune.models.load import rows_of as vocabulary_of
from silotune.structs import Tensors

NEAR = 1e-3
"""A token was there if at most this share of its embedding's length is outside the span."""
FOLLOWS = 1e-2
"""The same of what the second block reads, for a token at the end of a prefix: steps of float32 blur it more."""
_FLOOR = 1e-6
"""Directions that are smaller than this share of the largest are rounding."""
_ROUNDING = 1.2e-7
_BATCH = 2048
MOST_PREFIXES = 40_000
"""Prefixes that the search for the order tries at most."""
_KEPT = 128
"""Prefixes of one length that go on, the nearest ones."""
LORA_A = ".lora_A.weight"


@dataclass(frozen=True)
class Reader:
    """Trained linear layers that read the same values.

    Attributes:
        names: Of their tensors in an update, whose rows lie in the span of what is read.
        modules: Their modules, in the same order.
        by_position: What they read of a token depends on its place in the text.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    by_position: bool = False


class _Read(Exception):  # noqa: N818  # it ends a forward pass that has shown what was wanted
    pass


@contextmanager
def _watching(adapted: Adapted, modules: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What each module reads while the block runs, in the order in which they are called."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, given[0].detach())

        return adapted.model.get_submodule(name).register_forward_pre_hook(keep)

    handles = [watch(name) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _linear_of(adapted: Adapted, update: Tensors) -> dict[str, str]:
    """Module -> its tensor in an update whose rows lie in the span of what the module reads."""
    found = {}
    for name, tensor in update.items():
        if tensor.dim() != 2 or not name.endswith(".weight"):
            continue
        place = name.removesuffix(LORA_A) if name.endswith(LORA_A) else name.removesuffix(".weight")
        try:
            module = adapted.model.get_submodule(place)
        except AttributeError:
            continue
        if name.endswith(LORA_A) or isinstance(module, torch.nn.Linear):
            found[place] = name
    return found


def readers_of(adapted: Adapted, update: Tensors) -> tuple[Reader | None, Reader | None]:
    """The layers that read tokens alone, and the first ones that read a token together with all before it.

    They are found by what they are given, not by their names, so that it works for whatever architecture: two texts
    that differ in all but the last token, and the same tokens in another place.

    Returns:
        The group with most rows of each kind; None where an update trains no such layers.
    """
    places = _linear_of(adapted, update)
    if not places or adapted.base.is_encoder:
        return None, None
    rows = vocabulary_of(adapted.base.model)
    one, two, three, four, last = (rows * part // 7 for part in (2, 3, 4, 5, 6))  # the first ids are seldom trained
    texts = [[one, two, last], [three, four, last], [last, two, one]]
    with _watching(adapted, places) as seen, torch.no_grad():
        adapted.model(input_ids=torch.tensor(texts, device=adapted.base.device), use_cache=False)
    groups: list[list[str]] = []
    for name, value in seen.items():
        if value.dim() != 3 or value.shape[:2] != (3, 3):
            continue
        same = next((group for group in groups if torch.equal(seen[group[0]], value)), None)
        groups.append([name]) if same is None else same.append(name)
    by_token = [group for group in groups if _close(seen[group[0]][0, 2], seen[group[0]][1, 2])]
    by_prefix = [group for group in groups if group not in by_token]

    def largest(found: list[list[str]]) -> Reader | None:
        if not found:
            return None
        best = max(found, key=lambda group: sum(update[places[name]].shape[0] for name in group))
        value = seen[best[0]]
        moved = not _close(value[0, 2], value[2, 0])
        return Reader(tuple(places[name] for name in best), tuple(best), moved)

    return largest(by_token), largest(by_prefix)


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).norm() <= 1e-4 * left.norm())


def token_inputs(adapted: Adapted, reader: Reader, *, position: int = 0) -> torch.Tensor:
    """What the layers read for every token of the vocabulary [tokens, width], in float64.

    Args:
        adapted: The model, with any adapter: nothing that is trained comes before these layers.
        reader: The layers.
        position: Place of the token in its text, for models that add positions to what they read.
    """
    ids = torch.arange(vocabulary_of(adapted.base.model), device=adapted.base.device)[:, None]
    places = {"position_ids": torch.tensor([[position]], device=adapted.base.device)} if position else {}
    return _read_last(adapted, reader, ids.split(_BATCH), **places)


def _read_last(
    adapted: Adapted, reader: Reader, batches: Iterable[torch.Tensor], **places: torch.Tensor
) -> torch.Tensor:
    """What the layers read at the last place of each text [texts, width], in float64; no pass goes on behind them."""
    module = adapted.model.get_submodule(reader.modules[0])
    found: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        found.append(given[0][:, -1].detach().double().cpu())
        raise _Read

    handle = module.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            for ids in batches:
                with suppress(_Read):
                    adapted.model(input_ids=ids, use_cache=False, **places)
    finally:
        handle.remove()
    return torch.cat(found)


def rows_of(updates: Sequence[Tensors], reader: Reader, *, size: float = 0.0) -> torch.Tensor:
    """Rows that span what was read in each of several updates [rows, width], as long as they are large.

    What an update has of rounding is cut off before updates are put together: a change of float32 weights is known
    to about a ten-millionth of the weights, which makes small directions of its own.

    Args:
        updates: One for each round, or the sum of several clients.
        reader: The layers.
        size: Mean magnitude of the weights that were changed.
    """
    stacked = []
    for update in updates:
        rows = torch.cat([update[name] for name in reader.names if name in update]).double().cpu()
        _, values, directions = torch.linalg.svd(rows, full_matrices=False)
        rounding = _ROUNDING * size * (rows.shape[0] ** 0.5 + rows.shape[1] ** 0.5)
        rank = int((values > max(_FLOOR * float(values[0]), rounding)).sum())
        if rank:
            stacked.append(values[:rank, None] / values[0] * directions[:rank])
    return torch.cat(stacked) if stacked else torch.zeros(0, rows.shape[1], dtype=torch.float64)


def span_of(rows: torch.Tensor, *, most: int | None = None) -> torch.Tensor:
    """An orthonormal basis [rank, width] of the directions of rows, the largest first, and no more than ``most``."""
    if not len(rows):
        return rows
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > _FLOOR * values[0]).sum())
    return directions[: rank if most is None else min(rank, most)]


def outside(inputs: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The share of each input's length that is outside a span [inputs]; 1 for a span of nothing."""
    if not len(span):
        return torch.ones(len(inputs), dtype=torch.float64)
    inside = (inputs @ span.T).square().sum(dim=1)
    whole = inputs.square().sum(dim=1).clamp(min=1e-300)
    return (1 - inside / whole).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Found:
    """What the attack makes of updates.

    Attributes:
        rank: Directions that the updates have.
        tokens: Ids that lie in their span.
        presence: A score for every id of the vocabulary; higher speaks for its being there, even where nothing lies
            in the span exactly.
        texts: Prefixes that the second block's updates confirm, the longest of each; empty where no order was sought.
        tried: Prefixes that were tried for that.
    """

    rank: int
    tokens: frozenset[int]
    presence: torch.Tensor
    texts: tuple[tuple[int, ...], ...] = ()
    tried: int = 0


def attack(
    adapted: Adapted,
    updates: Sequence[Tensors],
    *,
    weights: Tensors | None = None,
    in_order: bool = False,
    inputs: torch.Tensor | None = None,
    longest: int = 512,
) -> Found | None:
    """Finds the tokens of updates, and their order where it is wanted.

    Args:
        adapted: The model, with the adapter that the (first) update was made from.
        updates: Of the rounds that are seen together.
        weights: What the updates were added to; its size says what is rounding.
        in_order: Look for the texts as well; it finds some where each client took one step on one batch.
        inputs: What `token_inputs` gave for this model, where it is there already.
        longest: Tokens of a text, at most.

    Returns:
        What was found; None where no trained layer reads tokens.
    """
    first, second = readers_of(adapted, updates[0])
    if first is None:
        return None
    size = 0.0 if weights is None else max(float(weights[name].abs().mean()) for name in first.names)
    rows = rows_of(updates, first, size=size)
    span = span_of(rows)
    places = range(longest if first.by_position else 1)
    if inputs is not None and first.by_position:
        inputs = None
    left = None
    for position in places:
        every = token_inputs(adapted, first, position=position) if inputs is None else inputs
        here = outside(every, span)
        left = here if left is None else torch.minimum(left, here)
    assert left is not None  # there is one position at least
    tokens = frozenset(torch.nonzero(left < NEAR).flatten().tolist()) if 0 < len(span) < rows.shape[1] else frozenset()
    presence = _presence(rows, every, left) if not first.by_position else -left
    texts: tuple[tuple[int, ...], ...] = ()
    tried = 0
    if in_order and second is not None and tokens:
        texts, tried = _in_order(adapted, updates, second, sorted(tokens), size=size, longest=longest)
    return Found(len(span), tokens, presence, texts, tried)


def attack_rounds(
    adapted: Adapted, updates: Sequence[Tensors], *, weights: Tensors, inputs: torch.Tensor | None = None
) -> Found | None:
    """Finds the tokens of updates of several rounds, each by itself and all together.

    A round of few tokens is read alone, where all rounds together fill every direction; rounds of more tokens than
    ranks are read together. So the tokens are those that any stretch of rounds from the first, or any single round,
    gives.

    Args:
        adapted: The model, with the adapter that the first update was made from.
        updates: Round by round.
        weights: What the first was added to.
        inputs: What `token_inputs` gave for this model, where it is there already.
    """
    whole = attack(adapted, updates, weights=weights, inputs=inputs)
    if whole is None:
        return None
    recent = range(min(len(updates), _MOST_ROUNDS))
    stretches = [updates[: place + 1] for place in recent] + [updates[place : place + 1] for place in recent]
    parts = [attack(adapted, each, weights=weights, inputs=inputs) for each in stretches if len(each) < len(updates)]
    tokens = whole.tokens.union(*(part.tokens for part in parts if part is not None))
    return replace(whole, tokens=tokens)


_MOST_ROUNDS = 24
"""Rounds that are read by themselves: each takes the time of an attack."""


def _presence(rows: torch.Tensor, inputs: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Log-odds of how much of each input lies in the largest directions, no more of them than half the width."""
    if not len(rows):
        return torch.zeros(len(inputs), dtype=torch.float64)
    most = span_of(rows, most=max(1, rows.shape[1] // 2))
    inside = (1 - outside(inputs, most).square()).clamp(1e-12, 1 - 1e-12)
    return torch.logit(inside)


def _in_order(
    adapted: Adapted, updates: Sequence[Tensors], reader: Reader, tokens: Sequence[int], *, size: float, longest: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Texts that grow from left to right as long as what the second block reads lies in the span of its update.

    A text of one token again and again always passes, because attention over equal tokens gives the same vector: after
    a first token the same one is not tried.
    """
    span = span_of(rows_of(updates, reader, size=size))
    if not 0 < len(span) < _width(adapted, updates[0], reader):
        return (), 0
    ended: list[tuple[int, ...]] = []
    alive: list[tuple[int, ...]] = [()]
    tried = 0
    while alive and len(alive[0]) < longest and tried < MOST_PREFIXES:
        grown = [(*prefix, token) for prefix in alive for token in tokens if len(prefix) != 1 or prefix[0] != token]
        left = _ends(adapted, reader, grown, span)
        tried += len(grown)
        good = sorted((float(value), text) for value, text in zip(left, grown, strict=True) if value < FOLLOWS)[:_KEPT]
        continued = {text[:-1] for _, text in good}
        ended += [prefix for prefix in alive if prefix and prefix not in continued]
        alive = [text for _, text in good]
    return tuple(sorted({*ended, *alive}, key=len, reverse=True)), tried


def _width(adapted: Adapted, update: Tensors, reader: Reader) -> int:
    return int(update[reader.names[0]].shape[1])


def _ends(adapted: Adapted, reader: Reader, texts: Sequence[tuple[int, ...]], span: torch.Tensor) -> torch.Tensor:
    """How much of what the layers read at the end of each text is outside the span [texts]; all are equally long."""
    ids = torch.tensor(texts, device=adapted.base.device)
    return outside(_read_last(adapted, reader, ids.split(max(1, _BATCH // len(texts[0])))), span)


def rouge_l(found: Sequence[int], true: Sequence[int]) -> float:
    """ROUGE-L of one text against another: F1 of their longest common subsequence (Lin 2004)."""
    if not found or not true:
        return 0.0
    row = [0] * (len(true) + 1)
    for token in found:
        before = 0
        for place, other in enumerate(true, start=1):
            before, row[place] = row[place], before + 1 if token == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(found) + len(true))


def area(scores: torch.Tensor, is_there: Mapping[int, bool] | Iterable[int]) -> float | None:
    """Area under the curve of scores that rank what is there above what is not; None where all or none is there."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[[token for token in is_there if token < len(scores)]] = True
    there, count = int(mask.sum()), len(scores)
    if there in (0, count):
        return None
    _, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]  # ties share their mean rank
    return float((ranks[mask].sum() - there * (there + 1) / 2) / (there * (count - there)))
