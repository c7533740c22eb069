"""Where every algorithm ends on clients whose losses are quadratic, so that the weighted optimum is known exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from silotune.config import from_mapping
from silotune.errors import ConfigError
from silotune.federation.wire.links import lost_of_reply, pack_reply
from silotune.methods.algorithms import method
from silotune.methods.corrections import LocalWork
from silotune.settings.aggregation import AGGREGATIONS
from silotune.settings.algorithms import ALGORITHMS
from silotune.settings.links import CompressionSection
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import ClientUpdate, SiteState, Tensors
from silotune.tensors import subtract, taken_from

CURVATURES = torch.tensor([[0.6, 1.0], [1.2, 0.7], [0.9, 1.5], [1.4, 0.8]], dtype=torch.float64)
"""Client k's loss is a_k (x - b_k)^2 / 2, by value [clients, values]."""
TARGETS = torch.tensor([[2.0, -1.0], [-1.0, 0.5], [0.5, 3.0], [1.0, -2.0]], dtype=torch.float64)
EXACT = CompressionSection()
EXAMPLES = (1, 12, 3, 8)
COUNTS: dict[str, Sequence[float]] = {"examples": EXAMPLES, "uniform": (1, 1, 1, 1), "capped": (1, 5, 3, 5)}
WEIGHTINGS: dict[str, Any] = {"examples": "examples", "uniform": "uniform", "capped": {"type": "capped", "cap": 5}}
SETTINGS = {
    "feddyn": {"alpha": 0.5},
    "fedadagrad": {"server_learning_rate": 0.5, "server_tau": 0.1},
    "fedyogi": {"server_learning_rate": 0.5, "server_tau": 0.5},
    "fedadam": {"server_learning_rate": 0.1, "server_tau": 0.5},
    "fedprox": {"proximal_mu": 0.1},
}
SERVER = TrainingSection(optimizer="sgd", learning_rate=1.0, clip_norm=0.0)
CORRECTED = [name for name in ALGORITHMS if ALGORITHMS[name].keeps_control]


def optimum(counts: Sequence[float]) -> torch.Tensor:
    weighted = torch.tensor(counts, dtype=torch.float64).unsqueeze(1) * CURVATURES
    return (weighted * TARGETS).sum(0) / weighted.sum(0)


def gradient(client: int, weights: torch.Tensor) -> torch.Tensor:
    return CURVATURES[client] * (weights - TARGETS[client])


def ended(
    name: str,
    weighting: Any,
    *,
    sampled: int,
    steps: int,
    rounds: int = 300,
    summed: bool = False,
    aggregation: Any = "mean",
    start: float = 0.0,
    link: CompressionSection = EXACT,
) -> torch.Tensor:
    """The model after so many rounds; ``summed`` hands the round's weighted mean on as a protected sum does."""
    algorithm = {"type": name, **SETTINGS.get(name, {})}
    made = method(FederationSection(algorithm=algorithm, weighting=weighting, aggregation=aggregation), SERVER)
    zeros = {"w": torch.zeros(2, dtype=torch.float64)}
    weights, memory, own = {"w": torch.full_like(zeros["w"], start)}, dict[str, torch.Tensor](), [zeros] * 4
    draw = random.Random(1)
    for number in range(rounds):
        server = taken_from("control", made.sent(weights, memory))
        updates = []
        for client in sorted(draw.sample(range(4), sampled)):
            delta = trained(made.correction and made.correction.begin(own[client], server), client, weights, steps)
            sent = {"w": delta}
            if made.correction is not None and made.correction.end is not None:
                work = LocalWork(sent, steps, 0.2, dict)
                renewed = made.correction.end(own[client], server, work)
                if made.correction.sends_change:
                    sent = {"w": delta, "control/w": renewed["w"] - own[client]["w"]}
                own[client] = renewed
                packed, _ = pack_reply(sent, link, SiteState(), seed=4 * number + client)
                lost = lost_of_reply(sent, packed, link)
                if lost:
                    own[client], sent = made.correction.hears(renewed, lost), subtract(sent, lost)
            updates.append(ClientUpdate(str(client), sent, EXAMPLES[client], 1.0, steps))
        if summed:
            total = sum(update.num_examples for update in updates)
            mean = sum(update.delta["w"] * update.num_examples for update in updates) / total
            updates = [ClientUpdate("(sum)", {"w": mean}, total)]
        weights, memory = made.step(weights, made.aggregate(updates), memory, sampled / 4)
    return weights["w"]


def trained(correction: Any, client: int, received: Tensors, steps: int) -> torch.Tensor:
    weights = received
    for _ in range(steps):
        slope = gradient(client, weights["w"])
        if correction is not None:
            slope = slope + correction(weights, received)["w"]
        weights = {"w": weights["w"] - 0.2 * slope}
    return weights["w"] - received["w"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_local_step_of_all_clients_ends_at_the_weighted_optimum(name: str, weighting: str) -> None:
    """With one step no client drifts, so that every algorithm minimises the weighted mean of the losses."""
    made = ended(name, WEIGHTINGS[weighting], sampled=4, steps=1)
    torch.testing.assert_close(made, optimum(COUNTS[weighting]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampled", [4, 3, 1])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", CORRECTED)
def test_clients_that_keep_a_control_end_at_the_weighted_optimum_whoever_takes_part(
    name: str, weighting: str, sampled: int
) -> None:
    """The others do not: with several local steps and a part of the clients, FedAvg goes on moving."""
    made = ended(name, WEIGHTINGS[weighting], sampled=sampled, steps=4, rounds=150 * (5 - sampled))
    torch.testing.assert_close(made, optimum(COUNTS[weighting]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampled", [4, 2])
def test_feddyn_ends_at_the_weighted_optimum_where_only_sums_are_seen(sampled: int) -> None:
    made = ended("feddyn", "examples", sampled=sampled, steps=4, rounds=400, summed=True)
    torch.testing.assert_close(made, optimum(EXAMPLES), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CORRECTED)
def test_weights_that_change_with_the_loss_are_refused_where_clients_keep_a_control(name: str) -> None:
    with pytest.raises(ConfigError, match="by weights that stay, and federation.weighting = 'q-ffl' changes them"):
        from_mapping({"federation": {"algorithm": name, "weighting": "q-ffl"}, "training": {"optimizer": "sgd"}})


RULES: dict[str, Any] = {"median": "median", "norm-bound": {"type": "norm-bound", "bound": 0.3}}


@pytest.mark.parametrize("rule", RULES)
def test_feddyn_under_another_rule_than_the_mean_settles_where_its_start_leads_it(rule: str) -> None:
    """What the coordinator adds up is then not what the clients keep: updates are zero far from any optimum."""
    ends = [
        ended("feddyn", "examples", sampled=4, steps=4, aggregation=RULES[rule], start=start) for start in (0.0, 4.0)
    ]
    assert float((ends[0] - ends[1]).abs().max()) > 0.1
    plain = [
        ended("fedavg", "examples", sampled=4, steps=4, aggregation=RULES[rule], start=start) for start in (0.0, 4.0)
    ]
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [name for name in AGGREGATIONS if not AGGREGATIONS[name].is_mean])
def test_feddyn_is_refused_under_another_rule_than_the_mean(rule: str) -> None:
    with pytest.raises(ConfigError, match=f"'feddyn' sums whole updates, as its clients do, and .* = '{rule}'"):
        from_mapping({"federation": {"algorithm": "feddyn", "aggregation": rule}})


@pytest.mark.parametrize("values", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("name", CORRECTED)
def test_rounding_on_the_way_up_leaves_the_end_at_the_optimum(name: str, values: str) -> None:
    """A client keeps what has arrived, so that both sides add up the same."""
    made = ended(name, "examples", sampled=4, steps=4, link=CompressionSection(values=values))
    torch.testing.assert_close(made, optimum(EXAMPLES), rtol=0, atol=1e-5)
