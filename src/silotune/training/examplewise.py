"""Gradients of the adapter by example: from one backward pass where the adapter is made of linear layers.

Hooks on the trained linear layers alone keep each example's inputs and output gradients; nothing of the base is
materialised by example. Of a LoRA factor an example's gradient has rank x width values, fewer than the activations
that autograd keeps of it anyway, so it is made in full and clipping needs no second backward pass (ghost clipping, Li
et al. 2022, makes only its norm; it pays off where layers are wide on both sides, which an adapter's are not). An
adapter with other trained parts (IA3, DoRA, all weights) goes through the model one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from silotune.errors import PrivacyError
from silotune.models.adapters import Adapted
from silotune.settings.objectives import Classify, Dpo, ObjectiveSettings, Sft, SoftmaxOverOptions
from silotune.settings.sections import TrainingSection
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.preference import pair_losses
from silotune.training.scores import answer_losses, class_logits, option_scores

Losses: TypeAlias = Callable[[Adapted, Sequence[Encoded]], torch.Tensor]
"""``losses(adapted, examples)`` [examples]: each a function of its example alone."""
SettledLosses: TypeAlias = Callable[[Adapted, Sequence[Encoded], Any], torch.Tensor]
"""``losses(adapted, examples, settings)``: the same, given the objective's settings."""


def _answer(adapted: Adapted, examples: Sequence[Encoded], settings: ObjectiveSettings) -> torch.Tensor:
    """Mean over the example's own answer ids: a mean over the batch's would depend on the other examples."""
    losses, owner = answer_losses(adapted, examples)
    totals = torch.zeros(2, len(examples), device=losses.device)
    summed, counts = totals.index_add(1, owner, torch.stack([losses, torch.ones_like(losses)]))
    return summed / counts


def _choice(adapted: Adapted, examples: Sequence[Encoded], settings: ObjectiveSettings) -> torch.Tensor:
    labels = torch.tensor([example.label for example in examples], device=adapted.base.device)
    return torch.nn.functional.cross_entropy(option_scores(adapted, examples), labels, reduction="none")


def _class(adapted: Adapted, examples: Sequence[Encoded], settings: ObjectiveSettings) -> torch.Tensor:
    labels = torch.tensor([example.label for example in examples], device=adapted.base.device)
    return torch.nn.functional.cross_entropy(class_logits(adapted, examples), labels, reduction="none")


LOSSES: Mapping[type[ObjectiveSettings], SettledLosses] = {
    Sft: _answer,
    SoftmaxOverOptions: _choice,
    Classify: _class,
    Dpo: pair_losses,
}
"""Settings of an objective that ``is_by_example`` -> its losses by example (a test compares them)."""


def losses_of(settings: TrainingSection) -> Losses:
    """Losses by example of the objective that a ``[training]`` section names, which must be one of `LOSSES`."""
    chosen = LOSSES[type(settings.objective)]
    return lambda adapted, examples: chosen(adapted, examples, settings.objective)


def gradients(adapted: Adapted, examples: Sequence[Encoded], losses: Losses) -> tuple[Tensors, torch.Tensor]:
    """Each example's own gradient, and its loss.

    Args:
        adapted: The resident model; the parameters' ``grad`` is left as it was.
        examples: One forward pass; not empty.
        losses: Of each example.

    Returns:
        Parameter name -> float32 [examples, *shape], and the losses [examples], detached.
    """
    alone = replace(adapted, keeps_rows_apart=True)
    places = linear_places(adapted)
    return _one_by_one(alone, examples, losses) if places is None else _hooked(alone, examples, losses, places)


def moving(adapted: Adapted) -> dict[str, torch.nn.Parameter]:
    """The parameters that train now: some of an adapter may rest for a round, or for good (one-sided LoRA)."""
    return {name: parameter for name, parameter in adapted.parameters.items() if parameter.requires_grad}


@dataclass(frozen=True)
class Place:
    """A trained linear layer and the names of its trained tensors."""

    weight: str | None = None
    bias: str | None = None


def linear_places(adapted: Adapted) -> Mapping[torch.nn.Linear, Place] | None:
    """The linear layers that hold all trained parameters, each in one place; None where others hold some.

    DoRA also reads its factors beside the examples' rows, and fused experts nowhere else, so theirs are not told apart
    by rows.
    """
    if adapted.config.get("use_dora") or adapted.config.get("target_parameters"):
        return None
    names = {id(parameter): name for name, parameter in moving(adapted).items()}
    found: dict[torch.nn.Linear, Place] = {}
    seen: list[str] = []
    for module in adapted.model.modules():
        own = {key: names[id(item)] for key, item in module.named_parameters(recurse=False) if id(item) in names}
        if not own:
            continue
        if type(module) is not torch.nn.Linear:
            return None
        found[module] = Place(own.get("weight"), own.get("bias"))
        seen += own.values()
    is_whole = len(seen) == len(set(seen)) == len(names)
    return found if is_whole else None


@dataclass
class _Rows:
    """Gradients by row of the model's input, as backward meets them."""

    num_examples: int
    in_model: int = 0
    made: Tensors = field(default_factory=dict)

    def check(self, found: int, place: Place) -> None:
        """Refuses a layer whose first dimension is not that of the model's input.

        Raises:
            PrivacyError: The layer sees gathered positions, as an output head or an expert does: which example a row
                belongs to cannot be told.
        """
        if found != self.in_model or found % self.num_examples:
            raise PrivacyError(
                f"{place.weight or place.bias!r} works on rows that are not the examples': their gradients are "
                "not known; leave its layer out of adapter.targets, or train without privacy.dp = 'example'"
            )

    def add(self, name: str, by_row: torch.Tensor) -> None:
        """``by_row`` is [rows, *shape]; an example has as many rows as any other, side by side."""
        own = by_row.view(self.num_examples, -1, *by_row.shape[1:]).sum(1)
        self.made[name] = self.made[name] + own if name in self.made else own


def _hooked(
    adapted: Adapted, examples: Sequence[Encoded], losses: Losses, places: Mapping[torch.nn.Linear, Place]
) -> tuple[Tensors, torch.Tensor]:
    rows = _Rows(len(examples))
    parameters = moving(adapted)
    before = {name: parameter.grad for name, parameter in parameters.items()}
    with _watched(adapted.model, places, rows):
        each = losses(adapted, examples)
        each.sum().backward()
    for name, parameter in parameters.items():
        parameter.grad = before[name]
        if name not in rows.made:  # no example reached it
            rows.made[name] = torch.zeros(len(examples), *parameter.shape, device=parameter.device)
    return {name: rows.made[name] for name in parameters}, each.detach()


@contextmanager
def _watched(model: torch.nn.Module, places: Mapping[torch.nn.Linear, Place], rows: _Rows) -> Iterator[None]:
    def entered(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows.in_model = len(named["input_ids"] if "input_ids" in named else given[0])

    handles = [module.register_forward_hook(_watcher(place, rows)) for module, place in places.items()]
    handles.append(model.register_forward_pre_hook(entered, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(place: Place, rows: _Rows) -> Callable[..., None]:
    def forward(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not output.requires_grad:  # scoring, or a pass that checkpointing will repeat
            return
        rows.check(len(output), place)
        inputs = given[0].detach()

        def backward(gradient: torch.Tensor) -> None:
            # [rows, ..., width] to [rows, places, width]: a pooled head has no places
            g = gradient.detach().float().reshape(len(gradient), -1, gradient.shape[-1])
            if place.weight is not None:
                x = inputs.float().reshape(len(inputs), -1, inputs.shape[-1])
                rows.add(place.weight, torch.bmm(g.transpose(1, 2), x))
            if place.bias is not None:
                rows.add(place.bias, g.sum(1))

        output.register_hook(backward)

    return forward


def _one_by_one(adapted: Adapted, examples: Sequence[Encoded], losses: Losses) -> tuple[Tensors, torch.Tensor]:
    """The slow obvious way: one backward pass for each example."""
    names, parameters = list(moving(adapted)), list(moving(adapted).values())
    found: list[tuple[torch.Tensor, ...]] = []
    each = []
    for example in examples:
        loss = losses(adapted, [example]).sum()
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        each.append(loss.detach())
    stacked = {
        name: torch.stack([_filled(own[place], parameters[place]) for own in found]) for place, name in enumerate(names)
    }
    return stacked, torch.stack(each)


def _filled(gradient: torch.Tensor | None, parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()


def norms(by_example: Tensors) -> torch.Tensor:
    """Euclidean norm of each example's whole gradient, float64 [examples]."""
    squares = [tensor.flatten(1).double().square().sum(1) for tensor in by_example.values()]
    return torch.stack(squares).sum(0).sqrt()


def clipped_sum(by_example: Tensors, clip_norm: float) -> Tensors:
    """Sum of the gradients, each scaled down to norm ``clip_norm`` at most (Abadi et al. 2016, algorithm 1).

    A gradient that is not finite counts as zero: an error would tell of its example.
    """
    size = norms(by_example)
    is_finite = torch.isfinite(size)
    factor = torch.where(is_finite, 1 / (size / clip_norm).clamp(min=1), 0.0).float()  # [examples]
    made: Tensors = {}
    for name, tensor in by_example.items():
        flat = torch.where(is_finite[:, None], tensor.flatten(1), 0.0)
        made[name] = (factor @ flat).view(tensor.shape[1:])
    return made
