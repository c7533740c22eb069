"""One local round: received adapter tensors and a client's examples in, adapter delta out.

The only training loop of the project. What varies is given to it as a value: the objective (how a batch
becomes a loss) and the correction (a term added to the gradient). It reads and writes no file, keeps nothing
between calls, and draws random numbers from its own seed only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from silotune import tensors as arithmetic
from silotune.errors import DataError, TrainingError
from silotune.methods.corrections import Correction
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.sections import TrainingSection
from silotune.structs import SiteState, Tensors
from silotune.training.batches import shuffled
from silotune.training.encode import Encoded
from silotune.training.objectives import OBJECTIVES, Objective


@dataclass(frozen=True)
class RoundPlace:
    """Where in a run a local round stands: its seed (already per client and round), round (from 1), rounds."""

    seed: int
    round_number: int = 1
    rounds: int = 1


@dataclass(frozen=True)
class LocalResult:
    """What a local round gives.

    Attributes:
        delta: Final minus received adapter tensors.
        num_examples: Examples the client holds.
        loss: Mean training loss over the round's supervised terms.
        steps: Optimiser steps done.
        tokens: Prompt and answer ids that went through the model.
        seconds: Wall time of the round.
        state: What the client keeps until its next round.
    """

    delta: Tensors
    num_examples: int
    loss: float
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


def learning_rate(settings: TrainingSection, place: RoundPlace) -> float:
    """The round's learning rate: constant, or half a cosine from full in round 1 towards 0 after the last."""
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (place.round_number - 1) / place.rounds
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


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
        TrainingError: The loss is not finite, or no adapter tensor moved.
    """
    if not examples:
        raise DataError("a client has no examples to train on")
    objective = OBJECTIVES[settings.objective]
    objective.check(examples)
    began = time.perf_counter()
    adapters.write(adapted, received)
    steps = steps_in_round(len(examples), settings)
    with torch.random.fork_rng(devices=_devices(adapted)):
        torch.manual_seed(place.seed)
        adapted.model.train()
        try:
            optimizer = _optimizer(adapted, settings, learning_rate(settings, place))
            if settings.optimizer_state == "keep":
                _restore(optimizer, adapted, state)
            batches = shuffled(examples, settings.batch_size, seed=place.seed)
            loop = _Loop(adapted, objective, optimizer, settings, received, correction)
            mean_loss, tokens = loop.run(batches, steps)
        finally:
            adapted.model.eval()
            for parameter in adapted.parameters.values():
                parameter.grad = None
    final = adapters.read(adapted)
    delta = arithmetic.subtract(final, {name: received[name] for name in final})
    if not arithmetic.all_finite(delta):
        raise TrainingError("the adapter is no longer finite; lower training.learning_rate")
    if not any(bool(tensor.any()) for tensor in delta.values()):
        raise TrainingError("no adapter tensor moved: nothing was learnt, so the update is not sent")
    kept = _kept_state(optimizer, adapted) if settings.optimizer_state == "keep" else SiteState()
    return LocalResult(delta, len(examples), mean_loss, steps, tokens, time.perf_counter() - began, state=kept)


@dataclass(frozen=True)
class _Loop:
    """The steps of one round; ``received`` is what the correction pulls towards."""

    adapted: Adapted
    objective: Objective
    optimizer: torch.optim.Optimizer
    settings: TrainingSection
    received: Tensors
    correction: Correction | None

    def run(self, batches: Iterator[list[Encoded]], steps: int) -> tuple[float, int]:
        """Mean loss over all supervised terms, and ids processed."""
        total, count, tokens = 0.0, 0, 0
        for step in range(steps):
            group = [next(batches) for _ in range(self.settings.gradient_accumulation)]
            step_total, step_count = self._step(group)
            if not math.isfinite(step_total):
                raise TrainingError(
                    f"the loss is not finite at local step {step + 1} of {steps}; "
                    f"lower training.learning_rate (now {self.settings.learning_rate:g}) or use float32"
                )
            total, count = total + step_total, count + step_count
            tokens += sum(example.length for batch in group for example in batch)
        return total / count, tokens

    def _step(self, group: Sequence[Sequence[Encoded]]) -> tuple[float, int]:
        self.optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, 0
        for batch in group:
            loss = self.objective.loss(self.adapted, batch, self.settings)
            loss.total.backward()
            total, count = total + float(loss.total.detach()), count + loss.count
        self._finish_gradient(count)
        self.optimizer.step()
        return total, count

    def _finish_gradient(self, count: int) -> None:
        """Sum to mean over the step's supervised terms, then clip, then add the correction (unclipped)."""
        gradients = [parameter.grad for parameter in self.adapted.parameters.values() if parameter.grad is not None]
        torch._foreach_div_(gradients, float(count))
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.adapted.parameters.values(), self.settings.clip_norm)
        if self.correction is None:
            return
        moving = {name: parameter for name, parameter in self.adapted.parameters.items() if parameter.requires_grad}
        weights = {name: parameter.detach() for name, parameter in moving.items()}
        received = {name: self.received[name].to(tensor.device) for name, tensor in weights.items()}
        for name, term in self.correction(weights, received).items():
            parameter = self.adapted.parameters[name]
            parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)


def _optimizer(adapted: Adapted, settings: TrainingSection, rate: float) -> torch.optim.Optimizer:
    parameters = list(adapted.parameters.values())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
    fused = adapted.base.device.type in ("cpu", "cuda") and all(item.is_floating_point() for item in parameters)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay, fused=fused)


def _restore(optimizer: torch.optim.Optimizer, adapted: Adapted, state: SiteState | None) -> None:
    """Puts kept optimiser tensors (named ``moment/parameter``) back to their parameters."""
    if state is None:
        return
    for key, tensor in state.tensors.items():
        moment, _, name = key.partition("/")
        parameter = adapted.parameters[name]
        on_cpu = moment == "step" and not optimizer.defaults.get("fused")  # as torch's own load_state_dict
        device = torch.device("cpu") if on_cpu else parameter.device
        optimizer.state[parameter][moment] = tensor.clone().to(device)


def _kept_state(optimizer: torch.optim.Optimizer, adapted: Adapted) -> SiteState:
    kept: Tensors = {}
    for name, parameter in adapted.parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                kept[f"{moment}/{name}"] = value.detach().to("cpu", copy=True)
    return SiteState(tensors=kept)


def _devices(adapted: Adapted) -> list[torch.device]:
    return [adapted.base.device] if adapted.base.device.type == "cuda" else []
