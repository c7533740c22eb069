"""LoRA-aware rules against the slow way: the mean of the clients' products, formed in full."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune import lora
from silotune.methods import products as module
from silotune.methods.algorithms import LORA_RULES, PERSONAL_TERMS, Method, advance, method
from silotune.methods.products import Products
from silotune.methods.schedule import in_turns, outgoing, returned, whole, without_a, without_own_b
from silotune.settings import lora_rules
from silotune.settings.sections import FederationSection
from silotune.structs import ClientUpdate, ServerState, Tensors

SHAPES = {"m.q": (12, 9), "m.v": (7, 10)}
NUM = (5, 3, 2)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(rank: int, seed: int = 0, shapes=SHAPES) -> Tensors:
    made = {"head.weight": draw(3, 4, seed=seed)}
    for number, (name, (out, into)) in enumerate(shapes.items()):
        made[name + lora.A] = draw(rank, into, seed=seed + 10 + number)
        made[name + lora.B] = draw(out, rank, seed=seed + 20 + number)
    return made


def updates(weights: Tensors, parts, ranks=(None, None, None)) -> list[ClientUpdate]:
    made = []
    for number, (count, rank) in enumerate(zip(NUM, ranks, strict=True)):
        sent = returned(outgoing(weights, parts, rank), parts)
        delta = {
            name: draw(*value.shape, seed=100 * number + place) for place, (name, value) in enumerate(sent.items())
        }
        made.append(ClientUpdate(f"c{number}", delta, count))
    return made


def residual(weights: Tensors, name: str) -> torch.Tensor:
    pair = lora.residuals(weights).get(name)
    return 0 if pair is None else pair[0].double() @ pair[1].double()


def total(weights: Tensors, name: str) -> torch.Tensor:
    """What the model adds to a module's base, in full [out, in]."""
    return weights[name + lora.B].double() @ weights[name + lora.A].double() + residual(weights, name)


def mean_of_products(weights: Tensors, made: list[ClientUpdate], name: str) -> torch.Tensor:
    """The slow way."""
    found = 0
    for update in made:
        rank = lora.rank_of(update.delta)
        own = {end: lora.cut({name + end: weights[name + end]}, rank)[name + end].double() for end in (lora.A, lora.B)}
        for end in own:
            own[end] = own[end] + update.delta.get(name + end, torch.zeros(1)).double()
        found = found + update.num_examples * own[lora.B] @ own[lora.A]
    return found / sum(update.num_examples for update in made)


def one_round(rule: str, weights: Tensors, made: list[ClientUpdate], number: int = 1) -> tuple[Tensors, float]:
    how: Method = method(FederationSection(lora=rule))
    watching = Products(weights, how.schedule(number), weigh=how.weigh, keep=how.fold is not None)
    delta = how.aggregate(watching.watch(iter(made)))
    state = ServerState(number - 1, weights)
    after, _, error = advance(how, state, delta, products=watching, share=1.0, seed=number)
    return after, error


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).norm() / right.norm())


def test_tables_hold_what_the_configuration_allows() -> None:
    assert [each.type for each in LORA_RULES] == list(lora_rules.LORA_RULES)
    pulled = lora_rules.PERSONALIZATIONS.those("is_pulled")
    assert [each.type for each in PERSONAL_TERMS] == pulled


def test_by_hand() -> None:
    """B = 1, 3 and A = 2, 4, equal weights: the mean product is 7, that of the means 6; the error is 1 / 7."""
    zero = {"m" + lora.A: torch.zeros(1, 1), "m" + lora.B: torch.zeros(1, 1)}
    made = [
        ClientUpdate("a", {"m" + lora.A: torch.tensor([[2.0]]), "m" + lora.B: torch.tensor([[1.0]])}, 1),
        ClientUpdate("b", {"m" + lora.A: torch.tensor([[4.0]]), "m" + lora.B: torch.tensor([[3.0]])}, 1),
    ]
    after, error = one_round("factors", zero, made)
    assert float(total(after, "m")) == 6 and error == pytest.approx(1 / 7, rel=1e-6)
    for rule in ("exact-residual", "stack", "svd"):
        after, error = one_round(rule, zero, made)
        assert float(total(after, "m")) == pytest.approx(7, rel=1e-6) and error < 1e-6
    (left,) = lora.residuals(one_round("exact-residual", zero, made)[0]).values()
    assert float(left[0] @ left[1]) == pytest.approx(1)  # the covariance of B and A


@pytest.mark.parametrize("rule", ["exact-residual", "stack"])
@pytest.mark.parametrize("ranks", [(None, None, None), (1, 3, None)])
def test_exact_rules_keep_the_mean_product_over_rounds(rule: str, ranks) -> None:
    weights = model(3)
    for number in (1, 2, 3):  # the residual outgrows the modules' own rank on the way
        made = updates(weights, whole(number), ranks)
        before = weights
        weights, error = one_round(rule, before, made, number)
        for name in SHAPES:
            wanted = mean_of_products(before, made, name) + residual(before, name)
            assert relative(total(weights, name), wanted) < 1e-6
        assert error < 1e-6
    for name, (out, into) in SHAPES.items():
        assert lora.residuals(weights)[name][1].shape[0] <= min(out, into)


def test_svd_of_full_rank_is_the_mean_product_and_of_less_the_best_approximation() -> None:
    full = model(10)
    made = updates(full, whole(1), (4, 10, 2))
    after, error = one_round("svd", full, made)
    assert error < 1e-6
    for name in SHAPES:
        assert relative(total(after, name), mean_of_products(full, made, name)) < 1e-6
    small = model(2)
    made = updates(small, whole(1))
    after, error = one_round("svd", small, made)
    off = size = 0.0
    for name in SHAPES:
        values = torch.linalg.svdvals(mean_of_products(small, made, name))
        off, size = off + float(values[2:].square().sum()), size + float(values.square().sum())
    assert error == pytest.approx(math.sqrt(off / size), rel=1e-5)
    for name in SHAPES:  # a client of rank 1 is sent the best approximation of rank 1
        u, s, v = torch.linalg.svd(mean_of_products(small, made, name), full_matrices=False)
        sent = lora.cut(after, 1)
        assert relative(sent[name + lora.B] @ sent[name + lora.A], s[0] * u[:, :1] @ v[:1]) < 1e-5


@pytest.mark.parametrize(("rule", "number"), [("freeze-a", 1), ("alternate", 1), ("alternate", 2)])
def test_one_moving_factor_is_averaged_exactly(rule: str, number: int) -> None:
    weights = model(3)
    parts = method(FederationSection(lora=rule)).schedule(number)
    made = updates(weights, parts)
    after, error = one_round(rule, weights, made, number)
    assert error < 1e-6
    for name in SHAPES:
        assert relative(total(after, name), mean_of_products(weights, made, name)) < 1e-6
        rests = lora.B if number == 2 else lora.A
        assert torch.equal(after[name + rests], weights[name + rests])


@settings(max_examples=20, deadline=None)
@given(st.permutations([0, 1, 2]), st.integers(1, 4), st.sampled_from(list(lora_rules.LORA_RULES)))
def test_others_than_factors_are_averaged_plainly_whatever_the_rule_and_order_is_nothing(order, rank, rule) -> None:
    weights = model(rank)
    made = updates(weights, method(FederationSection(lora=rule)).schedule(1))
    after, error = one_round(rule, weights, made)
    plain = sum(update.num_examples * update.delta["head.weight"].double() for update in made) / sum(NUM)
    torch.testing.assert_close(after["head.weight"], (weights["head.weight"] + plain).float())
    shuffled, again = one_round(rule, weights, [made[place] for place in order])
    for name in SHAPES:
        assert relative(total(shuffled, name), total(after, name)) < 1e-5
    assert (error is None) == (again is None) == (rule == "share-a")


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=5),
    st.sampled_from(["stack", "svd", "exact-residual"]),
)
def test_the_mean_product_is_kept_whatever_the_shapes_and_clients(shapes, clients, rule) -> None:
    weights = model(9, shapes={f"m.{number}": shape for number, shape in enumerate(shapes)})
    made = []
    for number, (rank, count) in enumerate(clients):
        sent = outgoing(weights, whole(1), rank)
        delta = {name: draw(*value.shape, seed=number + 7 * place) for place, (name, value) in enumerate(sent.items())}
        made.append(ClientUpdate(f"c{number}", delta, count))
    after, _ = one_round(rule, weights, made)
    for name in lora.modules(weights):
        wanted = mean_of_products(weights, made, name)
        assert float((total(after, name) - wanted).norm()) < 2e-6 * max(1.0, float(wanted.norm()))


def test_one_client_is_its_own_mean() -> None:
    weights = model(3)
    made = updates(weights, whole(1))[:1]
    plain, error = one_round("factors", weights, made)
    kept, _ = one_round("exact-residual", weights, made)
    assert error < 1e-6 and not lora.residuals(kept)
    for name in plain:
        assert torch.equal(plain[name], kept[name])


def test_what_travels() -> None:
    weights = {**model(4), "m.q" + lora.RESIDUAL_A: torch.ones(2, 9), "m.q" + lora.RESIDUAL_B: torch.ones(12, 2)}
    names = {name: set(outgoing(weights, parts, None)) for name, parts in {
        "whole": whole(1), "b": without_a(1), "turn": in_turns(2), "a": without_own_b(1)}.items()}  # fmt: skip
    a, b = {"m.q" + lora.A, "m.v" + lora.A}, {"m.q" + lora.B, "m.v" + lora.B}
    assert names["whole"] == names["turn"] == set(weights)
    assert names["b"] == set(weights) - a and names["a"] == set(weights) - b
    assert set(returned(weights, in_turns(1))) == {"head.weight"} | b
    assert set(returned(weights, in_turns(2))) == {"head.weight"} | a
    assert [name for name in weights if without_own_b(1).is_personal(name)] == sorted(b, key=list(weights).index)
    small = outgoing(weights, whole(1), 2)
    assert small["m.q" + lora.A].shape == (2, 9) and small["m.v" + lora.B].shape == (7, 2)
    assert torch.equal(small["m.q" + lora.RESIDUAL_B], weights["m.q" + lora.RESIDUAL_B])


def test_clients_of_low_rank_leave_the_rows_they_lack_as_they_are() -> None:
    weights = model(3)
    made = updates(weights, whole(1), (1, 1, 2))
    after, _ = one_round("factors", weights, made)
    for name in SHAPES:
        assert torch.equal(after[name + lora.A][2:], weights[name + lora.A][2:])
        assert not torch.equal(after[name + lora.A][1], weights[name + lora.A][1])


def test_a_wide_model_is_probed_and_the_estimate_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model(2, shapes={f"m.{number}": (80, 90) for number in range(6)})
    made = updates(weights, whole(1))
    _, exact = one_round("factors", weights, made)
    monkeypatch.setattr(module, "LARGEST_EXACT", 10)
    _, estimated = one_round("factors", weights, made)
    assert estimated == pytest.approx(exact, rel=0.1) and estimated != exact


def test_no_lora_no_error() -> None:
    weights = {"m.ia3_l": torch.ones(3)}
    after, error = one_round("factors", weights, [ClientUpdate("a", {"m.ia3_l": torch.ones(3)}, 1)])
    assert error is None and after["m.ia3_l"].tolist() == [2, 2, 2]


def test_a_broken_update_spoils_no_error() -> None:
    weights = model(2)
    made = updates(weights, whole(1))
    watching = Products(weights, whole(1), weigh=lambda update: update.counts)
    broken = ClientUpdate("x", {name: value * float("nan") for name, value in made[0].delta.items()}, 9)
    assert len(list(watching.watch([made[0], broken]))) == 2
    assert watching.error() < 1e-6


def test_never_two_updates_in_memory() -> None:
    weights = {"m" + lora.A: torch.zeros(2, 40), "m" + lora.B: torch.zeros(30, 2)}
    alive: list[weakref.ref] = []
    most = 0

    def arriving() -> Iterator[ClientUpdate]:
        nonlocal most
        for number in range(10):
            delta = {name: torch.full_like(value, float(number)) for name, value in weights.items()}
            alive.extend(weakref.ref(value) for value in delta.values())
            made = ClientUpdate(str(number), delta, 1)
            del delta
            most = max(most, sum(ref() is not None for ref in alive))
            yield made
            del made

    for rule in ("factors", "stack"):
        one_round(rule, weights, arriving())  # type: ignore[arg-type]
    assert most == 2  # one update of two tensors
