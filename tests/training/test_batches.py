from __future__ import annotations

import os
from collections import Counter
from itertools import islice

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from silotune.seeds import derive
from silotune.training.batches import by_length, option_batch, separate_option_batch, shared_prefix, shuffled
from silotune.training.encode import Encoded

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def of_lengths(values: list[int]) -> list[Encoded]:
    return [Encoded(tuple([number] * value), (number,)) for number, value in enumerate(values)]


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 2**62))
def test_every_example_once_a_pass_and_the_same_for_a_seed(values: list[int], size: int, seed: int) -> None:
    examples = of_lengths(values)
    batches = -(-len(examples) // size)
    taken = list(islice(shuffled(examples, size, seed=seed), 2 * batches))
    assert taken == list(islice(shuffled(examples, size, seed=seed), 2 * batches))
    for start in (0, batches):
        seen = [example.answer[0] for batch in taken[start : start + batches] for example in batch]
        assert Counter(seen) == Counter(range(len(examples)))
    assert all(1 <= len(batch) <= size for batch in taken)


def test_order_differs_by_client_round_and_pass() -> None:
    examples = of_lengths([5] * 40)

    def order(client: str, number: int) -> list[int]:
        seed = derive(0, "train", round_number=number, client=client)
        return [example.answer[0] for batch in islice(shuffled(examples, 8, seed=seed), 10) for example in batch]

    orders = [order(client, number) for client in ("a", "b") for number in (1, 2)]
    assert len({tuple(entry) for entry in orders}) == 4
    assert orders[0][:40] != orders[0][40:]


def test_batches_hold_examples_of_similar_length() -> None:
    examples = of_lengths([number * 37 % 64 + 1 for number in range(128)])
    padding = sum(
        max(example.length for example in batch) - example.length
        for batch in islice(shuffled(examples, 16, seed=3), 8)
        for example in batch
    )
    assert padding < 0.15 * sum(example.length for example in examples)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 9))
def test_by_length_goes_over_all_and_tells_their_places(values: list[int], size: int) -> None:
    examples = of_lengths(values)
    restored: list[Encoded | None] = [None] * len(examples)
    seen = []
    for places, batch in by_length(examples, size):
        seen += [example.length for example in batch]
        for place, example in zip(places, batch, strict=True):
            restored[place] = example
    assert restored == examples
    assert seen == sorted(seen, reverse=True)


def test_tree_by_hand() -> None:
    example = Encoded((7, 8), (20, 2), ((20, 21, 22), (30, 31)), 0)
    made = option_batch([example], pad_id=0, device=torch.device("cpu"))
    assert made.batch.ids.tolist() == [[7, 8, 20, 21, 30]]  # the last id of an option is only a target
    assert made.batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert made.batch.positions.tolist() == [1, 2, 3, 4]
    assert made.rows.tolist() == [0, 1, 2, 0, 3]
    assert made.targets.tolist() == [20, 21, 22, 30, 31]
    assert made.owner.tolist() == [0, 0, 0, 1, 1]
    visible = (made.batch.mask[0, 0] == 0).int().tolist()
    assert visible == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


def test_options_of_one_id_need_no_mask_and_no_more_than_the_prompt() -> None:
    example = Encoded((7, 8), (20, 2), ((20,), (30,)), 0)
    made = option_batch([example], pad_id=0, device=torch.device("cpu"))
    assert made.batch.ids.tolist() == [[7, 8]]
    assert made.batch.mask is None and made.batch.position_ids is None
    assert made.batch.positions.tolist() == [1]


def test_separate_rows_by_hand() -> None:
    example = Encoded((7, 8), (20, 2), ((20, 21, 22), (30,)), 1)
    made = separate_option_batch([example, example], pad_id=0, device=torch.device("cpu"))
    assert made.batch.ids.tolist() == [[7, 8, 20, 21], [7, 8, 0, 0]] * 2
    assert made.owner.tolist() == [0, 0, 0, 1, 2, 2, 2, 3]
    assert made.targets.tolist() == [20, 21, 22, 30] * 2
    assert made.labels.tolist() == [1, 1] and made.num_options == 2


def test_examples_of_the_tiny_tokenizer_fit_a_batch() -> None:
    encoded = tiny.encoded(tiny.closed())
    assert len({example.length for example in encoded}) > 3


def prompts(*lines: tuple[int, ...]) -> list[Encoded]:
    return [Encoded(line, (9,)) for line in lines]


@given(
    st.lists(st.integers(3, 5), max_size=12), st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=1)
)
def test_the_shared_prefix_is_common_and_leaves_each_prompt_an_id(common: list[int], rests: list[list[int]]) -> None:
    examples = prompts(*((*common, *rest) for rest in rests))
    found = shared_prefix(examples)
    lines = [example.prompt for example in examples]
    longest = min(len(os.path.commonprefix(lines)), min(map(len, lines)) - 1)
    saves = longest * (len(lines) - 1) * 5 >= sum(example.length for example in examples)
    assert found == (longest if saves else 0)


def test_little_in_common_is_not_shared() -> None:
    assert shared_prefix(prompts((1, 2, 3, 4), (1, 5, 6, 7))) == 0  # one id of ten
    assert shared_prefix(prompts((1, 2, 3, 4), (1, 2, 6, 7))) == 2
    assert shared_prefix(prompts((1, 2, 3, 4))) == 0
