"""Models of the clients' own: made after the last round where asked for, and scored beside the global one.

Each client's own model answers that client's share of the gold-standard set, so that the figures over all shares
stand on the same examples as the global model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from silotune.evaluation.evaluate import Answers, answers_together, figures
from silotune.experiment.parts import Part, federation_of
from silotune.experiment.prepare import Prepared
from silotune.experiment.scoring import Scorer
from silotune.federation.coordinator.rounds import Plan, exchange
from silotune.federation.kinds import PERSONALIZE
from silotune.federation.wire.transport import Transport
from silotune.lora import cut
from silotune.models import adapters
from silotune.record.runs import RunFolder
from silotune.structs import Failure, Observer, Request, Tensors

_SHOWN_BY_CLIENT = ("scoring", "reliability")


def made(
    prepared: Prepared, part: Part, plan: Plan, transport: Transport, weights: Tensors, notify: Observer
) -> dict[str, Tensors] | None:
    """Models of the clients' own after the last round; None where the method makes none."""
    section = federation_of(prepared, part)
    if not (section.personalization.makes_models or section.lora.keeps_own_b):
        return None
    if section.personalization.comes_after:
        for failure in fine_tune(plan, transport, weights):
            notify("client_failed", {"client": failure.client, "round": failure.round_number, "reason": failure.reason})
    return own_models(transport, weights)


def fine_tune(plan: Plan, transport: Transport, weights: Tensors) -> list[Failure]:
    """Asks every client for a local round from the final global model, and to keep the resulting model.

    Args:
        plan: Of the rounds that are done: settings, ranks, and the audit trail that messages enter.
        transport: How to reach the clients.
        weights: The final global model.

    Returns:
        Clients that could not: they go on with the global model.
    """
    requests = {
        name: Request(PERSONALIZE, plan.rounds + 1, name, cut(weights, plan.ranks.get(name)), plan.body)
        for name in transport.clients()
    }
    replies = exchange(plan, transport, requests)
    return [reply for reply in replies if isinstance(reply, Failure)]


def own_models(transport: Transport, weights: Tensors) -> dict[str, Tensors]:
    """Client -> its own adapter, whole; clients that have none (never sampled, failed) are left out."""
    found = {name: state.own for name, state in transport.states().items()}
    return {name: {**weights, **own} for name, own in found.items() if own}


def scored(
    prepared: Prepared, part: Part, models: Mapping[str, Tensors], by_client: Mapping[str, Any]
) -> dict[str, Any]:
    """Figures of the own models, each on its client's share of the gold-standard set, beside the global model's.

    Args:
        prepared: Examples and scoring.
        part: The run of rounds.
        models: Own adapters by client.
        by_client: The global model's figures on the same shares.

    Returns:
        ``metrics`` over all shares together, ``num_examples`` of them, ``by_client`` with ``own`` and ``global``
        figures, and ``without``: clients that have no own model and are left out of the figures.
    """
    gold = prepared.gold
    assert isinstance(gold, Scorer), "models of one's own are for one task: the configuration refuses a mixture"
    answered: dict[str, Answers] = {}
    for name, share in prepared.own_shares.items():
        if name in models and share:
            examples = [gold.examples[place] for place in share]
            scorer = replace(gold, examples=examples, known={}, answers={})
            scorer(models[name])
            (answered[name],) = scorer.answers.values()
    rows = {name: {"own": _brief(figures(own)), "global": by_client[name]} for name, own in answered.items()}
    result: dict[str, Any] = {"by_client": rows, "without": sorted(set(part.clients) - set(models))}
    if answered:
        together = answers_together(list(answered.values()))
        made = figures(together, bootstrap_samples=prepared.config.evaluation.bootstrap_samples)
        result |= {"num_examples": made.pop("num_examples"), "metrics": made}
    return result


def save(folder: RunFolder, prepared: Prepared, models: Mapping[str, Tensors], *, card: str) -> None:
    """Writes ``personal/<client>/adapter`` for every own model, in peft's format."""
    for name, tensors in models.items():
        exported, config = adapters.exported(prepared.adapted, tensors)
        folder.part("personal", name).save_adapter(exported, config, card=card)


def _brief(made: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in made.items() if key not in _SHOWN_BY_CLIENT}
