"""The optimisers of ``[training]``: those of a client's local steps, and of the server's where it takes the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch

from silotune.settings.objectives import AdamW, OptimizerSettings, Sgd
from silotune.settings.sections import TrainingSection
from silotune.structs import Tensors

Parameters: TypeAlias = Mapping[str, torch.nn.Parameter]


def learning_rate(settings: TrainingSection, round_number: int, rounds: int) -> float:
    """The round's learning rate: constant, or half a cosine from full in round 1 towards 0 after the last."""
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (round_number - 1) / rounds
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(settings: TrainingSection, parameters: Parameters, rate: float) -> torch.optim.Optimizer:
    """The optimiser that ``training.optimizer`` names, at this learning rate; without tensors it has nothing to do."""
    build = OPTIMIZERS[type(settings.optimizer)]
    moving = list(parameters.values()) or [torch.nn.Parameter(torch.zeros(0))]
    return build(settings.optimizer, moving, rate, settings.weight_decay)


def _adamw(
    settings: AdamW, parameters: list[torch.nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    device = parameters[0].device.type
    fused = device in ("cpu", "cuda") and all(item.is_floating_point() for item in parameters)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=fused)


def _sgd(
    settings: Sgd, parameters: list[torch.nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=weight_decay)


OPTIMIZERS: Mapping[
    type[OptimizerSettings], Callable[[Any, list[torch.nn.Parameter], float, float], torch.optim.Optimizer]
] = {
    AdamW: _adamw,
    Sgd: _sgd,
}
"""Settings -> builder of the optimiser that they are of, from parameters, learning rate and weight decay."""


def clip(parameters: Iterable[torch.nn.Parameter], most: float, norm: torch.Tensor | None = None) -> None:
    """Scales gradients down by how far a norm exceeds the most that it may be; 0 for no bound.

    Args:
        parameters: Whose gradients.
        most: ``training.clip_norm``.
        norm: Of the gradient that they are a part of; None where they are all of it.
    """
    moving = [parameter for parameter in parameters if parameter.grad is not None]
    if not most or not moving:
        return
    if norm is None:
        torch.nn.utils.clip_grad_norm_(moving, most)
    else:
        torch.nn.utils.clip_grads_with_norm_(moving, most, norm.to(moving[0].device))


def restore(optimizer: torch.optim.Optimizer, parameters: Parameters, kept: Tensors) -> None:
    """Puts kept optimiser tensors (named ``moment/parameter``) back to their parameters."""
    for key, tensor in kept.items():
        moment, _, name = key.partition("/")
        parameter = parameters[name]
        on_cpu = moment == "step" and not optimizer.defaults.get("fused")  # as torch's own load_state_dict
        device = torch.device("cpu") if on_cpu else parameter.device
        optimizer.state[parameter][moment] = tensor.clone().to(device)


def kept_of(optimizer: torch.optim.Optimizer, parameters: Parameters) -> Tensors:
    """Copies of the optimiser's tensors, named ``moment/parameter``."""
    kept: Tensors = {}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                kept[f"{moment}/{name}"] = value.detach().to("cpu", copy=True)
    return kept
