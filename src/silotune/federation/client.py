"""All that a silo does: a request in, a reply out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from silotune.errors import MessageError, PrivacyError, ProtectionError, unknown_choice
from silotune.evaluation.evaluate import evaluate
from silotune.federation import encrypted_site, links, secure_site
from silotune.federation.budget import Budget, has_spent
from silotune.federation.corrected import train_corrected
from silotune.federation.guard import Guard, guarded
from silotune.federation.jobs import SignedJob
from silotune.federation.messages import Layout, layout_of, read_body
from silotune.federation.private import begin, dp_sgd, released, withheld
from silotune.methods.algorithms import method
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.record.cost import Meter
from silotune.sections import FederationSection, PrivacySection, TrainingSection
from silotune.seeds import derive
from silotune.settings import Section
from silotune.structs import Reply, Request, SiteState
from silotune.tensors import put_under, taken_from
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace


@dataclass
class Site:
    """One data holder: examples, the resident model it trains on, what it keeps between rounds, keys, and its meter.

    ``guard`` holds its policy, its key and its audit trail; None in a simulation of one's own. ``budget`` is what it
    may spend of privacy.
    """

    name: str
    examples: Sequence[Encoded]
    adapted: Adapted
    state: SiteState = field(default_factory=SiteState)
    protection: secure_site.Protection | None = None
    meter: Meter = field(default_factory=Meter)
    guard: Guard | None = None
    budget: Budget = Budget()


class TrainOrder(Section):
    """The body of a ``train`` request: the settings of a local round; ``run`` tells runs apart in ledgers."""

    training: TrainingSection
    federation: FederationSection
    seed: int
    rounds: int
    privacy: PrivacySection = PrivacySection()
    run: str = ""
    job: SignedJob | None = None


class EvaluateOrder(Section):
    """The body of an ``evaluate`` request: how to score the client's own examples."""

    labels: tuple[str, ...]
    batch_size: int
    job: SignedJob | None = None


def client_round(request: Request, site: Site) -> Reply:
    """Does what a request asks with the site's own data; the site's state moves on.

    Raises:
        PolicyError: The site's policy refuses.
        MessageError: The kind is unknown, or the body does not hold valid settings.
        ProtectionError: The site takes part in protected sums only.
        SilotuneError: What the work itself raises.
    """
    if site.guard is None:
        return _work(request, site)
    return guarded(request, site.guard, lambda allowed: _work(allowed, site))


def _work(request: Request, site: Site) -> Reply:
    if request.kind not in KINDS:
        raise MessageError(unknown_choice("request", request.kind, KINDS))
    if site.protection is not None and site.protection.is_required and request.kind in SEEN_ALONE:
        raise ProtectionError(f"this site takes part in protected sums only: {request.kind!r} is refused")
    return KINDS[request.kind](request, site)


def _linked_train(request: Request, site: Site) -> Reply:
    """``_train`` at the end of its link: what came is opened before it, and its update is packed after it."""
    order = read_body(TrainOrder, request)
    upload, download = order.federation.upload, order.federation.download
    held = taken_from(links.RECEIVED, site.state.tensors)
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
    order = read_body(TrainOrder, request)
    seed = derive(order.seed, "train", round_number=request.round_number, client=site.name)
    opened = begin(order.privacy, order.training, site, rounds=order.rounds, place=(order.run, request.round_number))
    with site.meter.client() as account:
        result = train_corrected(
            site.adapted,
            request.tensors,
            site.examples,
            settings=order.training,
            place=RoundPlace(seed, request.round_number, order.rounds, dp_sgd(order.privacy, opened)),
            correction=method(order.federation).correction,
            state=site.state,
        )
    site.state = replace(result.state, data={**site.state.data, **result.state.data})
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
    delta = released(order.privacy, opened, result.delta)
    return Reply(request.kind, request.round_number, site.name, delta, {**body, **withheld(order.privacy, opened)})


def _evaluate(request: Request, site: Site) -> Reply:
    order = read_body(EvaluateOrder, request)
    if has_spent(site.state):
        raise PrivacyError("this site trains under differential privacy and releases no figures on its own examples")
    adapters.write(site.adapted, request.tensors)
    scores = evaluate(site.adapted, site.examples, labels=order.labels, batch_size=order.batch_size)
    return Reply(request.kind, request.round_number, site.name, {}, scores)


def _countersign(request: Request, site: Site) -> Reply:
    """Nothing to do: what counts is the signature, which covers the head that came with the request."""
    return Reply(request.kind, request.round_number, site.name, {})


def _masked_input(request: Request, site: Site) -> Reply:
    return secure_site.masked_input(request, site, lambda order: _train(order, site))


def _encrypted_input(request: Request, site: Site) -> Reply:
    return encrypted_site.encrypt_update(request, site, lambda order: _train(order, site))


KINDS: Mapping[str, Callable[[Request, Site], Reply]] = {
    "train": _linked_train,
    "evaluate": _evaluate,
    "countersign": _countersign,
    "secure_sum.keys": secure_site.advertise_keys,
    "secure_sum.shares": secure_site.share_keys,
    "secure_sum.input": _masked_input,
    "secure_sum.check": secure_site.check_survivors,
    "secure_sum.unmask": secure_site.reveal_shares,
    "he.weight": encrypted_site.encrypt_weight,
    "he.input": _encrypted_input,
    "he.open": encrypted_site.open_sum,
}


def expected_reply(request: Request) -> Layout:
    """The layout that the tensors of a reply to this request must have: what its decoder compares a reply with."""
    return LAYOUTS[request.kind](request) if request.kind in LAYOUTS else {}


LAYOUTS: Mapping[str, Callable[[Request], Layout]] = {
    "train": lambda request: layout_of(request.tensors),
    "secure_sum.input": secure_site.input_layout,
    "he.weight": encrypted_site.weight_layout,
    "he.input": encrypted_site.update_layout,
    "he.open": encrypted_site.open_layout,
}
"""Kinds whose replies carry tensors."""
SEEN_ALONE = ("train", "evaluate")
"""Kinds whose replies show the coordinator one site's own update or figures."""
