"""All that a silo does: a request in, a reply out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pydantic import ValidationError

from silotune.errors import MessageError, unknown_choice
from silotune.evaluation.evaluate import evaluate
from silotune.federation import links
from silotune.federation.corrected import train_corrected
from silotune.federation.messages import layout_of
from silotune.methods.algorithms import method
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.record.cost import Meter
from silotune.sections import FederationSection, Section, TrainingSection
from silotune.seeds import derive
from silotune.structs import Reply, Request, SiteState
from silotune.tensors import put_under, taken_from
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace

_Order = TypeVar("_Order", bound=Section)


@dataclass
class Site:
    """One data holder: its examples, the resident model it trains on, what it keeps between rounds, and its meter."""

    name: str
    examples: Sequence[Encoded]
    adapted: Adapted
    state: SiteState = field(default_factory=SiteState)
    meter: Meter = field(default_factory=Meter)


class TrainOrder(Section):
    """The body of a ``train`` request: the settings of a local round; ``delta`` where a change of the model came."""

    training: TrainingSection
    federation: FederationSection
    seed: int
    rounds: int
    delta: bool = False


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


def _linked_train(request: Request, site: Site) -> Reply:
    """``_train`` at the end of its link: what came is opened before it, and its update is packed after it."""
    order = _read(TrainOrder, request)
    upload, download = order.federation.upload, order.federation.download
    held = taken_from(links.RECEIVED, site.state.tensors) if order.delta else None
    meant = method(order.federation).sent(dict(site.adapted.parameters), {})
    received = links.open_request(request.tensors, download, layout_of(meant), held=held)
    inner = replace(site, state=links.without_links(site.state))
    reply = _train(replace(request, tensors=received), inner)
    seed = derive(order.seed, "compress", round_number=request.round_number, client=site.name)
    sent, kept = links.pack_reply(reply.tensors, upload, site.state, seed=seed)
    if download.delta:
        kept = {**kept, **put_under(links.RECEIVED, received)}
    site.state = replace(inner.state, tensors={**inner.state.tensors, **kept})
    return replace(reply, tensors=sent)


def _train(request: Request, site: Site) -> Reply:
    order = _read(TrainOrder, request)
    seed = derive(order.seed, "train", round_number=request.round_number, client=site.name)
    with site.meter.client() as account:
        result = train_corrected(
            site.adapted,
            request.tensors,
            site.examples,
            settings=order.training,
            place=RoundPlace(seed, request.round_number, order.rounds),
            correction=method(order.federation).correction,
            state=site.state,
        )
    site.state = result.state
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
    return Reply(request.kind, request.round_number, site.name, result.delta, body)


def _evaluate(request: Request, site: Site) -> Reply:
    order = _read(EvaluateOrder, request)
    adapters.write(site.adapted, request.tensors)
    scores = evaluate(site.adapted, site.examples, labels=order.labels, batch_size=order.batch_size)
    return Reply(request.kind, request.round_number, site.name, {}, scores)


KINDS: Mapping[str, Callable[[Request, Site], Reply]] = {"train": _linked_train, "evaluate": _evaluate}


def _read(kind: type[_Order], request: Request) -> _Order:
    try:
        return kind.model_validate(dict(request.body))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise MessageError(f"a {request.kind} request's body is not valid at {where!r}") from error
