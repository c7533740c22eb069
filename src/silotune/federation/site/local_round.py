"""A local round under a method's correction: what the client keeps for it, receives for it and sends back.

With a method that uses controls, a request carries the coordinator's controls beside the adapter's tensors, as
``control/<name>``. The reply carries the change of the client's own controls under the same names, so both messages
have the same layout.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from silotune.errors import TrainingError
from silotune.methods.aggregate import CONTROL
from silotune.methods.corrections import Corrector, LocalWork
from silotune.methods.optimizers import learning_rate
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.settings.sections import TrainingSection
from silotune.structs import SiteState, Tensors
from silotune.tensors import all_finite, put_under, subtract, taken_from, without, zeros_like
from silotune.training.encode import Encoded
from silotune.training.local import LocalResult, RoundPlace, mean_gradient, train_round


@dataclass(frozen=True)
class Work:
    """One local round that an engine is to train.

    Attributes:
        received: Tensors that it begins with.
        examples: The client's, encoded.
        settings: The ``[training]`` section.
        place: Seed and round.
        correction: The client's side of the method; None for none.
        state: What this client kept from its last round.
        resting: Names of the adapter's tensors that do not train.
    """

    received: Tensors
    examples: Sequence[Encoded]
    settings: TrainingSection
    place: RoundPlace
    correction: Corrector | None = None
    state: SiteState = field(default_factory=SiteState)
    resting: tuple[str, ...] = ()


def one_by_one(adapted: Adapted, works: Iterable[Work]) -> list[LocalResult]:
    """The plain engine: trains one work after the other on the resident model.

    Raises:
        SilotuneError: What a local round raises.
    """
    results = []
    for work in works:
        with adapters.frozen(adapted, list(work.resting)):
            results.append(
                train_corrected(
                    adapted,
                    work.received,
                    work.examples,
                    settings=work.settings,
                    place=work.place,
                    correction=work.correction,
                    state=work.state,
                )
            )
    return results


def train_corrected(
    adapted: Adapted,
    received: Tensors,
    examples: Sequence[Encoded],
    *,
    settings: TrainingSection,
    place: RoundPlace,
    correction: Corrector | None,
    state: SiteState,
) -> LocalResult:
    """Trains for one round; the result's state holds the client's control, too.

    Args:
        adapted: The resident model.
        received: Tensors of the request.
        examples: The client's encoded examples.
        settings: The ``[training]`` section.
        place: Seed and round.
        correction: The client's side of the method; None for none.
        state: What this client kept from its last round.

    Raises:
        SilotuneError: What the local round raises.
        TrainingError: The client's control is no longer finite.
    """
    began = time.perf_counter()
    weights, server = without(CONTROL, received), taken_from(CONTROL, received)
    own = state.control or zeros_like(weights)
    result = train_round(
        adapted,
        weights,
        examples,
        settings=settings,
        place=place,
        correction=correction.begin(own, server) if correction else None,
        state=state,
    )
    if correction is None or correction.end is None:
        return result
    work = LocalWork(
        result.delta,
        result.steps,
        learning_rate(settings, place.round_number, place.rounds),
        lambda: mean_gradient(adapted, weights, examples, settings=settings),
    )
    renewed = correction.end(own, server, work)
    if not all_finite(renewed):
        raise TrainingError("the client's control is no longer finite; lower training.learning_rate")
    change = put_under(CONTROL, subtract(renewed, own)) if correction.sends_change else {}
    kept = replace(result.state, control=renewed)
    return replace(result, delta={**result.delta, **change}, state=kept, seconds=time.perf_counter() - began)
