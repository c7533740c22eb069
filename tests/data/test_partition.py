from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.data import partition as module
from silotune.data.partition import deal_alike, dealt_by, find_faults, partition, skew
from silotune.errors import DataError
from silotune.settings.sections import PartitionSection
from silotune.structs import Example

LABELS = ("negative", "neutral", "positive")


def make(labels: list[int], subjects: list[str] | None = None) -> list[Example]:
    subjects = subjects or ["x"] * len(labels)
    return [
        Example((("user", "?"),), LABELS[label], LABELS, label, {"label": LABELS[label], "subject": subject})
        for label, subject in zip(labels, subjects, strict=True)
    ]


def many(count: int) -> list[Example]:
    return make([index * 7 % 10 // 4 for index in range(count)], [f"s{index % 9}" for index in range(count)])


def split(examples: list[Example], seed: int = 0, **section: Any) -> dict[str, tuple[int, ...]]:
    return partition(examples, PartitionSection(**section), seed=seed)


def assert_covers(clients: dict[str, tuple[int, ...]], count: int) -> None:
    assert sorted(index for own in clients.values() for index in own) == list(range(count))
    assert all(own == tuple(sorted(own)) for own in clients.values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_example_lands_in_exactly_one_client(data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, 12), "clients")
    least = data.draw(st.integers(1, 5), "min_examples")
    count = data.draw(st.integers(clients * least, 150), "count")
    labels = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count), "labels")
    subjects = data.draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=count, max_size=count), "subjects")
    section = PartitionSection(
        scheme=data.draw(st.sampled_from(["iid", "dirichlet", "quantity"]), "scheme"),
        clients=clients,
        min_examples=least,
        field=data.draw(st.sampled_from(["label", "subject"]), "field"),
        alpha=data.draw(st.floats(0.01, 100), "alpha"),
    )
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    found = partition(make(labels, subjects), section, seed=seed)
    assert_covers(found, count)
    assert len(found) == clients
    assert min(map(len, found.values())) >= least
    assert list(found) == sorted(found)
    assert found == partition(make(labels, subjects), section, seed=seed)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["Skin", "Eye & Ear", "eye ear", "", "other", "ENT"]), min_size=1), st.integers(1, 6))
def test_natural_partition_covers_and_merges_rare_values(subjects: list[str], least: int) -> None:
    section = PartitionSection(scheme="field", field="subject", min_examples=least)
    examples = make([0] * len(subjects), subjects)
    try:
        found = partition(examples, section, seed=0)
    except DataError:
        sizes = [subjects.count(value) for value in set(subjects) - {"other"}]
        assert sum(size >= least for size in sizes) < 2
        return
    assert_covers(found, len(subjects))
    assert min(map(len, found.values())) >= least
    assert len(found) >= 2


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity"])
def test_the_seed_decides(scheme: str) -> None:
    examples = many(200)
    assert split(examples, 1, scheme=scheme) == split(examples, 1, scheme=scheme)
    assert split(examples, 1, scheme=scheme) != split(examples, 2, scheme=scheme)


def test_names_are_padded_so_that_they_sort() -> None:
    assert list(split(many(48), scheme="iid", clients=12))[::11] == ["client-00", "client-11"]
    assert list(split(many(48), scheme="iid", clients=10))[9] == "client-9"


def test_iid_shares_differ_by_one_at_most() -> None:
    sizes = [len(own) for own in split(many(50), scheme="iid", clients=8).values()]
    assert sorted(sizes) == [6] * 6 + [7] * 2


def test_small_alpha_skews_labels_and_large_alpha_does_not() -> None:
    examples = many(3000)
    distances = [
        skew(examples, split(examples, scheme="dirichlet", clients=6, alpha=alpha))["mean_distance"]
        for alpha in (0.05, 1.0, 1000.0)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.05 < 0.4 < distances[0]


def test_dirichlet_over_another_field() -> None:
    examples = many(900)
    found = split(examples, scheme="dirichlet", clients=4, alpha=0.1, field="subject")
    assert skew(examples, found, field="subject")["mean_distance"] > 0.3
    assert skew(examples, found)["mean_distance"] < 0.2


def test_quantity_skews_sizes_but_not_labels() -> None:
    examples = many(3000)
    found = split(examples, scheme="quantity", clients=4, alpha=0.5, min_examples=100)
    sizes = sorted(map(len, found.values()))
    assert sizes[-1] > 4 * sizes[0]
    assert skew(examples, found)["max_distance"] < 0.15


def test_a_draw_that_cannot_be_met_is_filled_up() -> None:
    found = split(make([0] * 40), scheme="dirichlet", clients=10, alpha=0.01)
    assert [len(own) for own in found.values()] == [4] * 10


def test_natural_clients_are_named_by_value() -> None:
    subjects = ["Eye & Ear"] * 5 + ["eye ear"] * 4 + ["ENT"] * 6 + ["Skin"] * 2 + ["Bone"] * 3
    found = split(make([0] * 20, subjects), scheme="field", field="subject")
    assert {name: len(own) for name, own in found.items()} == {"ent": 6, "eye-ear": 5, "eye-ear-2": 4, "other": 5}
    long = split(make([0] * 8, ["x" * 300 + "a"] * 4 + ["x" * 300 + "b"] * 4), scheme="field", field="subject")
    assert set(long) == {"x" * 80, "x" * 80 + "-2"}


def test_rare_values_take_the_next_smallest_along() -> None:
    found = split(make([0] * 16, ["a"] * 6 + ["b"] * 5 + ["c"] * 4 + ["d"]), scheme="field", field="subject")
    assert {name: len(own) for name, own in found.items()} == {"a": 6, "b": 5, "other": 5}


def test_a_value_called_other_takes_the_rare_ones_in() -> None:
    found = split(make([0] * 15, ["a"] * 6 + ["Other"] * 5 + ["c"] * 4), scheme="field", field="subject")
    assert {name: len(own) for name, own in found.items()} == {"a": 6, "c": 4, "other": 5}
    found = split(make([0] * 12, ["a"] * 6 + ["Other"] * 5 + ["c"]), scheme="field", field="subject")
    assert {name: len(own) for name, own in found.items()} == {"a": 6, "other": 6}
    with pytest.raises(DataError, match="fewer than two clients"):
        split(make([0] * 6, ["other"] * 5 + ["c"]), scheme="field", field="subject")


def test_values_without_letters_get_a_name() -> None:
    assert set(split(make([0] * 8, ["+"] * 4 + ["-"] * 4), scheme="field", field="subject")) == {"client", "client-2"}


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (
            {"scheme": "iid", "clients": 30},
            "30 clients of at least 4 examples need 120, there are 20: lower .* to 5 or less",
        ),
        ({"scheme": "dirichlet", "clients": 6}, "need 24, there are 20"),
        ({"scheme": "quantity", "min_examples": 21}, "need 84, there are 20: give more data"),
        ({"scheme": "dirichlet", "field": "color"}, "field = 'color': the examples do not have it; .*: label, subject"),
        ({"scheme": "field", "field": "subject"}, "all 20 training examples have the same value"),
        ({"scheme": "field", "min_examples": 15}, "fewer than two clients have data.partition.min_examples = 15"),
        ({"scheme": "file", "files": {"a": "a.jsonl"}}, "Dataset.clients"),
    ],
)
def test_what_cannot_be_split_is_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        split(make([0] * 10 + [1] * 10), **section)


def test_open_answers_without_fields_say_what_to_do() -> None:
    examples = [Example((("user", "?"),), "free")] * 20
    with pytest.raises(DataError, match=r"they have: none \(use scheme 'iid' or 'quantity'\)"):
        split(examples, scheme="dirichlet")
    found = split(examples, scheme="iid")
    assert skew(examples, found)["labels"] == {"open": 20}
    assert find_faults(examples, found) == ()


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
def test_alpha_must_be_finite(scheme: str) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        split(make([0, 1] * 20), scheme=scheme, alpha=float("inf"))
    assert_covers(split(make([0, 1] * 20), scheme=scheme, alpha=1e-320), 40)


@pytest.mark.parametrize("shares", [{"a": [0, 1]}, {"a": [0, 1], "b": [1, 2]}, {"a": [0, 1, 2, 3]}])
def test_a_scheme_that_loses_or_doubles_an_example_is_caught(
    shares: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCHEMES", {"iid": lambda *_: shares})
    with pytest.raises(DataError, match="did not put every example into exactly one client"):
        split(make([0, 1, 2]), scheme="iid")


def test_5000_examples_take_less_than_a_second() -> None:
    examples = many(5000)
    split(examples[:50], scheme="iid")  # imports
    for scheme in ("iid", "dirichlet", "quantity", "field"):
        start = time.process_time()
        split(examples, scheme=scheme, clients=8, field="subject" if scheme == "field" else "label")
        assert time.process_time() - start < 1.0


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    split(many(200), scheme="field", field="subject")
    split(make([0] * 40), scheme="dirichlet", clients=10, alpha=0.01)
    assert capfd.readouterr() == ("", "")


def test_skew_by_hand() -> None:
    examples = make([0, 0, 1, 1])
    report = skew(examples, {"a": (0, 1), "b": (2, 3), "c": ()})
    assert report["labels"] == {"negative": 2, "neutral": 2}
    assert report["clients"]["a"] == {"num_examples": 2, "labels": {"negative": 2}, "distance": 0.5}
    assert report["clients"]["c"] == {"num_examples": 0, "labels": {}, "distance": 0.0}
    assert report["mean_distance"] == pytest.approx(1 / 3)
    assert (report["max_distance"], report["num_examples"], report["field"]) == (0.5, 4, "label")
    assert json.loads(json.dumps(report)) == report
    assert skew(examples, {"all": (0, 1, 2, 3)})["max_distance"] == 0.0
    assert skew([], {})["mean_distance"] == 0.0


def test_empty_silo_is_an_error_and_one_class_silo_a_note() -> None:
    examples = make([0, 0, 1, 1])
    with pytest.raises(DataError, match="client 'b' holds no training examples"):
        find_faults(examples, {"a": (0, 1, 2, 3), "b": ()})
    with pytest.raises(DataError, match="there are no clients"):
        find_faults(examples, {})
    assert find_faults(examples, {"a": (0, 2), "b": (1, 3)}) == ()
    assert find_faults(examples, {"a": (0, 1), "b": (2, 3, 0)}) == ("1 of 2 clients hold one class only: a",)


# --- test examples ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_test_examples_are_dealt_like_the_training_examples(data: st.DataObject) -> None:
    holders = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=80), "train")
    train = make([label for label, _ in holders])
    clients = {
        name: own for name in "abcde" if (own := tuple(i for i, (_, k) in enumerate(holders) if "abcde"[k] == name))
    }
    test = make(data.draw(st.lists(st.integers(0, 2), max_size=80), "test"))
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    field = data.draw(st.sampled_from(["label", None]), "field")
    dealt = deal_alike(test, train, clients, field=field, seed=seed)
    assert_covers(dealt, len(test))
    assert list(dealt) == list(clients)
    assert dealt == deal_alike(test, train, clients, field=field, seed=seed)
    for value in range(3) if field else (None,):
        wanted = [place for place, example in enumerate(test) if value in (None, example.label)]
        held = {name: [i for i in own if value in (None, train[i].label)] for name, own in clients.items()}
        if not any(held.values()):
            held = {name: list(own) for name, own in clients.items()}
        total = sum(map(len, held.values()))
        for name, own in held.items():
            got = len(set(dealt[name]) & set(wanted))
            assert abs(got - len(wanted) * len(own) / total) < 1, "within one example of the client's share"


def deal_sizes(count: int, holdings: tuple[int, ...], seed: int = 0) -> list[int]:
    """How many of ``count`` test examples each client gets that holds so many training examples."""
    train = make([0] * sum(holdings))
    ends = [sum(holdings[: place + 1]) for place in range(len(holdings))]
    clients = {
        f"c{place}": tuple(range(end - own, end)) for place, (own, end) in enumerate(zip(holdings, ends, strict=True))
    }
    return [len(own) for own in deal_alike(make([0] * count), train, clients, field="label", seed=seed).values()]


@pytest.mark.parametrize(
    ("count", "holdings", "expected"),
    [
        (9, (5, 4, 1), [4, 4, 1]),  # exactly 4.5, 3.6 and 0.9
        (7, (5, 3, 2), [4, 2, 1]),  # exactly 3.5, 2.1 and 1.4
        (10, (7, 2, 1), [7, 2, 1]),
        (3, (50, 30, 20), [1, 1, 1]),  # exactly 1.5, 0.9 and 0.6
        (0, (2, 1), [0, 0]),
    ],
)
def test_examples_that_remain_go_to_the_largest_remainders(
    count: int, holdings: tuple[int, ...], expected: list[int]
) -> None:
    assert [deal_sizes(count, holdings, seed) for seed in range(5)] == [expected] * 5


def test_equal_remainders_are_decided_by_lot() -> None:
    got = [deal_sizes(1, (3, 3, 3), seed) for seed in range(30)]
    assert {tuple(sizes) for sizes in got} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_a_deal_by_field_follows_the_institutions_and_merges_what_they_merged() -> None:
    train = make([0] * 30, ["lungs"] * 12 + ["heart"] * 12 + ["skin"] * 4 + ["eye"] * 2)
    section = PartitionSection(scheme="field", field="subject", min_examples=5)
    clients = partition(train, section, seed=1)
    test = make([0] * 8, ["eye", "heart", "skin", "lungs", "lungs", "unseen", "skin", "heart"])
    dealt = deal_alike(test, train, clients, field=dealt_by(section), seed=1)
    assert_covers(dealt, 8)
    assert {1, 7} <= set(dealt["heart"]) and {3, 4} <= set(dealt["lungs"]) and {0, 2, 6} <= set(dealt["other"])


def test_what_test_examples_are_dealt_by() -> None:
    by = {scheme: dealt_by(PartitionSection(scheme=scheme, field="a+b")) for scheme in module._SCHEMES}
    assert by == {"iid": None, "quantity": None, "dirichlet": "a+b", "field": "a+b", "file": "label"}


def test_partitions_are_made_without_flwr_datasets() -> None:
    """In a fresh process: an installed flwr-datasets must stay as it is for whoever imports it afterwards."""
    code = (
        "import sys\n"
        "from silotune.data.partition import partition\n"
        "from silotune.settings.sections import PartitionSection\n"
        "from silotune.structs import Example\n"
        "rows = [Example((), '!', fields={'label': str(place % 2)}) for place in range(40)]\n"
        "for scheme in ('iid', 'dirichlet', 'quantity', 'field'):\n"
        "    partition(rows, PartitionSection(scheme=scheme), seed=0)\n"
        "print([name for name in sys.modules if name.startswith('flwr_datasets')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)  # noqa: S603
    assert done.stdout.strip() == "[]"
