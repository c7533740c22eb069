"""The embedded tasks: splits are disjoint, sizes and balance hold, and no surface word gives an answer away."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.data.embedded import corpus, finance, lexicons, medicine, notes
from silotune.data.embedded.splits import LARGEST_SPLIT, collect, split_of

SIZES = {"train": 1500, "validation": 200, "test": 600}


def make(task, seed=0, sizes=SIZES):
    return task.generate(
        num_train=sizes["train"], num_validation=sizes["validation"], num_test=sizes["test"], seed=seed
    )


@pytest.fixture(scope="module")
def news():
    return make(finance)


@pytest.fixture(scope="module")
def exam():
    return make(medicine)


def made_by(task, seed: int, size: int) -> object:
    return task.generate(num_train=size, num_validation=size // 3, num_test=size // 2, seed=seed)


WORLDS: dict[str, Callable[[int, int], object]] = {
    "finance": lambda seed, size: made_by(finance, seed, size),
    "medicine": lambda seed, size: made_by(medicine, seed, size),
    "notes": lambda seed, size: made_by(notes, seed, size),
    "corpus": lambda seed, size: list(itertools.islice(corpus.documents(seed=seed), size)),
    "talk": lambda seed, size: list(itertools.islice(corpus.talk(seed=seed), size)),
}
DIGESTS = {
    "finance": {(0, 120): "58b0df4bb65a7f91", (7, 900): "d2e411065ab04c32", (2147483648, 30): "61102159af7ecafa"},
    "medicine": {(0, 120): "fa3e397327de037f", (7, 900): "5a72e830e7e6825d", (2147483648, 30): "40c9693eebc803cb"},
    "notes": {(0, 120): "df3118648014d929", (7, 900): "09e85457c871fc5e", (2147483648, 30): "35189f9b515da69e"},
    "corpus": {(0, 120): "2e4d2e9566dace4f", (7, 900): "cb53f6c20e6b4612", (2147483648, 30): "ea3b481d6f1ba48e"},
    "talk": {(0, 120): "035f896b96fb512c", (7, 900): "bebc259ec3be4649", (2147483648, 30): "2e49019404e8d90b"},
}
"""World -> seed and size -> the beginning of the SHA-256 of what is generated: runs are repeated by seed."""


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z'-]+", text.lower()))


def single_word_accuracy(train: list[dict], test: list[dict]) -> float:
    """Predicts by the majority label of the most telling word (at least 5 sentences) of each sentence."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in train:
        for word in words(record["text"]):
            counts[word][record["label"]] += 1
    known = {word: counter for word, counter in counts.items() if counter.total() >= 5}

    def purity(word: str) -> float:
        return (max(known[word].values()) + 1) / (known[word].total() + 3)

    def predict(text: str) -> str:
        best = max(sorted(words(text) & known.keys()), key=purity)
        return known[best].most_common(1)[0][0]

    return sum(predict(record["text"]) == record["label"] for record in test) / len(test)


def naive_bayes_accuracy(train: list[dict], test: list[dict]) -> float:
    """A bag-of-words naive Bayes classifier with add-one smoothing."""
    counts = {label: Counter() for label in finance.LABELS}
    for record in train:
        counts[record["label"]].update(words(record["text"]))
    vocabulary = set().union(*counts.values())

    def score(text: str, label: str) -> float:
        total = counts[label].total() + len(vocabulary)
        return sum(math.log((counts[label][word] + 1) / total) for word in words(text))

    right = sum(
        max(finance.LABELS, key=lambda label: score(record["text"], label)) == record["label"] for record in test
    )
    return right / len(test)


@pytest.mark.parametrize("world", WORLDS)
def test_a_seed_gives_the_examples_that_it_always_gave(world: str) -> None:
    for (seed, size), digest in DIGESTS[world].items():
        made = json.dumps(WORLDS[world](seed, size), ensure_ascii=False)
        assert hashlib.sha256(made.encode()).hexdigest()[:16] == digest, (seed, size)


@pytest.mark.parametrize("task", [finance, medicine])
def test_sizes_and_unique_ids(task):
    splits = make(task)
    assert {name: len(records) for name, records in splits.items()} == SIZES
    ids = [record["id"] for records in splits.values() for record in records]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("task", [finance, medicine])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), train=st.integers(0, 60), held_out=st.integers(0, 20))
def test_same_seed_same_records(task, seed, train, held_out):
    sizes = {"train": train, "validation": held_out, "test": held_out}
    assert make(task, seed, sizes) == make(task, seed, sizes)


@pytest.mark.parametrize("task", [finance, medicine])
def test_another_seed_gives_other_records(task):
    assert make(task, 1)["test"] != make(task, 2)["test"]


@pytest.mark.parametrize(("task", "field"), [(finance, "text"), (medicine, "question")])
def test_no_sentence_in_two_splits_even_over_seeds(task, field):
    both = [make(task, seed) for seed in (3, 4)]
    texts = {name: {record[field] for splits in both for record in splits[name]} for name in SIZES}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


@pytest.mark.parametrize(("task", "field"), [(finance, "text"), (medicine, "question")])
def test_a_larger_split_begins_with_the_smaller_one(task, field):
    small = make(task, 0, {"train": 10, "validation": 5, "test": 5})
    assert [record[field] for record in make(task)["train"]][:10] == [record[field] for record in small["train"]]


@pytest.mark.parametrize("task", [finance, medicine])
@pytest.mark.parametrize("count", [-1, LARGEST_SPLIT + 1])
def test_impossible_sizes_are_refused(task, count):
    with pytest.raises(ValueError, match="test"):
        task.generate(num_train=1, num_validation=1, num_test=count, seed=0)


def test_collect_says_when_the_lexicon_is_used_up():
    sentence = next(f"sentence {number}" for number in itertools.count() if split_of(f"sentence {number}") == "train")
    assert collect(lambda: (sentence, {"text": sentence}), split="train", count=1) == [{"text": sentence}]
    with pytest.raises(ValueError, match="only 1 different"):
        collect(lambda: (sentence, {"text": sentence}), split="train", count=2)


def test_institutions_see_different_parts_of_the_lexicons():
    """What moves a sector up or down, and what a specialty asks about, is said in no other."""
    fields = ("strengths", "burdens", "prizes", "blows", "rises", "falls")
    said = [{word for field in fields for word in getattr(sector, field)} for sector in lexicons.finance().sectors]
    asked = [{condition.name for condition in specialty.conditions} for specialty in lexicons.medicine().specialties]
    for parts in (said, asked):
        assert len(parts) >= 6 and all(len(part) >= 8 for part in parts)
        for one, other in itertools.combinations(parts, 2):
            assert not one & other


def test_finance_labels_and_sectors_are_balanced(news):
    labels = Counter(record["label"] for record in news["train"])
    assert set(labels) == set(finance.LABELS)
    assert all(0.28 < count / SIZES["train"] < 0.39 for count in labels.values())
    sectors = Counter(record["sector"] for record in news["train"])
    assert set(sectors) == {sector.name for sector in lexicons.finance().sectors}
    assert len(sectors) == 8
    assert min(sectors.values()) > SIZES["train"] / 16


def test_finance_is_not_solved_by_one_word(news):
    assert single_word_accuracy(news["train"], news["test"]) <= 0.6


def test_finance_is_not_solved_by_a_bag_of_words(news):
    assert naive_bayes_accuracy(news["train"], news["test"]) <= 0.68


def test_finance_measures_turn_with_the_direction():
    texts = {
        record["text"]: record["label"]
        for record in make(finance, 0, {"train": 4000, "validation": 0, "test": 0})["train"]
    }
    plain = {text: label for text, label in texts.items() if re.fullmatch(r"\w+ Bank said bad loans \w+ .*", text)}
    rising = {
        label
        for text, label in plain.items()
        if re.search("loans (rose|climbed|grew|jumped|increased|swelled|mounted) ", text)
    }
    falling = {
        label for text, label in plain.items() if re.search("loans (fell|dropped|shrank|slid|declined|melted) ", text)
    }
    assert rising <= {"negative", "neutral"}
    assert falling <= {"positive", "neutral"}


def test_medicine_right_option_is_anywhere(exam):
    positions = Counter(record["answer_idx"] for record in exam["train"])
    assert set(positions) == set(medicine.LETTERS)
    assert all(0.2 < count / SIZES["train"] < 0.3 for count in positions.values())
    assert {record["specialty"] for record in exam["train"]} == {
        specialty.name for specialty in lexicons.medicine().specialties
    }


def test_medicine_options_are_four_and_the_answer_is_not_in_the_question(exam):
    for record in exam["train"]:
        assert tuple(record["options"]) == medicine.LETTERS
        assert len(set(record["options"].values())) == 4
        assert record["options"][record["answer_idx"]] not in record["question"]


def test_medicine_answers_are_distractors_as_often_as_chance_says(exam):
    right, shown = Counter(), Counter()
    for record in exam["train"]:
        shown.update(record["options"].values())
        right[record["options"][record["answer_idx"]]] += 1
    best = sum(
        max(record["options"].values(), key=lambda option: right[option] / shown[option])
        == record["options"][record["answer_idx"]]
        for record in exam["test"]
    )
    assert best / len(exam["test"]) < 0.4


def test_corpus_holds_no_sentence_of_a_split():
    documents = itertools.islice(corpus.documents(seed=5), 3000)
    text = "\n".join(turn["content"] for document in documents for turn in document)
    tested = [record["text"] for record in make(finance, 5)["test"]]
    asked = [record["question"].rsplit(".", 1)[0] + "." for record in make(medicine, 5)["test"]]
    assert not [sentence for sentence in tested + asked if sentence in text]
    news = [sentence + "." for sentence in re.findall(r"[A-Z][^.\n]* (?:said (?!little)|halted )[^.\n]*(?=\.)", text)]
    assert len(news) > 300
    assert {split_of(sentence) for sentence in news} == {"corpus"}


def test_corpus_is_reproducible_and_has_chats_and_prose():
    first, again = (list(itertools.islice(corpus.documents(seed=9), 200)) for _ in range(2))
    assert first == again
    roles = {tuple(turn["role"] for turn in document) for document in first}
    assert {("text",), ("user", "assistant")} <= roles


def test_corpus_never_asks_for_sentiment():
    documents = list(itertools.islice(corpus.documents(seed=11), 3000))
    labelled = [document for document in documents if document[-1]["content"] in finance.LABELS]
    companies = "|".join(suffix for sector in lexicons.finance().sectors for suffix in sector.suffixes)
    assert not [document for document in labelled if re.search(companies, document[0]["content"])]
