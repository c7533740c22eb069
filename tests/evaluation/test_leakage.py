"""The attacks of the leakage audit: known answers, identities, and the slow obvious way beside the fast one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from silotune import tensors as arithmetic
from silotune.evaluation.leakage import canaries, extraction, labels, membership, span
from silotune.models import adapters
from silotune.models.adapters import Adapted, attach
from silotune.models.load import load_base
from silotune.privacy.audit import lower_bound
from silotune.settings.adapters import Lora
from silotune.settings.sections import ModelSection
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace, train_round

SHARED = Path("/work/shared")
STORIES, NEWS = SHARED / "models" / "stories260K", SHARED / "data" / "fpb" / "train.jsonl"
needs_stories = pytest.mark.skipif(not (STORIES.is_dir() and NEWS.is_file()), reason="stories260K is not here")


class Stories:
    """A real tiny Llama with LoRA on q, k and v, and sentences of finance news."""

    def __init__(self, rank: int) -> None:
        base = load_base(ModelSection(name=str(STORIES)))
        self.model = attach(base, Lora(rank=rank, alpha=2 * rank, targets=["q_proj", "k_proj", "v_proj"]), seed=0)
        self.first = adapters.read(self.model)
        noise = torch.Generator().manual_seed(1)
        self.begun = {  # as after some rounds: B is not 0 any more
            name: value + 0.02 * torch.randn(value.shape, generator=noise) for name, value in self.first.items()
        }

    def texts(self, count: int, length: int, *, begin: int = 0) -> list[Encoded]:
        with NEWS.open(encoding="utf-8") as file:
            lines = [json.loads(line)["text"] for line, _ in zip(file, range(begin + count), strict=False)]
        ids = [self.model.base.tokenizer(line)["input_ids"][:length] for line in lines[begin:]]
        return [Encoded(tuple(each[:1]), tuple(each[1:])) for each in ids]

    def update(
        self, texts: Sequence[Encoded], *, steps: int = 1, start: Tensors | None = None, **more: object
    ) -> Tensors:
        settings = {"optimizer": "sgd", "learning_rate": 0.01, "batch_size": len(texts), "max_steps": steps, **more}
        made = tiny.training(objective="sft", **settings)
        return train_round(self.model, start or self.begun, texts, settings=made, place=RoundPlace(1)).delta

    def found(self, updates: Sequence[Tensors], *, start: Tensors | None = None, in_order: bool = False) -> span.Found:
        adapters.write(self.model, start or self.begun)
        made = span.attack(self.model, updates, weights=start or self.begun, in_order=in_order)
        assert made is not None
        return made


def all_tokens(texts: Sequence[Encoded]) -> set[int]:
    return {token for text in texts for token in (*text.prompt, *text.answer)}


@needs_stories
def test_one_plain_step_gives_the_whole_text_in_order_but_for_its_last_token() -> None:
    stories = Stories(16)
    texts = stories.texts(1, 24)
    found = stories.found([stories.update(texts)], in_order=True)
    assert (len(found.tokens & all_tokens(texts)), len(all_tokens(texts))) == (19, 20)
    assert not found.tokens - all_tokens(texts)
    assert found.texts[0] == (*texts[0].prompt, *texts[0].answer)[:23]


@needs_stories
@pytest.mark.parametrize("rank, count, length, hit, of", [(8, 1, 12, 9, 10), (16, 1, 24, 19, 20), (16, 2, 32, 32, 33)])
def test_four_plain_steps_give_the_words(rank: int, count: int, length: int, hit: int, of: int) -> None:
    stories = Stories(rank)
    texts = stories.texts(count, length)
    found = stories.found([stories.update(texts, steps=4)])
    assert (len(found.tokens & all_tokens(texts)), len(all_tokens(texts))) == (hit, of)
    assert not found.tokens - all_tokens(texts)


@needs_stories
def test_the_first_round_hides_and_the_next_ones_do_not() -> None:
    stories = Stories(8)
    texts, weights, updates, hits = stories.texts(4, 16), stories.first, [], []
    for _ in range(3):
        updates.append(stories.update(texts, steps=4, start=weights, learning_rate=0.1))
        weights = arithmetic.add(weights, updates[-1])
        found = stories.found(updates, start=stories.first)
        hits.append(len(found.tokens & all_tokens(texts)))
        assert not found.tokens - all_tokens(texts)
    assert hits[0] == 0
    assert hits[1] >= len(all_tokens(texts)) - 2
    assert hits[2] >= len(all_tokens(texts)) - 2


@needs_stories
def test_a_sum_of_four_clients_gives_the_words_of_all() -> None:
    stories = Stories(16)
    texts = [stories.texts(1, 14, begin=number) for number in range(4)]
    total = stories.update(texts[0])
    for own in texts[1:]:
        total = arithmetic.add(total, stories.update(own))
    together = [text for own in texts for text in own]
    found = stories.found([total])
    assert len(found.tokens & all_tokens(together)) >= len(all_tokens(together)) - 4
    assert not found.tokens - all_tokens(together)


@needs_stories
def test_noise_and_coarse_uploads_thin_it_out() -> None:
    stories = Stories(16)
    texts = stories.texts(1, 24)
    update = stories.update(texts)
    size = arithmetic.norm(update) / arithmetic.count(update) ** 0.5
    assert len(stories.found([tiny.stir(update, size=1e-4 * size)]).tokens) >= 15
    assert len(stories.found([tiny.stir(update, size=1e-2 * size)]).tokens) <= 2


@needs_stories
def test_adamw_leaves_no_token_exactly_and_ranks_them_all_the_same() -> None:
    stories = Stories(16)
    texts = stories.texts(1, 24)
    found = stories.found([stories.update(texts, steps=16, optimizer="adamw", learning_rate=1e-3)])
    assert not found.tokens
    assert (span.area(found.presence, all_tokens(texts)) or 0) > 0.9


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    assert span.rouge_l((1, 2, 3, 4), (1, 3, 4, 5)) == pytest.approx(0.75)
    assert span.rouge_l((), (1,)) == 0.0


def test_area_counts_ties_a_half() -> None:
    assert span.area(torch.tensor([3.0, 1.0, 2.0, 2.0]), [0, 2]) == pytest.approx(0.875)
    assert span.area(torch.tensor([1.0, 2.0]), [0, 1]) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_what_reads_tokens_is_found_by_what_it_is_given(name: str) -> None:
    model = tiny.adapted(name)
    first, second = span.readers_of(model, adapters.read(model))
    assert first is not None
    assert ".0." in first.modules[0]
    assert first.by_position is (name == "gpt2")
    assert second is not None
    assert not set(first.modules) & set(second.modules)


def test_an_adapter_without_a_factor_that_reads_gives_nothing() -> None:
    only_b = {name: value for name, value in adapters.read(tiny.adapted()).items() if ".lora_B." in name}
    assert span.attack(tiny.adapted(), [only_b]) is None


def test_an_update_of_nothing_names_no_token() -> None:
    model = tiny.adapted()
    found = span.attack(model, [arithmetic.zeros_like(adapters.read(model))])
    assert found is not None
    assert (found.rank, found.tokens) == (0, frozenset())


def test_scores_of_the_same_kind_are_told_apart_by_nobody() -> None:
    draw = np.random.default_rng(0)
    found = membership.advantage(draw.normal(size=400), draw.normal(size=400))
    assert found is not None
    assert found.auc_interval[0] < 0.5 < found.auc_interval[1]
    assert found.largest_advantage > found.advantage


def test_scores_that_never_overlap_tell_everyone() -> None:
    found = membership.advantage([2.0] * 30, [1.0] * 30)
    assert found is not None
    assert (found.auc, found.tpr, found.advantage) == (1.0, 1.0, 1.0)


def test_too_few_examples_give_no_figure() -> None:
    assert membership.advantage([1.0] * 19, [0.0] * 500) is None


def test_half_of_ties_count() -> None:
    assert membership.auc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == pytest.approx(0.875)


def test_shadow_halves_are_balanced() -> None:
    halves = membership.balanced_halves(11, 4, seed=0)
    assert halves.shape == (4, 11)
    assert (halves.sum(axis=0) == 2).all()


def test_the_likelihood_ratio_knows_members_when_shadows_do() -> None:
    draw = np.random.default_rng(1)
    was_in, target_in = membership.balanced_halves(200, 8, seed=0), draw.random(200) < 0.5
    hard = draw.uniform(0.5, 3, 200)

    def losses(inside: np.ndarray) -> list[float]:
        return list(np.abs(hard - 0.4 * inside + 0.05 * draw.normal(size=200)))

    scores = np.asarray(membership.likelihood_ratio(losses(target_in), [losses(each) for each in was_in], was_in))
    plain = -np.asarray(losses(target_in))
    assert membership.auc(scores[target_in], scores[~target_in]) > 0.98
    assert membership.auc(plain[target_in], plain[~target_in]) < 0.75


def test_min_k_is_that_of_the_slow_way(model: Adapted) -> None:
    examples = tiny.encoded(tiny.opened(4))
    weights = adapters.read(model)
    found = membership.min_k(model, weights, examples, batch_size=3)
    for example, value in zip(examples, found, strict=True):
        line = torch.tensor([[*example.prompt, *example.answer]])
        logits = model.model(input_ids=line, use_cache=False).logits[0, len(example.prompt) - 1 : -1].detach().double()
        scores = torch.log_softmax(logits, dim=-1)
        mean = (scores.exp() * scores).sum(dim=-1)
        spread = ((scores.exp() * (scores - mean[:, None]) ** 2).sum(dim=-1)).sqrt()
        each = sorted((scores[torch.arange(len(scores)), list(example.answer)] - mean) / spread)
        few = each[: max(1, round(0.2 * len(each)))]
        assert value == pytest.approx(float(sum(few) / len(few)), abs=1e-3)


def test_words_alone_do_not_tell_halves_of_one_split() -> None:
    draw = np.random.default_rng(0)
    texts = [Encoded((1,), tuple(int(token) for token in draw.integers(5, 60, 12))) for _ in range(400)]
    found = membership.words_alone(texts[:200], texts[200:])
    assert found is not None
    assert found.auc_interval[0] < 0.5 < found.auc_interval[1]
    other = [Encoded((1,), tuple(int(token) for token in draw.integers(40, 90, 12))) for _ in range(200)]
    told = membership.words_alone(texts[:200], other)
    assert told is not None
    assert told.auc > 0.9


def test_audited_epsilon_is_the_bound_with_its_confidence_shared() -> None:
    scores, was_in = [float(number) for number in range(64)], [number >= 32 for number in range(64)]
    found = canaries.audited_epsilon(scores, was_in, delta=1e-5)
    assert found is not None
    assert found.epsilon == pytest.approx(lower_bound(64, 64, 64, delta=1e-5, confidence=1 - 0.05 / 4), abs=2e-3)
    assert found.epsilon == found.most
    assert canaries.audited_epsilon([1.0], [True], delta=1e-5) is None


def test_guessing_proves_nothing() -> None:
    draw = np.random.default_rng(0)
    found = canaries.audited_epsilon(list(draw.normal(size=200)), list(draw.random(200) < 0.5), delta=1e-5)
    assert found is not None
    assert found.epsilon < 0.5


@pytest.mark.parametrize(
    "case, expected",
    [
        ((1000, 100, 75, 1e-4), 0.673), ((1000, 100, 100, 1e-5), 3.465), ((1000, 600, 600, 1e-5), 5.270),
        ((100, 100, 100, 1e-5), 3.490), ((500, 100, 90, 1e-5), 1.628), ((32, 32, 32, 0), 2.321),
        ((1000, 1000, 560, 0), 0.134),
    ],
)  # fmt: skip
def test_the_one_run_bound_has_its_known_values(case: tuple[int, int, int, float], expected: float) -> None:
    count, guesses, right, delta = case
    assert lower_bound(right, guesses, count, delta=delta) == pytest.approx(expected, abs=2e-3)


def test_exposure_is_in_bits_of_the_rank() -> None:
    scores, was_in = [9.0, 1.0, 2.0, 3.0, 0.5], [True, False, False, False, True]
    assert canaries.exposures(scores, was_in) == pytest.approx([2.0, 0.0])


def test_a_canary_has_another_end_than_its_example() -> None:
    closed = Encoded((1, 2), (7, 2), options=((7,), (8,), (9, 10)), label=0)
    made = canaries.with_odd_end(closed, seed=3, vocabulary=[5])
    assert made.label != 0
    assert made.answer == (*closed.options[made.label], 2)
    opened = Encoded((1, 2), (7, 8, 9, 2))
    assert canaries.with_odd_end(opened, seed=3, vocabulary=[5]).answer == (5, 5, 5, 2)


def test_labels_of_one_plain_step_are_counted_exactly() -> None:
    """3, 1, 0, 4 and 0 examples of five classes: n_c = B (mean p_c - g_c)."""
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 6, dtype=torch.float64) / 3, torch.zeros(5, dtype=torch.float64, requires_grad=True)
    hidden, classes = torch.randn(8, 6, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 3, 3, 3, 3])
    logits = hidden @ weight.T + bias
    torch.nn.functional.cross_entropy(logits, classes).backward()
    assert bias.grad is not None
    expected = torch.softmax(logits, dim=-1).mean(dim=0).detach()
    assert labels.counts_of(-bias.grad, expected, 8) == [3, 1, 0, 4, 0]
    assert labels.mean_error([3, 1, 0, 4, 0], [2, 2, 0, 4, 0]) == 1


def test_the_signal_of_a_head_points_to_its_classes() -> None:
    assert labels.class_signal({"x.lora_A.weight": torch.zeros(3, 4)}, 3) is None
    bias = {"score.bias": torch.tensor([1.0, -1.0, 0.0]), "score.weight": torch.ones(3, 4)}
    assert labels.class_signal(bias, 3).tolist() == [1.0, -1.0, 0.0]  # type: ignore[union-attr]
    rows = labels.class_signal({"score.weight": torch.outer(torch.tensor([2.0, -1.0, -1.0]), torch.ones(4))}, 3)
    assert rows is not None
    assert int(rows.argmax()) == 0


def test_recall_is_that_of_writing_token_by_token(model: Adapted) -> None:
    examples = tiny.encoded(tiny.opened(6))
    weights = adapters.read(model)
    adapters.write(model, weights)
    written = []
    for example in examples[:3]:
        line = list(example.prompt)
        for _ in range(6):
            line.append(int(model.model(input_ids=torch.tensor([line])).logits[0, -1].argmax()))
        written.append(Encoded(example.prompt, (*line[len(example.prompt) :][:4], 0, 0)))
    found = extraction.recalled(model, weights, [*written, *examples[3:]])
    assert all(count >= 4 for count in found[:3])
    assert extraction.recalled(model, weights, written, temperature=1e-4)[:3] == found[:3]


def test_only_texts_that_are_long_enough_are_continued() -> None:
    short, label = Encoded((1,), (2, 3)), Encoded((1,), (2, 3, 4, 5, 6))
    document = Encoded((1,), tuple(range(40)))
    made = extraction.beginnings([short, label, document])
    assert [len(each.answer) for each in made] == [5, 20]
    assert made[1].prompt == (1, *range(20))


def test_rounds_that_fill_every_direction_are_read_one_by_one() -> None:
    """Two texts of one token for each direction: together they leave no direction free, each alone does."""
    model = tiny.adapted(rank=8, alpha=16, targets=["q_proj", "k_proj", "v_proj"])
    start = adapters.read(model)
    texts = [Encoded((270 + 16 * number,), tuple(range(271 + 16 * number, 287 + 16 * number))) for number in range(2)]
    settings = tiny.training(optimizer="sgd", learning_rate=0.01, objective="sft", batch_size=1, max_steps=1)
    updates = [train_round(model, start, [text], settings=settings, place=RoundPlace(1)).delta for text in texts]
    adapters.write(model, start)
    together, apart = span.attack(model, updates, weights=start), span.attack_rounds(model, updates, weights=start)
    assert together is not None
    assert apart is not None
    assert len(together.tokens) < len(apart.tokens)
    assert apart.tokens == all_tokens(texts) - {302}
