from __future__ import annotations

from typing import get_args

import pytest
import torch

from silotune.errors import FederationError
from silotune.experiment.parts import MODES
from silotune.methods.algorithms import ALGORITHMS, method, plain, title_of
from silotune.methods.corrections import proximal
from silotune.methods.server_step import plain_step
from silotune.settings import algorithms as settings
from silotune.settings import objectives
from silotune.settings.sections import FederationSection, Mode
from silotune.structs import ClientUpdate
from silotune.training.objectives import OBJECTIVES


def test_tables_hold_what_the_configuration_allows() -> None:
    assert list(ALGORITHMS) == [settings.ALGORITHMS[name] for name in settings.ALGORITHMS]
    assert [each.type for each in OBJECTIVES] == list(objectives.OBJECTIVES)
    assert set(MODES) == set(get_args(Mode))


def test_proximal_term_by_hand() -> None:
    weights, received = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([0.5, 6.0])}
    assert proximal(0.5)(weights, received)["w"].tolist() == [0.25, -1.0]


def test_proximal_term_is_the_gradient_of_half_mu_times_the_squared_distance() -> None:
    weights = torch.randn(5, requires_grad=True)
    received = torch.randn(5)
    (0.3 / 2 * (weights - received).square().sum()).backward()
    term = proximal(0.3)({"w": weights.detach()}, {"w": received})["w"]
    torch.testing.assert_close(term, weights.grad)


def test_plain_step_by_hand() -> None:
    weights, delta, memory = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -1.0])}, {"m": torch.ones(1)}
    stepped, kept = plain_step(0.5)(weights, delta, memory, 1.0)
    assert stepped["w"].tolist() == [1.25, 1.5]
    assert kept == memory
    assert weights["w"].tolist() == [1.0, 2.0]


def test_two_rounds_of_fedavg_on_the_known_clients() -> None:
    """x0 = [1, -2, .5]; FedAvg gives the weighted means of the clients' own models."""
    fedavg = method(FederationSection())
    weights = {"w": torch.tensor([1.0, -2.0, 0.5])}
    rounds = (
        (([1.1, -2.2, 0.5], 1), ([0.9, -1.8, 0.7], 3), [0.95, -1.9, 0.65]),
        (([1.2, -1.9, 0.6], 1), ([1.0, -2.1, 0.4], 3), [1.05, -2.05, 0.45]),
    )
    for *clients, expected in rounds:
        updates = [ClientUpdate("c", {"w": torch.tensor(own) - weights["w"]}, count) for own, count in clients]
        weights, _ = fedavg.step(weights, fedavg.aggregate(updates), {}, 1.0)
        torch.testing.assert_close(weights["w"], torch.tensor(expected))


def test_a_federation_of_one_has_no_method() -> None:
    """Baselines train plainly, whatever the federated mode does."""
    given = FederationSection(algorithm="feddyn", aggregation="krum", weighting="q-ffl")
    section = plain(given)
    assert section == FederationSection()
    assert method(section).correction is None


def test_weighing_by_a_loss_that_is_withheld_is_an_error() -> None:
    updates = [ClientUpdate("bank-1", {"w": torch.ones(2)}, 3, None)]
    assert method(FederationSection()).aggregate(iter(updates))["w"].tolist() == [1.0, 1.0]
    with pytest.raises(FederationError, match="'bank-1' withholds its loss, which federation.weighting = 'q-ffl'"):
        method(FederationSection(weighting="q-ffl")).aggregate(iter(updates))


def test_a_title_says_what_is_not_the_default() -> None:
    assert title_of(FederationSection(algorithm="fedadam")) == "fedadam"
    assert title_of(FederationSection(aggregation="median", weighting="uniform")) == "fedavg, median, uniform"
