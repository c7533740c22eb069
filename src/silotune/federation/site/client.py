"""All that a silo does: it takes a request and gives a reply.

A round of training has three parts. ``begin`` unpacks the request and records its privacy cost, an engine trains, and
``release`` turns the results into what may leave. So an engine may train one client after the other, or many in one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from silotune.errors import PrivacyError, ProtectionError
from silotune.evaluation.evaluate import evaluate
from silotune.federation.kinds import kind_named
from silotune.federation.site import encrypted_sum, privacy, secure_sum
from silotune.federation.site.guard import figures_within
from silotune.federation.site.ledger import Opened, has_spent
from silotune.federation.site.local_round import Work, one_by_one
from silotune.federation.site.state import Site, completed
from silotune.federation.wire import links
from silotune.federation.wire.messages import layout_of
from silotune.federation.wire.orders import Order, read_order
from silotune.lora import cut, padded, rank_of
from silotune.methods.algorithms import local_training, method
from silotune.methods.corrections import Corrector
from silotune.methods.schedule import AdapterParts, outgoing, returned
from silotune.models import adapters
from silotune.models.elsewhere import Turn
from silotune.record.cost import Account
from silotune.seeds import derive
from silotune.structs import Reply, Request, SiteState, Tensors
from silotune.training.local import LocalResult, RoundPlace
from silotune.training.private import DpSgd


def client_round(request: Request, site: Site) -> Reply:
    """Does what a request asks with the site's own data, and updates the site's state.

    A deployed site calls ``admission.admit`` first.

    Raises:
        MessageError: The kind is unknown, or the body does not hold a valid order.
        ProtectionError: The site takes part in protected sums only.
        SilotuneError: What the work itself raises.
    """
    kind = kind_named(request.kind)
    if site.protection is not None and site.protection.is_required and kind.is_seen_alone and not kind.audits:
        raise ProtectionError(f"this site takes part in protected sums only: {request.kind!r} is refused")
    reply: Reply = kind.answer(request, site)
    return reply


def train(request: Request, site: Site) -> Reply:
    """``train`` over a compressed link: unpacks the request, trains for one round, and packs the update."""
    settings, order = site.settings, read_order(request)
    privacy.check_way(settings.privacy, "none")
    upload, download = settings.federation.upload, settings.federation.download
    made = method(settings.federation)
    meant = outgoing(made.sent(dict(site.adapted.parameters), {}), made.schedule(request.round_number))
    received = links.open_request(request.tensors, download, layout_of(meant), held=site.state.received)
    reply, before = _trained(replace(request, tensors=received), site), site.state
    seed = derive(order.seed, "compress", round_number=request.round_number, client=site.name)
    sent, left = links.pack_reply(reply.tensors, upload, before, seed=seed)
    control = before.control
    if made.correction is not None and made.correction.hears is not None:
        lost = padded(links.lost_of_reply(reply.tensors, sent, upload), rank_of(control))
        control = made.correction.hears(control, lost) if lost else control
    site.state = replace(before, residual=left, control=control, received=received if download.delta else {})
    return replace(reply, tensors=sent)


@dataclass(frozen=True)
class Begun:
    """A round that a site is ready to train.

    Attributes:
        request: What was asked, opened.
        works: What an engine is to train: the round of the global model, then that of the client's own where the
            method has one (Ditto).
        parts: Which tensors of the adapter travel, train and stay at the site.
        opened: What the round costs in privacy, written down; None where the site adds no noise.
    """

    request: Request
    works: tuple[Work, ...]
    parts: AdapterParts
    opened: Opened | None


def begin(request: Request, site: Site) -> Begun:
    """Gets a round ready, and writes what it costs in privacy to the site's ledger.

    Raises:
        PrivacyError: The site has released something under a guarantee in this run, but the settings name no
            guarantee.
        BudgetError: The round would overspend.
        MessageError: The body does not hold a valid order, or a tensor is missing.
    """
    order, settings = _order(request, site), site.settings
    place = (order.run, request.round_number)
    rounds = settings.federation.rounds
    opened = privacy.begin(settings.privacy, settings.training, site, rounds=rounds, place=place)
    made = method(settings.federation)
    parts = made.schedule(request.round_number)
    received = _received(request, site)
    resting = tuple(name for name in site.adapted.parameters if not parts.trains(name))
    noise = privacy.dp_sgd(settings.privacy, opened)
    first = _work(request, site, order, received, correction=made.correction, noise=noise)
    local = local_training(settings.federation, settings.training)
    works = [replace(first, settings=local, resting=resting)]
    if made.personal is not None:
        lone = replace(site, state=SiteState())
        start = {**received, **site.state.own}
        own = _work(request, lone, order, start, correction=made.personal(received), purpose="own")
        works.append(replace(own, resting=resting))
    return Begun(request, tuple(works), parts, opened)


def release(begun: Begun, results: Sequence[LocalResult], account: Account, site: Site) -> Reply:
    """The reply with what may leave of a trained round; the site's state is updated.

    Args:
        begun: As ``begin`` gave it.
        results: Of its works.
        account: What training them took.
        site: Whose round it is.
    """
    request, parts, first = begun.request, begun.parts, results[0]
    moved = _moved(begun.works[-1].received, results[-1].delta)
    has_own = len(results) > 1
    kept = moved if has_own else {name: tensor for name, tensor in moved.items() if parts.is_personal(name)}
    site.state = replace(site.state, optimizer=first.state.optimizer, control=first.state.control, own=kept)
    delta = cut(first.delta, rank_of(request.tensors))
    update = {name: delta[name] for name in returned(request.tensors, parts)}
    sent = privacy.released(site.settings.privacy, begun.opened, update)
    report = {**_report(results, account, site), **privacy.withheld(site.settings.privacy, begun.opened)}
    return Reply(request.kind, request.round_number, site.name, sent, report)


def _trained(request: Request, site: Site) -> Reply:
    begun = begin(request, site)
    if site.adapted.elsewhere is not None:
        site.adapted.elsewhere.turn = Turn(site.name, request.round_number)
    with site.meter.client() as account:
        results = one_by_one(site.adapted, begun.works)
    return release(begun, results, account, site)


def personalize(request: Request, site: Site) -> Reply:
    """Trains a model of the client's own for one round from the final global model; no tensors are sent."""
    order, received = _order(request, site), _received(request, site)
    full = site.settings.training.model_copy(update={"schedule": "constant"})  # a cosine schedule has reached 0 by now
    work = replace(_work(request, site, order, received, purpose="personalize"), settings=full)
    with site.meter.client() as account:
        (result,) = one_by_one(site.adapted, [work])
    site.state = replace(site.state, own=_moved(received, result.delta))
    report = {**_report([result], account, site), **privacy.withheld(site.settings.privacy, None)}
    return Reply(request.kind, request.round_number, site.name, {}, report)


def _order(request: Request, site: Site) -> Order:
    """The order to train.

    Raises:
        PrivacyError: The site has spent privacy under a guarantee in this run, but the settings now name no guarantee.
    """
    order = read_order(request)
    if not site.settings.privacy.dp.is_promised and has_spent(site.state):
        raise PrivacyError("this run was under differential privacy, and its settings say privacy.dp = 'none' now")
    return order


def _received(request: Request, site: Site) -> Tensors:
    return completed(request.tensors, site.adapted.parameters, initial=site.initial, own=site.state.own)


def _moved(start: Tensors, delta: Tensors) -> Tensors:
    return {name: start[name] + change for name, change in delta.items()}


def _work(
    request: Request,
    site: Site,
    order: Order,
    start: Tensors,
    *,
    correction: Corrector | None = None,
    purpose: str = "train",
    noise: DpSgd | None = None,
) -> Work:
    """A local round from these tensors, with the client's seed of the round for this purpose."""
    seed = derive(order.seed, purpose, round_number=request.round_number, client=site.name)
    return Work(
        start,
        site.examples,
        site.settings.training,
        RoundPlace(seed, request.round_number, site.settings.federation.rounds, noise),
        correction,
        site.state,
    )


def _report(results: Sequence[LocalResult], account: Account, site: Site) -> dict[str, Any]:
    """The weight of the update (from the first local round) and what all local rounds cost."""
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


def score(request: Request, site: Site) -> Reply:
    """``evaluate``: figures of the model that came, on the site's own examples."""
    read_order(request)
    if site.settings.privacy.dp.is_promised or has_spent(site.state):
        raise PrivacyError("this site trains under differential privacy and releases no figures on its own examples")
    adapters.write(site.adapted, request.tensors)
    how = site.settings.evaluation
    scores = evaluate(
        site.adapted,
        site.examples,
        labels=site.settings.labels,
        batch_size=how.batch_size,
        scoring=how.scoring,
        max_new_tokens=how.max_new_tokens,
    )
    return Reply(request.kind, request.round_number, site.name, {}, scores)


def countersign(request: Request, site: Site) -> Reply:
    """Gives an empty reply: what counts is its signature, which covers the head that came with the request."""
    return Reply(request.kind, request.round_number, site.name, {})


def train_masked(request: Request, site: Site) -> Reply:
    """``secure_sum.input``: a round of training whose update leaves as masked integers."""
    return secure_sum.masked_input(request, site, lambda order: _train_within("secure_sum", order, site))


def train_encrypted(request: Request, site: Site) -> Reply:
    """``he.input``: a round of training whose update leaves encrypted."""
    return encrypted_sum.encrypt_update(request, site, lambda order: _train_within("he", order, site))


def _train_within(way: str, request: Request, site: Site) -> Reply:
    """A round of training for a protected sum."""
    privacy.check_way(site.settings.privacy, way)
    return figures_within(_trained(request, site), site.metrics)
