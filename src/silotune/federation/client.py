"""All that a silo does: a request in, a reply out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from silotune.errors import DataError, MessageError, PrivacyError, unknown_choice
from silotune.evaluation.evaluate import evaluate
from silotune.federation.budget import Budget, Opened, carried, has_spent, open_round, release_of
from silotune.federation.corrected import train_corrected
from silotune.methods.algorithms import method
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.privacy.accountant import Spend
from silotune.privacy.client_dp import private_update
from silotune.record.cost import Meter
from silotune.sections import SITE_NOISE, FederationSection, PrivacySection, Section, TrainingSection
from silotune.seeds import derive
from silotune.structs import Reply, Request, SiteState
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace
from silotune.training.private import DpSgd

_Order = TypeVar("_Order", bound=Section)


@dataclass
class Site:
    """One data holder: its examples, the resident model it trains on, what it keeps between rounds, its meter, and
    what it may spend of privacy."""

    name: str
    examples: Sequence[Encoded]
    adapted: Adapted
    state: SiteState = field(default_factory=SiteState)
    meter: Meter = field(default_factory=Meter)
    budget: Budget = Budget()


class TrainOrder(Section):
    """The body of a ``train`` request: the settings of a local round; ``run`` tells runs apart in ledgers."""

    training: TrainingSection
    federation: FederationSection
    seed: int
    rounds: int
    privacy: PrivacySection = PrivacySection()
    run: str = ""


class EvaluateOrder(Section):
    """The body of an ``evaluate`` request: how to score the client's own examples."""

    labels: tuple[str, ...]
    batch_size: int


def client_round(request: Request, site: Site) -> Reply:
    """Does what a request asks with the site's own data; the site's state moves on.

    Raises:
        MessageError: The kind is unknown, or the body does not hold valid settings.
        SilotuneError: What the work itself raises.
    """
    if request.kind not in KINDS:
        raise MessageError(unknown_choice("request", request.kind, KINDS))
    return KINDS[request.kind](request, site)


def _train(request: Request, site: Site) -> Reply:
    order = _read(TrainOrder, request)
    seed = derive(order.seed, "train", round_number=request.round_number, client=site.name)
    opened = _opened(order, request, site)
    with site.meter.client() as account:
        result = train_corrected(
            site.adapted,
            request.tensors,
            site.examples,
            settings=order.training,
            place=RoundPlace(seed, request.round_number, order.rounds, _dp_sgd(order.privacy, opened)),
            correction=method(order.federation).correction,
            state=site.state,
        )
    site.state = carried(site.state, result.state)
    delta = result.delta
    if opened is not None and order.privacy.dp == "local":
        noise = opened.spend.noise_multiplier
        delta = private_update(delta, clip_norm=order.privacy.clip_norm, noise_multiplier=noise)
    body = {
        "num_examples": result.num_examples,
        "loss": result.loss,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "core_seconds": account.spent.core_seconds,
        "joules": account.spent.joules,
        "energy_source": site.meter.gauge.source(),
    }
    if order.privacy.dp != "none":
        body.update(_withheld(order.privacy), epsilon=None if opened is None else opened.epsilon)
    return Reply(request.kind, request.round_number, site.name, delta, body)


def _opened(order: TrainOrder, request: Request, site: Site) -> Opened | None:
    """Writes the round's cost to the site's ledger before anything is trained; None where the site adds no noise."""
    if order.privacy.dp not in SITE_NOISE:
        return None

    def release(noise: float | None) -> Spend:
        size = len(site.examples)
        return release_of(order.privacy, order.training, num_examples=size, rounds=order.rounds, noise=noise)

    if not site.examples:
        raise DataError("a client has no examples to train on")
    number = request.round_number
    opened = open_round(
        site.name, site.state, site.budget, order.privacy, run=order.run, round_number=number, release=release
    )
    site.state = opened.state
    return opened


def _dp_sgd(privacy: PrivacySection, opened: Opened | None) -> DpSgd | None:
    if opened is None or privacy.dp != "example":
        return None
    return DpSgd(opened.spend.noise_multiplier, privacy.clip_norm)


def _withheld(privacy: PrivacySection) -> dict[str, Any]:
    """What no noise was put on: a mean loss, counts of tokens, and time and energy, which follow from them."""
    costs = {"seconds": None, "core_seconds": None, "joules": None, "energy_source": "unavailable"}
    return {"loss": None, "tokens": 0, **({} if privacy.report_costs else costs)}


def _evaluate(request: Request, site: Site) -> Reply:
    order = _read(EvaluateOrder, request)
    if has_spent(site.state):
        raise PrivacyError("this site trains under differential privacy and releases no figures on its own examples")
    adapters.write(site.adapted, request.tensors)
    scores = evaluate(site.adapted, site.examples, labels=order.labels, batch_size=order.batch_size)
    return Reply(request.kind, request.round_number, site.name, {}, scores)


KINDS: Mapping[str, Callable[[Request, Site], Reply]] = {"train": _train, "evaluate": _evaluate}


def _read(kind: type[_Order], request: Request) -> _Order:
    try:
        return kind.model_validate(dict(request.body))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise MessageError(f"a {request.kind} request's body is not valid at {where!r}") from error
