"""One local round: received adapter tensors and a client's examples in, adapter delta out.

The only training loop of the project. What varies is given to it as a value: the objective (how a batch
becomes a loss), how a step's examples are drawn and their gradients become one (DP-SGD clips and noises them), and the
correction (a term added to the gradient). It reads and writes no file, keeps nothing between calls, and draws random
numbers from its own seed only; those of DP-SGD come from the operating system.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from silotune import tensors as arithmetic
from silotune.errors import DataError, TrainingError
from silotune.methods.corrections import Correction
from silotune.methods.optimizers import clip, kept_of, learning_rate, optimizer_of, restore
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.elsewhere import Elsewhere
from silotune.settings.sections import TrainingSection
from silotune.structs import SiteState, Tensors
from silotune.training.batches import shuffled
from silotune.training.encode import Encoded
from silotune.training.examplewise import losses_of
from silotune.training.objectives import Objective, adjusted, objective_of
from silotune.training.private import DpSgd, poisson_groups, private_gradient, sampling_rate


@dataclass(frozen=True)
class RoundPlace:
    """Where in a run a local round stands: its seed (already per client and round), round (from 1), rounds.

    ``private`` protects single examples from everyone who sees the round's result; None for plain training.
    """

    seed: int
    round_number: int = 1
    rounds: int = 1
    private: DpSgd | None = None


@dataclass(frozen=True)
class LocalResult:
    """What a local round gives.

    Attributes:
        delta: Final minus received adapter tensors.
        num_examples: Examples the client holds.
        loss: Mean training loss over the round's supervised terms; None of private training: it is not noised.
        steps: Optimiser steps done.
        tokens: Prompt and answer ids that went through the model.
        seconds: Wall time of the round.
        state: What the client keeps until its next round.
    """

    delta: Tensors
    num_examples: int
    loss: float | None
    steps: int
    tokens: int
    seconds: float
    state: SiteState = field(default_factory=SiteState)


def steps_in_round(num_examples: int, settings: TrainingSection) -> int:
    """Optimiser steps of one local round: ``max_steps``, or as many as ``epochs`` passes take."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(num_examples / settings.batch_size) / settings.gradient_accumulation
    return max(1, math.ceil(round(batches * settings.epochs, 9)))  # 100 * 0.07 is 7.000000000000001


def train_round(
    adapted: Adapted,
    received: Tensors,
    examples: Sequence[Encoded],
    *,
    settings: TrainingSection,
    place: RoundPlace,
    correction: Correction | None = None,
    state: SiteState | None = None,
) -> LocalResult:
    """Trains the adapter on one client's examples for one round.

    Args:
        adapted: The resident model; its adapter is overwritten with ``received`` first.
        received: Adapter tensors of the global model.
        examples: The client's encoded examples; never empty.
        settings: The ``[training]`` section.
        place: Seed and round.
        correction: A gradient term, such as FedProx's.
        state: What this client kept from its last round.

    Raises:
        DataError: There are no examples, or the objective cannot use them.
        TrainingError: The loss is not finite, no gradient reaches the adapter, or a GPU's memory is too small.
    """
    if not examples:
        raise DataError("a client has no examples to train on")
    objective = objective_of(settings)
    objective.check(examples)
    examples = adjusted(examples, settings.objective, classes=len(adapted.base.labels))
    began = time.perf_counter()
    adapters.write(adapted, received)
    steps = steps_in_round(len(examples), settings)
    with torch.random.fork_rng(devices=_devices(adapted)):
        torch.manual_seed(place.seed)
        adapted.model.train()
        try:
            rate = learning_rate(settings, place.round_number, place.rounds)
            optimizer = optimizer_of(settings, adapted.parameters, rate)
            if settings.optimizer_state == "keep" and state is not None:
                restore(optimizer, adapted.parameters, state.optimizer)
            gradient, groups = _sampling(adapted, objective, examples, settings, place)
            mean_loss, tokens = _Loop(adapted, gradient, optimizer, settings, received, correction).run(groups, steps)
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"the GPU's memory does not hold a step of {settings.batch_size} examples; set a smaller "
                "training.batch_size with more training.gradient_accumulation, or model.gradient_checkpointing = true"
            ) from None
        finally:
            adapted.model.eval()
            for parameter in adapted.parameters.values():
                parameter.grad = None
    final = adapters.read(adapted)
    delta = arithmetic.subtract(final, {name: received[name] for name in final})
    if not arithmetic.all_finite(delta):
        raise TrainingError("the adapter is no longer finite; lower training.learning_rate")
    kept = kept_of(optimizer, adapted.parameters) if settings.optimizer_state == "keep" else {}
    state = SiteState(optimizer=kept)
    return LocalResult(delta, len(examples), mean_loss, steps, tokens, time.perf_counter() - began, state=state)


Group: TypeAlias = Sequence[Sequence[Encoded]]
"""The examples of one step, in forward passes."""
Gradient: TypeAlias = Callable[[Group], tuple[float, int]]
"""Leaves a step's mean gradient in the parameters; gives the summed loss and its terms, both 0 if private."""


def _sampling(
    adapted: Adapted, objective: Objective, examples: Sequence[Encoded], settings: TrainingSection, place: RoundPlace
) -> tuple[Gradient, Iterator[Group]]:
    """How a step's gradient is made, and the endless steps' examples."""
    if place.private is None:
        batches = shuffled(examples, settings.batch_size, seed=place.seed)
        groups = iter(lambda: [next(batches) for _ in range(settings.gradient_accumulation)], None)
        return partial(_plain_gradient, adapted, objective, settings), groups
    dp, losses = place.private, losses_of(settings)
    rate = sampling_rate(len(examples), settings.batch_size, settings.gradient_accumulation)

    def gradient(group: Group) -> tuple[float, int]:
        made = private_gradient(adapted, group, losses, dp=dp, expected=rate * len(examples))
        for name, own in made.items():
            adapted.parameters[name].grad = own
        return 0.0, 0

    return gradient, poisson_groups(examples, rate, batch_size=settings.batch_size, entropy=dp.entropy)


def _plain_gradient(
    adapted: Adapted, objective: Objective, settings: TrainingSection, group: Group
) -> tuple[float, int]:
    """The summed loss's gradient over its terms, then clipped as a whole."""
    total, count = 0.0, 0
    for batch in group:
        loss = objective.loss(adapted, batch, settings.objective)
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + loss.count
    averaged(adapted, count)
    whole = None if adapted.elsewhere is None else _stepped_elsewhere(adapted, adapted.elsewhere, count)
    clip(adapted.parameters.values(), settings.clip_norm, whole)
    return total, count


def averaged(adapted: Adapted, count: int) -> None:
    """Divides the gradients of an adapter, or of one party's part of it, by the number of terms they are summed over.

    Raises:
        TrainingError: There is no gradient.
    """
    gradients = [parameter.grad for parameter in adapted.parameters.values() if parameter.grad is not None]
    if not gradients and adapted.parameters:
        raise TrainingError(
            "no gradient reaches a tensor of the adapter, so it can learn nothing: look at adapter.targets"
        )
    if gradients:
        torch._foreach_div_(gradients, float(count))


def norms_of(adapted: Adapted, names: Iterable[str]) -> torch.Tensor:
    """Norm of the gradient of each of these tensors that has one [tensors]."""
    gradients = [adapted.parameters[name].grad for name in names if name in adapted.parameters]
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(list(torch._foreach_norm(found))).float().cpu() if found else torch.zeros(0)


def _stepped_elsewhere(adapted: Adapted, there: Elsewhere, count: int) -> torch.Tensor | None:
    """Has the compute server take its step; the norm of the whole gradient, where it is bounded as one."""
    names = list(adapted.parameters)
    before = [name for name in names if name in there.before]
    behind = [name for name in names if name not in there.before]
    return there.link.step(there.turn, count, norms_of(adapted, before), norms_of(adapted, behind))


@dataclass(frozen=True)
class _Loop:
    """The steps of one round; ``received`` is what the correction pulls towards."""

    adapted: Adapted
    gradient: Gradient
    optimizer: torch.optim.Optimizer
    settings: TrainingSection
    received: Tensors
    correction: Correction | None

    def run(self, groups: Iterator[Group], steps: int) -> tuple[float | None, int]:
        """Mean loss over all supervised terms (None for private training), and number of ids processed."""
        total, count, tokens = 0.0, 0, 0
        for step in range(steps):
            group = next(groups)
            self.optimizer.zero_grad(set_to_none=True)
            step_total, step_count = self.gradient(group)
            if not math.isfinite(step_total):
                raise TrainingError(
                    f"the loss is not finite at local step {step + 1} of {steps}; "
                    f"lower training.learning_rate (now {self.settings.learning_rate:g}) or use float32"
                )
            self._correct()
            self.optimizer.step()
            total, count = total + step_total, count + step_count
            tokens += sum(example.length for batch in group for example in batch)
        return total / count if count else None, tokens

    def _correct(self) -> None:
        """Adds the correction: unclipped, and after any noise."""
        if self.correction is None:
            return
        moving = {name: parameter for name, parameter in self.adapted.parameters.items() if parameter.requires_grad}
        weights = {name: parameter.detach() for name, parameter in moving.items()}
        received = {name: self.received[name].to(tensor.device) for name, tensor in weights.items()}
        for name, term in self.correction(weights, received).items():
            parameter = self.adapted.parameters[name]
            parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)


def _devices(adapted: Adapted) -> list[torch.device]:
    return [adapted.base.device] if adapted.base.device.type == "cuda" else []


def mean_gradient(
    adapted: Adapted, weights: Tensors, examples: Sequence[Encoded], *, settings: TrainingSection
) -> Tensors:
    """Gradient of the objective's mean over all supervised terms of the examples, at ``weights``.

    Without dropout, clipping and weight decay. The model's adapter is left at ``weights``.

    Args:
        adapted: The resident model; its adapter is overwritten.
        weights: Adapter tensors.
        examples: The client's encoded examples.
        settings: The ``[training]`` section; its objective and batch size are used.
    """
    objective = objective_of(settings)
    adapters.write(adapted, weights)
    count = 0
    try:
        for start in range(0, len(examples), settings.batch_size):
            loss = objective.loss(adapted, examples[start : start + settings.batch_size], settings.objective)
            loss.total.backward()
            count += loss.count
        summed = arithmetic.zeros_like(weights)
        for name, parameter in adapted.parameters.items():
            if parameter.grad is not None:
                summed[name].copy_(parameter.grad)
    finally:
        for parameter in adapted.parameters.values():
            parameter.grad = None
    return arithmetic.scale(summed, 1 / count)
