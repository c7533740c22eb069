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
    rows: Sequence[Sequence[int]] | None = None,
) -> AnswerBatch:
    """Supervises every answer id that is not another's turn, and nothing else.

    Args:
        examples: What goes into the batch.
        pad_id: Fills up rows.
        device: Where the tensors lie.
        dtype: Of an attention mask.
        shared: What `shared_prefix` found.
        rows: Places of the examples that stand in one row, as `packed_rows` gives them; by default each has its own.
    """
    rows = rows or [[place] for place in range(len(examples))]
    lines: list[list[int]] = []
    spans: list[list[tuple[int, int]]] = []
    needed: list[tuple[int, int]] = []  # row and column of each logit
    targets: list[int] = []
    owner: list[int] = []
    for row, places in enumerate(rows):
        lines.append([])
        spans.append([])
        for place in places:
            example, start = examples[place], len(lines[-1])
            # the last id is only ever a target: it needs no position of its own
            lines[-1].extend((*example.prompt[shared:], *example.answer[:-1]))
            spans[-1].append((start, len(lines[-1])))
            learnt = _learnt(example)
            needed.extend((row, start + len(example.prompt) - shared - 1 + index) for index in learnt)
            targets.extend(example.answer[index] for index in learnt)
            owner.extend([place] * len(learnt))
    length = max(map(len, lines))
    batch = Batch(
        _padded(lines, length, pad_id, device),
        torch.tensor([row * length + column for row, column in needed], device=device),
        prefix=_prefix(examples, shared, device),
    )
    if shared or len(rows) < len(examples):
        batch = replace(batch, **_apart(spans, length, shared, dtype, device))
    return AnswerBatch(batch, torch.tensor(targets, device=device), torch.tensor(owner, device=device))


def packed_rows(examples: Sequence[Encoded]) -> list[list[int]]:
    """Places of examples that fit into one row together, no row longer than the longest example (first fit, longest
    first)."""
    room: list[int] = []
    rows: list[list[int]] = []
    longest = max(example.length for example in examples)
    for place in sorted(range(len(examples)), key=lambda place: (-examples[place].length, place)):
        length = examples[place].length
        row = next((number for number, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(longest)
        rows[row].append(place)
        room[row] -= length
    return rows


def _learnt(example: Encoded) -> list[int]:
    """Places in the answer that are supervised."""
    skipped = {place for start, end in example.unsupervised for place in range(start, end)}
    return [place for place in range(len(example.answer)) if place not in skipped]


def _apart(
    spans: Sequence[Sequence[tuple[int, int]]], length: int, shared: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Mask and positions by which each id sees the whole prefix, then its own example causally and no other."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = torch.zeros(len(spans), length, shared + length, dtype=torch.bool)
    visible[:, :, :shared] = True
    position_ids = torch.zeros(len(spans), length, dtype=torch.long)
    for row, examples in enumerate(spans):
        for start, end in examples:
            visible[row, start:end, shared + start : shared + end] = causal[: end - start, : end - start]
            position_ids[row, start:end] = torch.arange(shared, shared + end - start)
    return {"mask": additive(visible, dtype).unsqueeze(1).to(device), "position_ids": position_ids.to(device)}


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
    return additive(visible, dtype).unsqueeze(1)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that a model adds to its attention scores, from which ids each id sees."""
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)


def _padded(lines: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[*line, *[fill] * (length - len(line))] for line in lines], device=device)
