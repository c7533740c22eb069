"""The tables of federated algorithms and of LoRA rules, and one aggregate's way into the global model.

A method is a weighting, an aggregation rule, a server step and a correction at the clients. The algorithm's name says
the last two; weighting and rule have names of their own, and go with (nearly) every algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from silotune.lora import without_residuals
from silotune.methods.aggregate import (
    CONTROL,
    WEIGHTINGS,
    Rule,
    Weigh,
    beside_controls,
    beside_counts,
    per_step,
    weighed,
)
from silotune.methods.corrections import (
    Anchored,
    Corrector,
    control_variates,
    dynamic_regulariser,
    towards,
    towards_received,
)
from silotune.methods.products import Fold, Products, into_base, into_factors, into_residual
from silotune.methods.robust import AGGREGATIONS
from silotune.methods.schedule import Schedule, in_turns, whole, without_a, without_own_b
from silotune.methods.server_step import (
    SecondMoment,
    ServerStep,
    adagrad_moment,
    adam_moment,
    adaptive_step,
    control_of,
    control_step,
    dynamic_step,
    momentum_step,
    plain_step,
    training_step,
    yogi_moment,
)
from silotune.settings.aggregation import Uniform
from silotune.settings.algorithms import (
    AdaptiveSettings,
    AlgorithmSettings,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FedNova,
    FedProx,
    FedSgd,
    FedYogi,
    Scaffold,
)
from silotune.settings.lora_rules import (
    Alternate,
    Ditto,
    ExactResidual,
    Factors,
    FreezeA,
    LoraRuleSettings,
    PersonalizationSettings,
    ShareA,
    SmallCore,
    Stack,
    Svd,
)
from silotune.settings.objectives import Sgd
from silotune.settings.registry import implemented
from silotune.settings.sections import FederationSection, TrainingSection
from silotune.structs import ClientUpdate, ServerState, Tensors
from silotune.tensors import put_under


def _weights_alone(weights: Tensors, memory: Tensors) -> Tensors:
    return weights


def _examples(update: ClientUpdate) -> float:
    return update.counts


@dataclass(frozen=True)
class Method:
    """A federated method.

    Attributes:
        aggregate: Updates, one at a time, to one delta; weighs them itself.
        step: Weights, delta, memory and the share of clients in it to new weights and memory.
        correction: What clients add to their gradients; None for nothing.
        sent: Weights and memory to the tensors of a request, of which the schedule may leave some out.
        weigh: What an update counts in a mean.
        schedule: Which parts of the adapter train and travel in a round.
        fold: What a LoRA-aware rule does to the model after the server step; None for nothing.
        personal: What pulls a client's own model towards the global one in every round; None for no own model.
    """

    aggregate: Rule
    step: ServerStep
    correction: Corrector | None = None
    sent: Callable[[Tensors, Tensors], Tensors] = _weights_alone
    weigh: Weigh = _examples
    schedule: Schedule = whole
    fold: Fold | None = None
    personal: Anchored | None = None


def _fedavg(settings: FedAvg, rule: Rule) -> Method:
    return Method(rule, plain_step(settings.server_learning_rate))


def _fedprox(settings: FedProx, rule: Rule) -> Method:
    return Method(rule, plain_step(settings.server_learning_rate), towards_received(settings.proximal_mu))


def _scaffold(settings: Scaffold, rule: Rule) -> Method:
    return Method(
        beside_counts(beside_controls(rule)),
        control_step(settings.server_learning_rate),
        control_variates(settings.option),
        lambda weights, memory: {**weights, **put_under(CONTROL, control_of(weights, memory))},
    )


def _fedavgm(settings: FedAvgM, rule: Rule) -> Method:
    return Method(rule, momentum_step(settings.server_learning_rate, settings.server_momentum))


def _adaptive(settings: AdaptiveSettings, rule: Rule, second_moment: SecondMoment) -> Method:
    """Reddi et al. 2021, Algorithm 2."""
    rate, beta1, tau = settings.server_learning_rate, settings.server_beta1, settings.server_tau
    return Method(rule, adaptive_step(rate, beta1=beta1, tau=tau, second_moment=second_moment))


def _fedadagrad(settings: FedAdagrad, rule: Rule) -> Method:
    return _adaptive(settings, rule, adagrad_moment())


def _fedyogi(settings: FedYogi, rule: Rule) -> Method:
    return _adaptive(settings, rule, yogi_moment(settings.server_beta2))


def _fedadam(settings: FedAdam, rule: Rule) -> Method:
    return _adaptive(settings, rule, adam_moment(settings.server_beta2))


def _fednova(settings: FedNova, rule: Rule) -> Method:
    return Method(per_step(rule), plain_step(settings.server_learning_rate))


def _feddyn(settings: FedDyn, rule: Rule) -> Method:
    """With alpha = 0 there is no regulariser and nothing to keep: FedAvg."""
    if settings.alpha == 0:
        return Method(rule, plain_step(settings.server_learning_rate), dynamic_regulariser(0.0))
    step = dynamic_step(settings.server_learning_rate, settings.alpha)
    return Method(beside_counts(rule), step, dynamic_regulariser(settings.alpha))


def _fedsgd(settings: FedSgd, rule: Rule) -> Method:
    """Its server step is that of ``[training]``: see ``method``."""
    return Method(rule, _without_training)


def _without_training(weights: Tensors, delta: Tensors, memory: Tensors, share: float) -> tuple[Tensors, Tensors]:
    raise RuntimeError("a method that takes the steps of [training] was made without that section")


ALGORITHMS: Mapping[type[AlgorithmSettings], Callable[[Any, Rule], Method]] = {
    FedAvg: _fedavg,
    FedProx: _fedprox,
    Scaffold: _scaffold,
    FedAvgM: _fedavgm,
    FedAdagrad: _fedadagrad,
    FedYogi: _fedyogi,
    FedAdam: _fedadam,
    FedNova: _fednova,
    FedDyn: _feddyn,
    FedSgd: _fedsgd,
}
"""Settings -> builder of the method that they are of, from an aggregation rule."""

PERSONAL_TERMS: Mapping[type[PersonalizationSettings], Callable[[Any], Anchored]] = {
    Ditto: lambda settings: towards(settings.pull),
}
"""Settings -> what pulls a client's own model towards the global one, where it is trained in the rounds."""


def method(section: FederationSection, training: TrainingSection | None = None) -> Method:
    """The method that a ``[federation]`` section names.

    Args:
        section: The section.
        training: Needed to step, by an algorithm whose server takes the steps of training; not to tell what travels.
    """
    rule_of = implemented(AGGREGATIONS, section.aggregation)
    made = implemented(ALGORITHMS, section.algorithm)(section.algorithm, rule_of(section.aggregation))
    if section.algorithm.shares_step and training is not None:
        rate = section.algorithm.server_learning_rate
        made = replace(made, step=training_step(training, rounds=section.rounds, server_learning_rate=rate))
    weighting = Uniform() if section.aggregation.counts_once else section.weighting
    weigh, rule = WEIGHTINGS[type(weighting)](weighting), LORA_RULES[type(section.lora)]
    term = PERSONAL_TERMS.get(type(section.personalization))
    return replace(
        made,
        aggregate=weighed(made.aggregate, weigh),
        weigh=weigh,
        schedule=rule.schedule,
        fold=rule.fold,
        personal=None if term is None else term(section.personalization),
    )


def local_training(section: FederationSection, training: TrainingSection) -> TrainingSection:
    """How clients take the local steps of the global model: where the server takes the step, the update of a plain one
    of rate 1 is the gradient, neither clipped nor decayed."""
    if not section.algorithm.shares_step:
        return training
    gradient = {"optimizer": Sgd(), "learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0}
    return training.model_copy(update={**gradient, "schedule": "constant", "optimizer_state": "reset"})


def title_of(section: FederationSection) -> str:
    """The algorithm's name, with those of rule and weighting where they are not the default ones."""
    defaults = FederationSection()
    chosen = (section.aggregation, defaults.aggregation), (section.weighting, defaults.weighting)
    others = (given.type for given, default in chosen if given.type != default.type)
    return ", ".join((section.algorithm.type, *others))


def plain(section: FederationSection) -> FederationSection:
    """The section with FedAvg in place of its method: with a single client, FedAvg is plain training."""
    chosen = {"algorithm", "aggregation", "weighting"}
    chosen |= {"lora", "ranks", "memory_mb", "policies", "personalization"}
    return FederationSection(**section.model_dump(exclude=chosen))


@dataclass(frozen=True)
class LoraAggregation:
    """How LoRA's factors become one model.

    Attributes:
        schedule: Which tensors train and travel in a round.
        fold: Puts the mean product into the model after the server step; None where averaging is all.
    """

    schedule: Schedule = whole
    fold: Fold | None = None


LORA_RULES: Mapping[type[LoraRuleSettings], LoraAggregation] = {
    Factors: LoraAggregation(),
    ExactResidual: LoraAggregation(fold=into_residual),
    Stack: LoraAggregation(fold=into_base),
    Svd: LoraAggregation(fold=into_factors),
    FreezeA: LoraAggregation(without_a),
    Alternate: LoraAggregation(in_turns),
    ShareA: LoraAggregation(without_own_b),
    SmallCore: LoraAggregation(),
}
"""Settings -> the rule that they are of."""


def advance(
    method: Method, state: ServerState, delta: Tensors, *, products: Products, share: float, seed: int
) -> tuple[Tensors, Tensors, float | None]:
    """The global model after a round.

    A tensor that was not sent keeps its value: the server step is given a delta of zero for it, and its result is
    ignored.

    Args:
        method: Server step and fold.
        state: Weights and memory before the round.
        delta: The aggregated delta of what was sent in the round.
        products: The clients' products of this round.
        share: Part of all clients whose updates are in the delta, by heads.
        seed: Of the round, for what a rule draws anew.

    Returns:
        Weights and memory, and the aggregation error; None where there are no products.
    """
    trained = without_residuals(state.weights)
    whole = {name: delta[name] if name in delta else torch.zeros_like(tensor) for name, tensor in trained.items()}
    whole |= {name: tensor for name, tensor in delta.items() if name not in trained}  # what is sent beside the adapter
    stepped, memory = method.step(trained, whole, state.memory, share)
    weights = {name: stepped[name] if name in delta else tensor for name, tensor in state.weights.items()}
    if method.fold is None:
        return weights, memory, products.error()
    folded = method.fold(weights, products, seed)
    return folded, memory, products.error(folded)
