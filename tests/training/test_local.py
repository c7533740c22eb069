"""The local round: a function of its inputs, and arithmetic that a page of paper can check."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

import tiny
from silotune import tensors as arithmetic
from silotune.errors import DataError, MessageError, TrainingError
from silotune.methods.corrections import proximal
from silotune.methods.optimizers import learning_rate
from silotune.models import adapters
from silotune.settings.objectives import Sft
from silotune.structs import SiteState
from silotune.training.batches import shuffled
from silotune.training.local import RoundPlace, steps_in_round, train_round
from silotune.training.losses import Loss
from silotune.training.objectives import OBJECTIVES

EXAMPLES = tiny.encoded(tiny.closed())
ALIKE = [example for example in tiny.encoded(tiny.closed(24)) if len(example.answer) == len(EXAMPLES[0].answer)]
SGD = tiny.training(optimizer="sgd", learning_rate=0.1, objective="choice")


def go(model, start, examples=EXAMPLES, *, seed: int = 5, number: int = 1, rounds: int = 1, settings=SGD, **more):
    place = RoundPlace(seed, number, rounds)
    return train_round(model, start, examples, settings=settings, place=place, **more)


def batch_gradient(model, weights, batch, objective: str = "choice"):
    adapters.write(model, weights)
    loss = tiny.loss(objective, model, batch)
    return tiny.gradients(model, loss.total / loss.count)


@pytest.mark.parametrize("objective", ["sft", "choice"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_inputs_same_bits(model, start, objective: str, optimizer: str) -> None:
    settings = tiny.training(objective=objective, optimizer=optimizer, learning_rate=0.01)
    first = go(model, start, settings=settings)
    torch.manual_seed(99)  # what happens outside must not matter
    again = go(model, start, settings=settings)
    tiny.assert_same_bits(first.delta, again.delta)
    assert (first.loss, first.steps, first.tokens, first.num_examples) == (again.loss, 2, again.tokens, 8)
    other = go(model, start, settings=settings, seed=6)
    assert arithmetic.digest(other.delta) != arithmetic.digest(first.delta)


def test_the_global_generator_is_left_alone(model, start) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    go(model, start)
    assert torch.equal(torch.rand(3), expected)


def test_one_step_of_sgd_is_minus_rate_times_gradient(model, start) -> None:
    settings = SGD.model_copy(update={"max_steps": 1})
    (batch,) = islice(shuffled(EXAMPLES, 4, seed=5), 1)
    expected = arithmetic.scale(batch_gradient(model, start, batch), -0.1)
    result = go(model, start, settings=settings)
    tiny.assert_close(result.delta, expected, 1e-6)
    assert result.steps == 1
    assert result.tokens == sum(example.length for example in batch)


def test_loss_is_the_mean_over_supervised_terms(model, start) -> None:
    settings = tiny.training(optimizer="sgd", learning_rate=1e-12, max_steps=2)
    result = go(model, start, settings=settings.model_copy(update={"learning_rate": 1e-6}))
    adapters.write(model, start)
    with torch.no_grad():
        slow = torch.cat([-tiny.log_probabilities(model, item.prompt, item.answer) for item in EXAMPLES])
    assert result.loss == pytest.approx(float(slow.mean()), rel=1e-4)


@pytest.mark.parametrize("objective", ["sft", "choice"])
def test_accumulated_small_batches_equal_a_large_one(model, start, objective: str) -> None:
    large = tiny.training(optimizer="sgd", learning_rate=0.1, objective=objective, batch_size=8, max_steps=1)
    small = large.model_copy(update={"batch_size": 2, "gradient_accumulation": 4})
    tiny.assert_close(go(model, start, settings=small).delta, go(model, start, settings=large).delta, 1e-6)


def test_clipping_bounds_the_gradient_and_spares_small_ones(model, start) -> None:
    one = SGD.model_copy(update={"max_steps": 1})
    free = go(model, start, settings=one).delta
    size = arithmetic.norm(free)
    half = go(model, start, settings=one.model_copy(update={"clip_norm": size / 0.1 / 2})).delta
    tiny.assert_close(half, arithmetic.scale(free, 0.5), 1e-5)
    wide = go(model, start, settings=one.model_copy(update={"clip_norm": 1e6})).delta
    tiny.assert_same_bits(wide, free)


def test_schedule_by_hand() -> None:
    cosine = tiny.training(schedule="cosine", learning_rate=2.0)
    rates = [learning_rate(cosine, number, 4) for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert learning_rate(tiny.training(learning_rate=2.0), 3, 4) == 2.0


def test_the_schedule_reaches_the_optimiser(model, start) -> None:
    one = SGD.model_copy(update={"max_steps": 1, "schedule": "cosine"})
    first, third = (go(model, start, settings=one, number=number, rounds=4).delta for number in (1, 3))
    tiny.assert_close(third, arithmetic.scale(first, 0.5), 1e-6)


@pytest.mark.parametrize(
    ("examples", "changes", "steps"),
    [
        (16, {}, 4),
        (17, {}, 5),
        (16, {"epochs": 2.5}, 10),
        (16, {"epochs": 0.1}, 1),
        (400, {"epochs": 0.07}, 7),
        (12, {"gradient_accumulation": 2}, 2),
        (12, {"max_steps": 7}, 7),
    ],
)
def test_steps_in_a_round(examples: int, changes: dict, steps: int) -> None:
    assert steps_in_round(examples, tiny.training(**{"max_steps": None, **changes})) == steps


def test_kept_state_makes_two_rounds_one_long_round(model, start) -> None:
    """With one batch that holds all examples the order of batches cannot matter."""
    for optimizer in ({"optimizer": "adamw"}, {"optimizer": {"type": "sgd", "momentum": 0.9}}):
        settings = tiny.training(batch_size=8, max_steps=2, learning_rate=0.01, optimizer_state="keep", **optimizer)
        long = go(model, start, settings=settings.model_copy(update={"max_steps": 4}))
        first = go(model, start, settings=settings)
        middle = arithmetic.add(start, first.delta)
        second = go(model, middle, settings=settings, state=first.state)
        tiny.assert_close(arithmetic.add(first.delta, second.delta), long.delta, 2e-6)
        afresh = go(model, middle, settings=settings)
        assert arithmetic.norm(arithmetic.subtract(afresh.delta, second.delta)) > 1e-4
        assert second.state.optimizer.keys() == long.state.optimizer.keys()
        tiny.assert_close(second.state.optimizer, long.state.optimizer, 1e-4)


def test_kept_state_names_every_moment_and_is_a_copy(model, start) -> None:
    settings = tiny.training(optimizer_state="keep")
    state = go(model, start, settings=settings).state
    assert {key.partition("/")[0] for key in state.optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    assert {key.partition("/")[2] for key in state.optimizer} == set(start)
    before = arithmetic.digest(state.optimizer)
    go(model, start, settings=settings, state=state)
    assert arithmetic.digest(state.optimizer) == before


def test_reset_keeps_nothing_and_uses_nothing(model, start) -> None:
    kept = go(model, start, settings=tiny.training(optimizer_state="keep")).state
    plain = go(model, start, settings=tiny.training())
    assert plain.state == SiteState()
    tiny.assert_same_bits(go(model, start, settings=tiny.training(), state=kept).delta, plain.delta)


def test_dropout_comes_from_the_seed() -> None:
    model = tiny.adapted(dropout=0.5)
    start = adapters.read(model)
    one = tiny.training(batch_size=8, max_steps=1, optimizer="sgd", learning_rate=0.1)
    first, again, other = (go(model, start, settings=one, seed=seed).delta for seed in (1, 1, 2))
    tiny.assert_same_bits(first, again)
    assert arithmetic.norm(arithmetic.subtract(first, other)) > 1e-5
    assert not model.model.training


def test_training_learns(model, start) -> None:
    settings = tiny.training(batch_size=8, max_steps=15, learning_rate=0.03, objective="choice")
    result = go(model, start, settings=settings)
    again = go(model, arithmetic.add(start, result.delta), settings=settings.model_copy(update={"max_steps": 1}))
    assert again.loss < 0.5 * go(model, start, settings=settings.model_copy(update={"max_steps": 1})).loss


def test_base_weights_are_neither_changed_nor_copied(model, start) -> None:
    trained = {id(parameter) for parameter in model.parameters.values()}
    frozen = {name: item for name, item in model.model.named_parameters() if id(item) not in trained}
    before = arithmetic.digest(frozen)
    memory = {name: item.data_ptr() for name, item in frozen.items()}
    go(model, start)
    assert arithmetic.digest(frozen) == before
    assert {name: item.data_ptr() for name, item in model.model.named_parameters() if name in frozen} == memory
    assert not any(item.requires_grad for item in frozen.values())
    assert all(item.grad is None for item in model.model.parameters())


def test_received_tensors_are_not_changed(model, start) -> None:
    before = arithmetic.digest(start)
    go(model, start, settings=SGD, correction=proximal(0.1))
    assert arithmetic.digest(start) == before


def test_a_loss_that_is_not_finite_stops_the_round(model, start, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.training(optimizer="sgd", learning_rate=1e30, max_steps=5)
    with pytest.raises(TrainingError, match="not finite.*learning_rate"):
        go(model, start, settings=settings)
    go(model, start)  # the model is as good as before

    def steep(adapted, batch, settings) -> Loss:
        loss = tiny.loss("choice", adapted, batch)
        return Loss(loss.total * 1e30, loss.count)

    monkeypatch.setitem(OBJECTIVES, Sft, replace(OBJECTIVES[Sft], loss=steep))
    with pytest.raises(TrainingError, match="no longer finite"):  # it broke in the very last step
        go(model, start, settings=settings.model_copy(update={"max_steps": 1}))


def test_a_gpu_that_is_too_small_is_told_in_one_line(model, start, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> Loss:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")

    chosen = type(SGD.objective)
    monkeypatch.setitem(OBJECTIVES, chosen, replace(OBJECTIVES[chosen], loss=full))
    with pytest.raises(TrainingError, match="memory does not hold a step of .* training.batch_size") as caught:
        go(model, start, settings=SGD)
    assert "\n" not in str(caught.value) and not model.model.training


def test_an_update_that_moves_nothing_is_an_update(model, start) -> None:
    result = go(model, start, settings=SGD.model_copy(update={"learning_rate": 1e-30}))
    assert result.loss > 0 and not any(bool(tensor.any()) for tensor in result.delta.values())


def test_an_adapter_that_no_gradient_reaches_is_an_error(model, start, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(adapted, batch, settings) -> Loss:
        return Loss(torch.ones(1, requires_grad=True).sum(), 1)

    chosen = type(SGD.objective)
    monkeypatch.setitem(OBJECTIVES, chosen, replace(OBJECTIVES[chosen], loss=apart))
    with pytest.raises(TrainingError, match="no gradient reaches a tensor of the adapter"):
        go(model, start, settings=SGD)


def test_unusable_inputs(model, start) -> None:
    with pytest.raises(DataError, match="no examples"):
        go(model, start, [])
    with pytest.raises(DataError, match="number"):
        go(model, start, tiny.encoded(tiny.opened()))
    with pytest.raises(MessageError):
        go(model, {**start, "more": torch.zeros(1)})


# --- corrections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedprox_of_zero_is_fedavg_bit_for_bit(model, start, optimizer: str) -> None:
    settings = tiny.training(optimizer=optimizer, learning_rate=0.01, max_steps=4, clip_norm=1.0)
    plain = go(model, start, settings=settings)
    tiny.assert_same_bits(go(model, start, settings=settings, correction=proximal(0.0)).delta, plain.delta)


def test_fedprox_by_hand(model, start) -> None:
    """w1 = w0 - r g(w0); w2 = w1 - r (g(w1) + mu (w1 - w0))."""
    rate, mu = 0.1, 2.0
    first, second = islice(shuffled(EXAMPLES, 4, seed=5), 2)
    one = arithmetic.add_scaled(start, batch_gradient(model, start, first), -rate)
    pulled = arithmetic.add_scaled(batch_gradient(model, one, second), arithmetic.subtract(one, start), mu)
    expected = arithmetic.subtract(arithmetic.add_scaled(one, pulled, -rate), start)
    tiny.assert_close(go(model, start, settings=SGD, correction=proximal(mu)).delta, expected, 2e-6)


def test_one_step_on_equal_silos_is_one_step_on_their_union(model, start) -> None:
    from silotune.methods.aggregate import weighted_mean
    from silotune.structs import ClientUpdate

    for objective, examples in (("choice", EXAMPLES), ("sft", ALIKE[:6])):
        silos = [examples[0::2], examples[1::2]]
        step = tiny.training(
            optimizer="sgd", learning_rate=0.1, objective=objective, batch_size=len(examples), max_steps=1
        )
        updates = [
            ClientUpdate(str(number), go(model, start, silo, settings=step, seed=number).delta, len(silo))
            for number, silo in enumerate(silos)
        ]
        union = go(model, start, examples, settings=step)
        tiny.assert_close(weighted_mean(updates), union.delta, 1e-6)
