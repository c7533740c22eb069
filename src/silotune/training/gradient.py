"""The gradient over all of a client's examples at given adapter tensors, which some methods keep."""

from __future__ import annotations

from collections.abc import Sequence

from silotune import tensors as arithmetic
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.settings.sections import TrainingSection
from silotune.structs import Tensors
from silotune.training.encode import Encoded
from silotune.training.objectives import objective_of


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
