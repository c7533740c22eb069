"""Server steps and corrections: the known answers, one number by hand each, and what they are at zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from silotune.methods.aggregate import COUNTED
from silotune.methods.algorithms import Method, method
from silotune.methods.corrections import LocalWork, control_variates, dynamic_regulariser
from silotune.methods.server_step import adam_moment, adaptive_step, control_step, dynamic_step
from silotune.settings.algorithms import ALGORITHMS
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import ClientUpdate, Tensors

START = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}
ROUNDS = (
    (([1.1, -2.2, 0.5], 1), ([0.9, -1.8, 0.7], 3)),
    (([1.2, -1.9, 0.6], 1), ([1.0, -2.1, 0.4], 3)),
)
OPTIMIZER = {"server_learning_rate": 0.1, "server_beta1": 0.9, "server_tau": 1e-3}


def two_rounds(made: Method) -> torch.Tensor:
    """The weights after the two rounds of clients that every known answer is about."""
    weights, memory = START, {}
    for clients in ROUNDS:
        updates = [
            ClientUpdate(str(number), {"w": torch.tensor(own, dtype=torch.float64) - weights["w"]}, count)
            for number, (own, count) in enumerate(clients)
        ]
        weights, memory = made.step(weights, made.aggregate(updates), memory, 1.0)
    return weights["w"]


def slow(second_moment) -> torch.Tensor:
    """Reddi et al. 2021, Algorithm 2, number by number in Python's own floats."""
    x, m, v = START["w"].tolist(), [0.0] * 3, [1e-6] * 3
    for clients in ROUNDS:
        weight = sum(count for _, count in clients)
        for place in range(3):
            change = sum(count * (own[place] - x[place]) for own, count in clients) / weight
            m[place] = 0.9 * m[place] + 0.1 * change
            v[place] = second_moment(v[place], change**2)
            x[place] += 0.1 * m[place] / (v[place] ** 0.5 + 1e-3)
    return torch.tensor(x, dtype=torch.float64)


def test_fedadam_is_algorithm_2_of_reddi_et_al() -> None:
    known = torch.tensor([0.9754640374, -1.9371775133, 0.5896196283], dtype=torch.float64)
    torch.testing.assert_close(
        two_rounds(method(FederationSection(algorithm={"type": "fedadam", **OPTIMIZER}))), known, rtol=0, atol=1e-10
    )
    unweighted = method(FederationSection(algorithm={"type": "fedadam", **OPTIMIZER}, weighting="uniform"))
    known = torch.tensor([1.090506866, -2.0, 0.5901557297], dtype=torch.float64)
    torch.testing.assert_close(two_rounds(unweighted), known, rtol=0, atol=1e-9)


MOMENTS = {
    "fedadagrad": lambda v, square: v + square,
    "fedyogi": lambda v, square: v - 0.01 * square * ((v > square) - (v < square)),
    "fedadam": lambda v, square: 0.99 * v + 0.01 * square,
}


@pytest.mark.parametrize("name", MOMENTS)
def test_adaptive_steps_are_the_written_ones(name: str) -> None:
    made = two_rounds(method(FederationSection(algorithm={"type": name, **OPTIMIZER})))
    torch.testing.assert_close(made, slow(MOMENTS[name]), rtol=0, atol=1e-14)


def test_fedavgm_is_the_known_answer() -> None:
    made = two_rounds(method(FederationSection(algorithm={"type": "fedavgm", "server_momentum": 0.9})))
    known = torch.tensor([1.005, -1.96, 0.585], dtype=torch.float64)
    torch.testing.assert_close(made, known, rtol=0, atol=1e-12)


def test_adaptive_rate_unless_given() -> None:
    assert FederationSection().algorithm.server_learning_rate == 1.0
    for name in MOMENTS:
        assert FederationSection(algorithm=name).algorithm.server_learning_rate == 0.01
        given = FederationSection(algorithm={"type": name, "server_learning_rate": 0.5})
        assert given.algorithm.server_learning_rate == 0.5


def test_a_small_step_moves_every_value_alike() -> None:
    """m / (sqrt(v) + tau) with v0 = tau^2: a delta far below tau is divided by 2 tau, by hand."""
    step = adaptive_step(1.0, beta1=0.0, tau=1e-3, second_moment=adam_moment(1.0))
    weights, memory = step({"w": torch.zeros(2)}, {"w": torch.tensor([1e-3, -4e-3])}, {}, 1.0)
    torch.testing.assert_close(weights["w"], torch.tensor([0.5, -2.0]))
    assert sorted(memory) == ["first/w", "second/w"]


def test_fednova_by_hand() -> None:
    """Deltas [2] in 1 step (n = 1) and [6] in 3 steps (n = 3): per step 2 and 2, mean work 2.5, so 5."""
    made = method(FederationSection(algorithm="fednova"))
    updates = [
        ClientUpdate("a", {"w": torch.tensor([2.0])}, 1, steps=1),
        ClientUpdate("b", {"w": torch.tensor([6.0])}, 3, steps=3),
    ]
    assert made.aggregate(updates)["w"].item() == pytest.approx(5.0)
    assert made.aggregate(updates[::-1])["w"].item() == pytest.approx(5.0)


def test_fednova_of_equal_work_is_fedavg_bit_for_bit() -> None:
    noise = torch.Generator().manual_seed(1)
    updates = [ClientUpdate(str(n), {"w": torch.randn(9, generator=noise)}, n + 1, steps=7) for n in range(4)]
    tiny.assert_same_bits(
        method(FederationSection(algorithm="fednova")).aggregate(updates),
        method(FederationSection()).aggregate(updates),
    )


def test_scaffold_s_server_by_hand() -> None:
    """Half of the clients: weights + 2 * delta, c + 1/2 * (mean change of the controls)."""
    made = method(FederationSection(algorithm={"type": "scaffold", "server_learning_rate": 2.0}))
    weights = {"w": torch.tensor([1.0])}
    tiny.assert_same_bits(made.sent(weights, {}), {**weights, "control/w": torch.zeros(1)})
    updates = [
        ClientUpdate("a", {"w": torch.tensor([1.0]), "control/w": torch.tensor([2.0])}, 1),
        ClientUpdate("b", {"w": torch.tensor([5.0]), "control/w": torch.tensor([4.0])}, 3),
    ]
    delta = made.aggregate(updates)
    assert delta["w"].item() == 4.0, "weighed by examples"
    assert delta["control/w"].item() == 3.5, "a control counts what its update counts"
    weights, memory = made.step(weights, delta, {}, 0.5)
    assert weights["w"].item() == 9.0 and memory["control/w"].item() == 1.75
    _, memory = made.step(weights, delta, memory, 0.5)
    assert memory["control/w"].item() == 3.5
    assert made.sent(weights, memory)["control/w"].item() == 3.5


def test_a_mean_over_all_clients_is_in_proportion_to_their_weighted_sum() -> None:
    """Clients of 1, 3 and 4 examples answer one by one, by hand: all weights are 3, 6, 8 as far as is known by then."""
    made = method(FederationSection(algorithm="scaffold"))
    weights, memory, known = {"w": torch.zeros(1)}, {}, []
    for examples, change in ((1, 3.0), (3, 4.0), (4, 1.0)):
        update = ClientUpdate("c", {"w": torch.zeros(1), "control/w": torch.tensor([change])}, examples)
        weights, memory = made.step(weights, made.aggregate([update]), memory, 1 / 3)
        known.append(memory["control/w"].item())
    assert known == pytest.approx([1 * 3 / 3, (1 * 3 + 3 * 4) / 6, (1 * 3 + 3 * 4 + 4 * 1) / 8])


def work(delta: Tensors, gradient: Tensors | None = None) -> LocalWork:
    return LocalWork(delta, steps=5, learning_rate=0.1, gradient=lambda: gradient or {})


def test_scaffold_s_client_by_hand() -> None:
    own, server, delta = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}, {"w": torch.tensor([0.5])}
    for option, expected in (("I", 7.0), ("II", 1.0 - 3.0 - 0.5 / (5 * 0.1))):
        correction = control_variates(option)
        term = correction.begin(own, server)({"w": torch.zeros(1)}, {"w": torch.zeros(1)})
        assert term["w"].item() == 2.0
        assert correction.end(own, server, work(delta, {"w": torch.tensor([7.0])}))["w"].item() == expected
        assert correction.sends_change


def test_feddyn_by_hand() -> None:
    """Two rounds with alpha = 2 and half of the clients, server and client."""
    step, counted = dynamic_step(1.0, 2.0), {COUNTED: torch.tensor([2.0])}
    weights, memory = step({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.4]), **counted}, {}, 0.5)
    torch.testing.assert_close(memory["w"], torch.tensor([-0.4]))  # h = 0 - 2 * 1/2 * .4
    torch.testing.assert_close(weights["w"], torch.tensor([1.6]))  # 1.4 + .4 / 2
    weights, memory = step(weights, {"w": torch.tensor([-0.2]), **counted}, memory, 0.5)
    torch.testing.assert_close(memory["w"], torch.tensor([-0.2]))
    torch.testing.assert_close(weights["w"], torch.tensor([1.5]))
    correction = dynamic_regulariser(2.0)
    own = correction.end({"w": torch.zeros(1)}, {}, work({"w": torch.tensor([0.4])}))
    torch.testing.assert_close(own["w"], torch.tensor([-0.8]))
    term = correction.begin(own, {})({"w": torch.tensor([1.5])}, {"w": torch.tensor([1.0])})
    torch.testing.assert_close(term["w"], torch.tensor([1.8]))  # 2 * .5 + .8


def test_feddyn_finds_the_optimum_of_quadratic_clients_where_fedavg_does_not() -> None:
    """F_k = a_k (x - b_k)^2 / 2, many local steps: the optimum of the mean loss is sum(a b) / sum(a)."""
    curvatures, targets = (1.0, 4.0), (0.0, 1.0)
    optimum, none = 4.0 / 5.0, {"w": torch.zeros(1)}

    def trained(**algorithm: object) -> float:
        made = method(FederationSection(algorithm=algorithm))
        weights, memory, own = none, {}, [none, none]
        for _ in range(30):
            updates = []
            for place, (curvature, target) in enumerate(zip(curvatures, targets, strict=True)):
                x = weights
                term = made.correction.begin(own[place], {}) if made.correction else lambda x, received: none
                for _ in range(25):
                    x = {"w": x["w"] - 0.2 * (curvature * (x["w"] - target) + term(x, weights)["w"])}
                delta = {"w": x["w"] - weights["w"]}
                if made.correction:
                    own[place] = made.correction.end(own[place], {}, work(delta))
                updates.append(ClientUpdate(str(place), delta, 1))
            weights, memory = made.step(weights, made.aggregate(updates), memory, 1.0)
        return weights["w"].item()

    assert trained(type="fedavg") == pytest.approx(0.5, abs=1e-3)
    assert trained(type="feddyn", alpha=1.0) == pytest.approx(optimum, abs=1e-3)


ZERO = {
    "fedprox": {"proximal_mu": 0.0},
    "feddyn": {"alpha": 0.0},
    "fedavgm": {"server_momentum": 0.0},
    "fednova": {},
}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(sorted(ZERO)),
    st.integers(0, 2**31),
)
def test_at_zero_they_are_fedavg_bit_for_bit(clients: int, shape: list[int], name: str, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    made = [method(FederationSection(algorithm={"type": name, **ZERO[name]})), method(FederationSection())]
    start = {"w": torch.randn(shape, generator=noise), "b": torch.randn(2, generator=noise)}
    states: list[tuple[Tensors, Tensors]] = [(start, {}), (start, {})]
    for _ in range(2):
        updates = [
            ClientUpdate(str(n), {k: torch.randn(t.shape, generator=noise) for k, t in start.items()}, n + 1, steps=3)
            for n in range(clients)
        ]
        states = [
            each.step(weights, each.aggregate(updates), memory, 1.0)
            for each, (weights, memory) in zip(made, states, strict=True)
        ]
    tiny.assert_same_bits(states[0][0], states[1][0])


def test_terms_at_zero_are_zero() -> None:
    weights, received, none = {"w": torch.randn(4)}, {"w": torch.randn(4)}, {"w": torch.zeros(4)}
    for name in ("fedprox", "feddyn"):
        correction = method(FederationSection(algorithm={"type": name, **ZERO[name]})).correction
        assert not correction.begin(none, {})(weights, received)["w"].any()
    assert not control_variates("II").begin(none, none)(weights, received)["w"].any()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_travels_has_the_layout_of_the_memory_s_weights(name: str) -> None:
    """Before the first round and after one, a request names the same tensors: strict decoding knows what to expect."""
    made = method(FederationSection(algorithm=name), TrainingSection())
    first = made.sent(START, {})
    delta = made.aggregate([ClientUpdate("c", {key: torch.ones_like(tensor) for key, tensor in first.items()}, 1)])
    weights, memory = made.step(START, delta, {}, 0.5)
    later = made.sent(weights, memory)
    assert {key: tensor.shape for key, tensor in first.items()} == {key: tensor.shape for key, tensor in later.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in later.values())


def test_control_step_leaves_its_inputs_alone() -> None:
    weights, memory = {"w": torch.ones(2)}, {"control/w": torch.ones(2)}
    delta = {"w": torch.ones(2), "control/w": torch.ones(2), COUNTED: torch.ones(1)}
    control_step(1.0)(weights, delta, memory, 0.5)
    assert weights["w"].tolist() == memory["control/w"].tolist() == [1.0, 1.0]
