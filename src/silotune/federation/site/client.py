"""All that a silo does: a request in, a reply out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from silotune.errors import PrivacyError, ProtectionError
from silotune.evaluation.evaluate import evaluate
from silotune.federation.kinds import kind_named
from silotune.federation.site import encrypted_sum, secure_sum
from silotune.federation.site.guard import figures_within
from silotune.federation.site.ledger import has_spent
from silotune.federation.site.local_round import train_corrected
from silotune.federation.site.privacy import begin, check_way, dp_sgd, released, withheld
from silotune.federation.site.state import Site, completed, own_tensors, with_own, without_own
from silotune.federation.wire import links
from silotune.federation.wire.messages import Layout, layout_of, read_body
from silotune.federation.wire.orders import EvaluateOrder, TrainOrder
from silotune.federation.wire.sum_orders import input_layout, open_layout, update_layout, weight_layout
from silotune.lora import cut, rank_of
from silotune.methods.algorithms import method
from silotune.methods.corrections import Corrector
from silotune.methods.schedule import outgoing, returned
from silotune.models import adapters
from silotune.record.cost import Account
from silotune.seeds import derive
from silotune.structs import Reply, Request, SiteState, Tensors
from silotune.tensors import put_under, taken_from
from silotune.training.local import LocalResult, RoundPlace
from silotune.training.private import DpSgd


def client_round(request: Request, site: Site) -> Reply:
    """Does what a request asks with the site's own data; the site's state moves on.

    A deployed site asks ``admission.admit`` before it comes to this.

    Raises:
        MessageError: The kind is unknown, or the body does not hold valid settings.
        ProtectionError: The site takes part in protected sums only.
        SilotuneError: What the work itself raises.
    """
    kind = kind_named(request.kind)
    if site.protection is not None and site.protection.is_required and kind.is_seen_alone:
        raise ProtectionError(f"this site takes part in protected sums only: {request.kind!r} is refused")
    return ANSWERS[request.kind](request, site)


def _linked_train(request: Request, site: Site) -> Reply:
    """``_train`` at the end of its link: what came is opened before it, and its update is packed after it."""
    order = read_body(TrainOrder, request)
    check_way(order.privacy, "none")
    upload, download = order.federation.upload, order.federation.download
    held, made = taken_from(links.RECEIVED, site.state.tensors), method(order.federation)
    meant = outgoing(made.sent(dict(site.adapted.parameters), {}), made.schedule(request.round_number))
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
    """A round of the global model, then one of the client's own where the method has such (Ditto)."""
    order = _order(request, site)
    opened = begin(order.privacy, order.training, site, rounds=order.rounds, place=(order.run, request.round_number))
    made = method(order.federation)
    parts = made.schedule(request.round_number)
    received = _received(request, site)
    resting = [name for name in site.adapted.parameters if not parts.trains(name)]
    with site.meter.client() as account, adapters.frozen(site.adapted, resting):
        noise = dp_sgd(order.privacy, opened)
        result = _local_round(request, site, order, received, correction=made.correction, noise=noise)
        kept = {name: received[name] + delta for name, delta in result.delta.items() if parts.is_personal(name)}
        results = [result]
        if made.personal is not None:
            start = {**received, **own_tensors(site.state)}
            lone = replace(site, state=SiteState())
            own = _local_round(request, lone, order, start, correction=made.personal(received), purpose="own")
            kept, results = _moved(start, own.delta), [result, own]
    data = {**site.state.data, **result.state.data}
    site.state = with_own(replace(result.state, data=data), kept)
    delta = cut(result.delta, rank_of(request.tensors))
    sent = released(order.privacy, opened, {name: delta[name] for name in returned(request.tensors, parts)})
    report = {**_report(results, account, site), **withheld(order.privacy, opened)}
    return Reply(request.kind, request.round_number, site.name, sent, report)


def _personalize(request: Request, site: Site) -> Reply:
    """A local round from the final global model, which gives the client a model of its own; nothing is sent."""
    order = _order(request, site)
    received = _received(request, site)
    with site.meter.client() as account:
        full = order.training.model_copy(update={"schedule": "constant"})  # a cosine has come to 0 by now
        work = order.model_copy(update={"training": full})
        result = _local_round(request, site, work, received, purpose="personalize")
    site.state = with_own(without_own(site.state), _moved(received, result.delta))
    report = {**_report([result], account, site), **withheld(order.privacy, None)}
    return Reply(request.kind, request.round_number, site.name, {}, report)


def _order(request: Request, site: Site) -> TrainOrder:
    """The order to train.

    Raises:
        PrivacyError: It is under another guarantee than the run that the site takes part in.
    """
    order = read_body(TrainOrder, request)
    asked = order.privacy.dp
    is_less = site.dp.is_promised and site.dp.type != asked.type
    if is_less or (not asked.is_promised and has_spent(site.state)):
        raise PrivacyError(
            f"this run is under differential privacy, and {request.kind!r} asks for privacy.dp = {asked.type!r}"
        )
    return order


def _received(request: Request, site: Site) -> Tensors:
    own = own_tensors(site.state)
    return completed(request.tensors, site.adapted.parameters, initial=site.initial, own=own)


def _moved(start: Tensors, delta: Tensors) -> Tensors:
    return {name: start[name] + change for name, change in delta.items()}


def _local_round(
    request: Request,
    site: Site,
    order: TrainOrder,
    start: Tensors,
    *,
    correction: Corrector | None = None,
    purpose: str = "train",
    noise: DpSgd | None = None,
) -> LocalResult:
    """One local round from these tensors, with the client's seed of the round for this purpose."""
    seed = derive(order.seed, purpose, round_number=request.round_number, client=site.name)
    return train_corrected(
        site.adapted,
        start,
        site.examples,
        settings=order.training,
        place=RoundPlace(seed, request.round_number, order.rounds, noise),
        correction=correction,
        state=links.without_links(without_own(site.state)),
    )


def _report(results: Sequence[LocalResult], account: Account, site: Site) -> dict[str, Any]:
    """What the update weighs (of the first local round) and what all local rounds took."""
    return {
        "num_examples": results[0].num_examples,
        "loss": results[0].loss,
        "steps": results[0].steps,
        "tokens": sum(result.tokens for result in results),
        "seconds": sum(result.seconds for result in results),
        "core_seconds": account.spent.core_seconds,
        "joules": account.spent.joules,
        "energy_source": site.meter.gauge.source(),
    }


def _evaluate(request: Request, site: Site) -> Reply:
    order = read_body(EvaluateOrder, request)
    if site.dp.is_promised or has_spent(site.state):
        raise PrivacyError("this site trains under differential privacy and releases no figures on its own examples")
    adapters.write(site.adapted, request.tensors)
    scores = evaluate(
        site.adapted,
        site.examples,
        labels=order.labels,
        batch_size=order.batch_size,
        scoring=order.scoring,
        max_new_tokens=order.max_new_tokens,
    )
    return Reply(request.kind, request.round_number, site.name, {}, scores)


def _countersign(request: Request, site: Site) -> Reply:
    """Nothing to do: what counts is the signature, which covers the head that came with the request."""
    return Reply(request.kind, request.round_number, site.name, {})


def _masked_input(request: Request, site: Site) -> Reply:
    return secure_sum.masked_input(request, site, lambda order: _train_within("secure_sum", order, site))


def _encrypted_input(request: Request, site: Site) -> Reply:
    return encrypted_sum.encrypt_update(request, site, lambda order: _train_within("he", order, site))


def _train_within(way: str, request: Request, site: Site) -> Reply:
    """``_train`` for a protected sum."""
    check_way(read_body(TrainOrder, request).privacy, way)
    return figures_within(_train(request, site), site.metrics)


ANSWERS: Mapping[str, Callable[[Request, Site], Reply]] = {
    "train": _linked_train,
    "personalize": _personalize,
    "evaluate": _evaluate,
    "countersign": _countersign,
    "secure_sum.keys": secure_sum.advertise_keys,
    "secure_sum.shares": secure_sum.share_keys,
    "secure_sum.accept": secure_sum.accept_shares,
    "secure_sum.input": _masked_input,
    "secure_sum.check": secure_sum.check_survivors,
    "secure_sum.unmask": secure_sum.reveal_shares,
    "he.weight": encrypted_sum.encrypt_weight,
    "he.input": _encrypted_input,
    "he.open": encrypted_sum.open_sum,
}
"""Kind of request -> what answers it; a test holds its keys against ``KINDS``."""


def expected_reply(request: Request) -> Layout:
    """The layout that the tensors of a reply to this request must have: what its decoder compares a reply with.

    It follows from the request alone: its method says which tensors come back, its tensors have the client's rank.

    Raises:
        MessageError: The body does not hold valid settings, or a tensor has a dtype that is not carried.
    """
    return LAYOUTS[request.kind](request) if request.kind in LAYOUTS else {}


def _trained_layout(request: Request) -> Layout:
    parts = method(read_body(TrainOrder, request).federation).schedule(request.round_number)
    return layout_of(returned(request.tensors, parts))


LAYOUTS: Mapping[str, Callable[[Request], Layout]] = {
    "train": _trained_layout,
    "secure_sum.input": input_layout,
    "he.weight": weight_layout,
    "he.input": update_layout,
    "he.open": open_layout,
}
"""Kinds whose replies carry tensors."""
