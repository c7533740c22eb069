"""Builds batches: length-bucketed order, right-padded ids, and the positions whose logits are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from silotune.training.encode import Encoded

BUCKET_BATCHES = 8
"""Batches that are sorted by length together; more means less padding and less shuffling."""
LENGTH_JITTER = 0.15
"""Lengths are blurred by up to this share when sorted, so that a small client's batches differ from pass to pass."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass and where the logits are needed.

    Attributes:
        ids: Token ids, right-padded [examples, length].
        positions: Flat indices into [examples * length] whose logits are computed [needed].
        mask: Additive attention mask [examples, 1, length, shared + length]; None for plain causal attention.
            Padding stands right of every real token, so causal attention alone never reads it.
        position_ids: Position of every id [examples, length]; None for 0, 1, 2, ...
        prefix: Ids that every example begins with [1, shared]; they are left out of ``ids``.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    prefix: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """A batch whose answers are supervised; ``targets`` [needed] are the ids at ``batch.positions`` + 1."""

    batch: Batch
    targets: torch.Tensor
    owner: torch.Tensor  # [needed] row of each target


@dataclass(frozen=True, slots=True)
class OptionBatch:
    """A batch whose options are scored together; every option token is one entry of the three vectors.

    ``rows`` [tokens] index ``batch.positions``, ``targets`` [tokens] are the option's ids, ``owner`` [tokens]
    is example * num_options + option; ``labels`` [examples] are the right options.
    """

    batch: Batch
    rows: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    labels: torch.Tensor
    num_options: int


def shuffled(examples: Sequence[Encoded], batch_size: int, *, seed: int) -> Iterator[list[Encoded]]:
    """Endless batches: each pass shuffles, sorts inside stretches of batches by length, shuffles the batches.

    The last batch of a pass may be smaller. Deterministic in ``seed``.
    """
    order = random.Random(seed)  # noqa: S311
    while True:
        indices = list(range(len(examples)))
        order.shuffle(indices)
        stretch = batch_size * BUCKET_BATCHES
        for start in range(0, len(indices), stretch):
            indices[start : start + stretch] = sorted(
                indices[start : start + stretch],
                key=lambda index: examples[index].length * order.uniform(1.0, 1.0 + LENGTH_JITTER),
            )
        groups = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        order.shuffle(groups)
        for group in groups:
            yield [examples[index] for index in group]


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Batches of similar length, longest first, with each example's place in the input."""
    order = sorted(range(len(examples)), key=lambda index: -examples[index].length)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, [examples[index] for index in indices]


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """Ids that all prompts begin with, if computing them once saves a fifth of the batch's ids; else 0.

    A task's instruction stands at the beginning of every prompt. Each prompt's last id is not counted in: the
    answer's first logits are taken there.
    """
    first, last = (min(examples, key=_prompt).prompt, max(examples, key=_prompt).prompt)  # differ soonest
    most = min(len(example.prompt) for example in examples) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    saved = shared * (len(examples) - 1)
    return shared if saved * 5 >= sum(example.length for example in examples) else 0


def class_batch(examples: Sequence[Encoded], *, pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, right-padded [examples, length]; the mask is 1 at real ids, which encoders need."""
    lines = [example.prompt for example in examples]
    length = max(map(len, lines))
    return _padded(lines, length, pad_id, device), _padded([[1] * len(line) for line in lines], length, 0, device)


def answer_batch(
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
) -> AnswerBatch:
    """Supervises every answer id and nothing else; ``shared`` is what `shared_prefix` found."""
    # the last id is only ever a target: it needs no position of its own
    lines = [(*example.prompt[shared:], *example.answer[:-1]) for example in examples]
    length = max(len(line) for line in lines)
    positions: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for row, example in enumerate(examples):
        first = row * length + len(example.prompt) - shared - 1
        positions.extend(range(first, first + len(example.answer)))
        targets.extend(example.answer)
        owner.extend([row] * len(example.answer))
    ids, needed = _padded(lines, length, pad_id, device), torch.tensor(positions, device=device)
    batch = Batch(ids, needed) if not shared else _after_prefix(examples, ids, needed, shared, dtype)
    return AnswerBatch(batch, torch.tensor(targets, device=device), torch.tensor(owner, device=device))


def _after_prefix(
    examples: Sequence[Encoded], ids: torch.Tensor, needed: torch.Tensor, shared: int, dtype: torch.dtype
) -> Batch:
    """Each id sees the whole prefix, then its own example causally."""
    rows, length = ids.shape
    visible = torch.ones(length, shared + length, dtype=torch.bool).tril(shared)
    mask = _additive(visible, dtype).to(ids.device).expand(rows, 1, length, shared + length)
    position_ids = torch.arange(shared, shared + length, device=ids.device).expand(rows, length)
    return Batch(ids, needed, mask, position_ids, _prefix(examples, shared, ids.device))


def _prefix(examples: Sequence[Encoded], shared: int, device: torch.device) -> torch.Tensor | None:
    return torch.tensor([examples[0].prompt[:shared]], device=device) if shared else None


def _prompt(example: Encoded) -> tuple[int, ...]:
    return example.prompt


def option_batch(
    examples: Sequence[Encoded],
    *,
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
) -> OptionBatch:
    """Scores all options of each example in one pass over its prompt; ``shared`` is what `shared_prefix` found.

    The options hang on the prompt as branches of a tree: each id sees the prompt and its own option only,
    and takes the position it would have if that option stood alone.
    """
    num_options = len(examples[0].options)
    trees = [_tree(example, shared) for example in examples]
    length = max(len(tree.ids) for tree in trees)
    explicit = shared > 0 or any(len(tree.ids) > tree.prompt_length for tree in trees)
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for row, tree in enumerate(trees):
        offset = len(positions)
        positions.extend(row * length + place for place in tree.places)
        rows.extend(offset + place for place in tree.rows)
        targets.extend(tree.targets)
        owner.extend(row * num_options + option for option in tree.options)
    batch = Batch(
        _padded([tree.ids for tree in trees], length, pad_id, device),
        torch.tensor(positions, device=device),
        _tree_mask(trees, length, shared, dtype).to(device) if explicit else None,
        _padded([tree.position_ids for tree in trees], length, 0, device) if explicit else None,
        _prefix(examples, shared, device),
    )
    return OptionBatch(
        batch,
        torch.tensor(rows, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(owner, device=device),
        torch.tensor([example.label for example in examples], device=device),
        num_options,
    )


def separate_option_batch(examples: Sequence[Encoded], *, pad_id: int, device: torch.device) -> OptionBatch:
    """Scores each option in a row of its own, for models that cannot see options as branches."""
    lines = [replace(example, answer=option) for example in examples for option in example.options]
    made = answer_batch(lines, pad_id=pad_id, device=device)
    return OptionBatch(
        made.batch,
        torch.arange(len(made.targets), device=device),
        made.targets,
        made.owner,
        torch.tensor([example.label for example in examples], device=device),
        len(examples[0].options),
    )


@dataclass(frozen=True, slots=True)
class _Tree:
    """One example's ids after the shared prefix, options as branches; ``spans`` are their (start, end) in ``ids``."""

    ids: tuple[int, ...]
    position_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt_length: int
    places: tuple[int, ...]  # positions whose logits are needed; the first is the prompt's last
    rows: tuple[int, ...]  # for each option token, its index into places
    targets: tuple[int, ...]
    options: tuple[int, ...]


def _tree(example: Encoded, shared: int) -> _Tree:
    prompt_length = len(example.prompt) - shared
    ids, position_ids = list(example.prompt[shared:]), list(range(shared, len(example.prompt)))
    spans: list[tuple[int, int]] = []
    places, rows = [prompt_length - 1], list[int]()
    targets: list[int] = []
    options: list[int] = []
    for number, option in enumerate(example.options):
        start = len(ids)
        ids.extend(option[:-1])
        position_ids.extend(range(len(example.prompt), len(example.prompt) + len(option) - 1))
        spans.append((start, len(ids)))
        rows.extend([0, *range(len(places), len(places) + len(option) - 1)])
        places.extend(range(start, len(ids)))
        targets.extend(option)
        options.extend([number] * len(option))
    return _Tree(
        tuple(ids),
        tuple(position_ids),
        tuple(spans),
        prompt_length,
        tuple(places),
        tuple(rows),
        tuple(targets),
        tuple(options),
    )


def _tree_mask(trees: Sequence[_Tree], length: int, shared: int, dtype: torch.dtype) -> torch.Tensor:
    visible = torch.ones(length, shared + length, dtype=torch.bool).tril(shared).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        for start, end in tree.spans:
            visible[row, start:end, shared + tree.prompt_length : shared + start] = False
    return _additive(visible, dtype).unsqueeze(1)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)


def _padded(lines: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[*line, *[fill] * (length - len(line))] for line in lines], device=device)
