"""Algorithms over real clients: with every objective, with controls that travel, and the same bits after a restart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from acting import ORDER, acting
from silotune import tensors as arithmetic
from silotune.errors import DataError
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import layout_of
from silotune.methods.algorithms import method
from silotune.models import adapters
from silotune.models.adapters import Adapted, attach
from silotune.models.head import Classes
from silotune.models.load import load_base
from silotune.record.runs import RunFolder
from silotune.settings.adapters import Lora
from silotune.settings.aggregation import AGGREGATIONS, WEIGHTINGS
from silotune.settings.algorithms import ALGORITHMS
from silotune.settings.objectives import OBJECTIVES, AdamW
from silotune.settings.sections import ModelSection, TrainingSection
from silotune.structs import ServerState
from silotune.training.encode import Encoded
from silotune.training.local import mean_gradient
from silotune.training.objectives import encoder_of
from silotune.transports.in_process import InProcess

SGD = tiny.training(optimizer="sgd", learning_rate=0.05, max_steps=1)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Adapted]:
    """Whether the objective has a head -> a model for it, with an adapter as it is before training."""
    folder = tiny.save_body(tmp_path_factory.mktemp("bodies") / "llama", "llama")
    base = load_base(ModelSection(name=str(folder), max_length=128), Classes(tiny.LABELS, 0))
    with_head = attach(base, Lora(rank=2, alpha=4), seed=0)
    return {True: with_head, False: tiny.adapted(stirred=False)}


@pytest.fixture(scope="module")
def first(models: Mapping[bool, Adapted]) -> Mapping[bool, dict[str, torch.Tensor]]:
    return {has_head: adapters.read(model) for has_head, model in models.items()}


def examples_for(objective: str, model: Adapted) -> Sequence[Encoded]:
    """Examples that an objective of the table takes, tried in turn: a new one joins by itself."""
    made = encoder_of(model.base, OBJECTIVES[objective](), max_length=128)
    for examples in (tiny.closed(9), tiny.opened(9), tiny.pairs(9)):
        encoded = made(examples)
        try:
            tiny.objective(objective).check(encoded)
        except DataError:
            continue
        return encoded
    raise AssertionError(f"no examples of tests/tiny.py suit the objective {objective!r}: add some here")


def plan(settings: TrainingSection = SGD, *, rounds: int = 1, **federation: Any) -> Plan:
    acts = acting(settings, **{"rounds": 4, **federation})
    return Plan(rounds=rounds, method=method(acts.federation, acts.training), body=ORDER, seed=3, settings=acts)


def transport(model: Adapted, examples: Sequence[Encoded], plan: Plan) -> InProcess:
    sites = {name: Site(name, examples[place::3], model, settings=plan.settings) for place, name in enumerate(NAMES)}
    return InProcess(sites, links=plan.settings.federation)


@pytest.fixture(scope="module")
def model(models: Mapping[bool, Adapted]) -> Adapted:
    return models[False]


@pytest.fixture(scope="module")
def start(first: Mapping[bool, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return first[False]


EXAMPLES = tiny.encoded(tiny.closed(9))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_every_objective(models, first, tmp_path: Path, algorithm: str, objective: str) -> None:
    has_head = OBJECTIVES[objective].has_head
    made, weights = models[has_head], first[has_head]
    settings = SGD.model_copy(update={"objective": OBJECTIVES[objective]()})
    asked = plan(settings, algorithm=algorithm)
    clients = transport(made, examples_for(objective, made), asked)
    state = run_rounds(asked, clients, ServerState(0, weights), RunFolder(tmp_path))
    (row,) = RunFolder(tmp_path).read_rows("metrics")
    assert row["failures"] == [] and row["train_loss"] > 0
    assert arithmetic.all_finite(state.weights)
    assert state.weights.keys() == weights.keys()
    assert any(not torch.equal(state.weights[name], tensor) for name, tensor in weights.items())


COMBINED = [*zip(AGGREGATIONS, itertools.cycle(WEIGHTINGS), strict=False)]


@pytest.mark.parametrize(("aggregation", "weighting"), COMBINED)
def test_every_rule_and_weighting_goes_with_a_run(
    model, start, tmp_path: Path, aggregation: str, weighting: str
) -> None:
    more = {"krum": {"malicious": 0}, "multi-krum": {"malicious": 0}, "capped": {"cap": 2}}
    options = {
        "aggregation": {"type": aggregation, **more.get(aggregation, {})},
        "weighting": {"type": weighting, **more.get(weighting, {})},
    }
    asked = plan(**options)
    state = run_rounds(asked, transport(model, EXAMPLES, asked), ServerState(0, start), RunFolder(tmp_path))
    assert arithmetic.all_finite(state.weights) and state.round_number == 1


# --- clients that stand still ----------------------------------------------------------------------------------------

STILL = SGD.model_copy(update={"learning_rate": 1e-60})


@pytest.mark.parametrize("algorithm", ["fedavg", "feddyn", "fedadam"])
def test_a_run_whose_clients_all_stand_still_ends_after_the_round(model, start, tmp_path, algorithm: str) -> None:
    asked = plan(STILL, rounds=3, algorithm=algorithm)
    state = run_rounds(asked, transport(model, EXAMPLES, asked), ServerState(0, start), RunFolder(tmp_path))
    assert state.round_number == 1 and state.stopped.startswith("no client's update moved the model")
    tiny.assert_same_bits(state.weights, start)


def test_one_client_that_stands_still_is_a_note_and_the_run_goes_on(model, start, tmp_path: Path) -> None:
    asked, told = plan(rounds=2), []
    settings = {name: acting(STILL if name == "b" else SGD, rounds=4) for name in NAMES}
    sites = {name: Site(name, EXAMPLES[n::3], model, settings=settings[name]) for n, name in enumerate(NAMES)}
    folder = RunFolder(tmp_path)
    state = run_rounds(asked, InProcess(sites), ServerState(0, start), folder, notify=lambda *event: told.append(event))
    assert state.round_number == 2 and not state.stopped
    notes = [fields["text"] for event, fields in told if event == "note"]
    assert len(notes) == 2 and notes[0].startswith("round 1: the update of 'b' holds zeros alone")


@pytest.mark.parametrize("federation", [{"lora": "alternate"}, {"personalization": "ditto"}])
def test_what_clients_move_elsewhere_or_later_is_no_end(model, start, tmp_path: Path, federation: dict) -> None:
    asked = plan(STILL, rounds=2, **federation)
    state = run_rounds(asked, transport(model, EXAMPLES, asked), ServerState(0, start), RunFolder(tmp_path))
    assert state.round_number == 2 and not state.stopped


def test_where_some_clients_rest_those_that_stand_still_end_nothing(model, start, tmp_path: Path) -> None:
    asked = replace(plan(STILL, rounds=2), clients_per_round=2)
    state = run_rounds(asked, transport(model, EXAMPLES, asked), ServerState(0, start), RunFolder(tmp_path))
    assert state.round_number == 2 and not state.stopped


# --- SCAFFOLD and FedDyn ---------------------------------------------------------------------------------------------


def test_scaffold_s_first_round_is_fedavg_s_and_its_second_is_not(model, start, tmp_path: Path) -> None:
    states = {}
    for name, rounds in itertools.product(("fedavg", "scaffold"), (1, 2)):
        asked, run = plan(rounds=rounds, algorithm=name), RunFolder(tmp_path / f"{name}{rounds}")
        states[name, rounds] = run_rounds(asked, transport(model, EXAMPLES, asked), ServerState(0, start), run)
    tiny.assert_same_bits(states["scaffold", 1].weights, states["fedavg", 1].weights)
    left, right = states["scaffold", 2].weights, states["fedavg", 2].weights
    assert any(not torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("option", ["I", "II"])
def test_the_server_s_control_is_the_mean_of_the_clients(model, start, tmp_path: Path, option: str) -> None:
    made = plan(rounds=2, algorithm={"type": "scaffold", "option": option})
    clients = transport(model, EXAMPLES, made)
    state = run_rounds(made, clients, ServerState(0, start), RunFolder(tmp_path))
    own = [kept.control for kept in clients.states().values()]
    mean = arithmetic.scale(arithmetic.add(arithmetic.add(own[0], own[1]), own[2]), 1 / 3)
    assert any(bool(tensor.any()) for tensor in mean.values())
    tiny.assert_close(arithmetic.taken_from("control", state.memory), mean, 1e-6)


def test_option_one_is_the_gradient_of_all_examples(model, start, tmp_path: Path) -> None:
    """One unclipped step over all of a client's examples: both options give its gradient at the received model."""
    whole = SGD.model_copy(update={"batch_size": 3, "clip_norm": 0.0})
    kept = {}
    for option in ("I", "II"):
        made = plan(whole, algorithm={"type": "scaffold", "option": option})
        clients = transport(model, EXAMPLES, made)
        run_rounds(made, clients, ServerState(0, start), RunFolder(tmp_path / option))
        kept[option] = clients.states()["b"].control
    tiny.assert_close(kept["I"], kept["II"], 1e-5)
    expected = mean_gradient(model, start, EXAMPLES[1::3], settings=whole)
    tiny.assert_close(kept["I"], expected, 1e-6)


def test_a_mean_gradient_does_not_depend_on_the_batches(model, start) -> None:
    small, large = (
        mean_gradient(model, start, EXAMPLES, settings=SGD.model_copy(update={"batch_size": size})) for size in (2, 9)
    )
    tiny.assert_close(small, large, 1e-5)
    assert all(parameter.grad is None for parameter in model.parameters.values())


def test_controls_travel_both_ways_in_one_layout(model, start, tmp_path: Path) -> None:
    made = plan(algorithm="scaffold")
    clients = transport(model, EXAMPLES, made)
    asked = {}
    exchange = clients.exchange

    def watched(requests, **options):
        asked.update(requests)
        for reply in exchange(requests, **options):
            assert layout_of(reply.tensors) == layout_of(requests[reply.client].tensors)
            yield reply

    clients.exchange = watched
    run_rounds(made, clients, ServerState(0, start), RunFolder(tmp_path))
    assert set(asked["a"].tensors) == {*start, *(f"control/{name}" for name in start)}


STATEFUL = {
    "scaffold": {},
    "feddyn": {"optimizer": AdamW(), "optimizer_state": "keep"},
    "fedyogi": {"optimizer": AdamW()},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_restarted_run_ends_with_the_same_bits(model, start, tmp_path: Path, name: str) -> None:
    settings = SGD.model_copy(update=STATEFUL[name])
    two, three = (plan(settings, rounds=rounds, algorithm=name) for rounds in (2, 3))
    first, cut = transport(model, EXAMPLES, three), RunFolder(tmp_path / "cut")
    state = run_rounds(two, first, ServerState(0, start), cut)
    whole = run_rounds(three, first, state, RunFolder(tmp_path / "whole"))
    checkpoint = cut.load_checkpoint()
    assert checkpoint is not None
    again = transport(model, EXAMPLES, three)
    again.restore(checkpoint[1])
    resumed = run_rounds(three, again, checkpoint[0], cut)
    tiny.assert_same_bits(resumed.weights, whole.weights)
    tiny.assert_same_bits(resumed.memory, whole.memory)
