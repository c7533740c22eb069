"""What "the same budget" means when institutions that train together are compared with pooled examples.

``compute``: the optimiser steps of all clients of a round together are those of pooled training. ``time``: every
institution has hardware of its own, so that each takes as many steps a round as pooled training does, all at once.

Where all clients share each step of the optimiser (FedSGD), a round is one step in every mode. Pooled training then
takes the batches of all clients together for ``compute``, and a batch as large as each client's for ``time``. Baselines
keep the optimiser's moments from round to round, as the server does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from silotune.config import Config
from silotune.record.printable import counted
from silotune.settings.sections import Mode, TrainingSection
from silotune.training.local import steps_in_round


def matched(config: Config, sizes: Sequence[int]) -> Config:
    """The configuration with the steps that every client takes under its budget.

    Args:
        config: The run's configuration.
        sizes: Number of training examples of each client.
    """
    if config.federation.budget_match == "compute" or config.federation.algorithm.shares_step:
        return config
    training = config.training.model_copy(update={"max_steps": _together(config, sizes)})
    return config.model_copy(update={"training": training})


def lone_training(config: Config) -> TrainingSection:
    """How an institution trains alone, from a configuration with the steps of its budget."""
    if not config.federation.algorithm.shares_step:
        return config.training
    return config.training.model_copy(update={"optimizer_state": "keep"})


def pooled_training(config: Config, sizes: Sequence[int]) -> TrainingSection:
    """How pooled examples are trained on, from a configuration with the steps of its budget.

    Args:
        config: The configuration.
        sizes: Number of training examples of each client.
    """
    training = lone_training(config)
    if not config.federation.algorithm.shares_step:
        return training.model_copy(update={"max_steps": pooled_steps(config, sizes)})
    batch, times = _pooled_batch(config, len(sizes))
    return training.model_copy(
        update={"batch_size": batch, "gradient_accumulation": training.gradient_accumulation * times}
    )


def _pooled_batch(config: Config, clients: int) -> tuple[int, int]:
    """Examples of a batch, and batches of a step for each of a client's, with all sampled clients' examples in a step:
    batches of more than a client's where they are small."""
    own = config.training.batch_size
    if config.federation.budget_match == "time":
        return own, 1
    sampled = config.federation.clients_per_round or clients
    parts = [part for part in range(1, sampled + 1) if sampled % part == 0]
    together = max((part for part in parts if own * part <= _BATCH), default=1)
    return own * together, sampled // together


_BATCH: Final = 32
"""Most examples of a pooled batch that is put together from small ones; more are accumulated."""


def _together(config: Config, sizes: Sequence[int]) -> int:
    """Steps a round of all sampled clients (mean over the clients when some rest), as each takes them by itself."""
    steps = [steps_in_round(size, config.training) for size in sizes]
    sampled = config.federation.clients_per_round or len(steps)
    return max(1, math.ceil(sum(steps) * sampled / len(steps)))


def pooled_steps(config: Config, sizes: Sequence[int]) -> int:
    """Optimiser steps a round on the pooled examples.

    Args:
        config: With the steps of its budget (see ``matched``).
        sizes: Number of training examples of each client.
    """
    if config.federation.budget_match == "time":
        return steps_in_round(sizes[0], config.training)
    return _together(config, sizes)


def steps_by_mode(config: Config, sizes: Sequence[int]) -> dict[Mode, int]:
    """Optimiser steps of ``training.batch_size`` examples of all institutions together over all rounds; isolated ones
    train in every round, so they may do more."""
    rounds, training = config.federation.rounds, config.training
    pooled = rounds * pooled_steps(config, sizes)
    alone = rounds * sum(steps_in_round(size, training) for size in sizes)
    return {"federated": rounds * _together(config, sizes), "centralized": pooled, "isolated": max(alone, 1)}


def said(config: Config, sizes: Mapping[str, int]) -> str:
    """What the budget means in this run, in one sentence; over sites, whose examples are not here, no number of
    steps."""
    rounds = config.federation.rounds
    if not any(sizes.values()):
        return f"{counted(rounds, 'round')}; each site does its own optimiser steps on its own examples"
    known = tuple(sizes.values())
    if config.federation.algorithm.shares_step:
        return f"same examples, initial adapter and evaluation; {_shared_steps(config, known)}"
    return (
        "same examples, initial adapter, batch size and evaluation; "
        f"{counted(rounds, 'round')}; {_SENTENCES[config.federation.budget_match](config, known)}"
    )


def _shared_steps(config: Config, sizes: Sequence[int]) -> str:
    federation, training = config.federation, config.training
    own = training.batch_size * training.gradient_accumulation
    pooled = pooled_training(config, sizes)
    sampled = federation.clients_per_round or len(sizes)
    meant = {"compute": "as many examples a step", "time": "equal time, as each institution has hardware of its own"}
    return (
        f"{counted(federation.rounds, 'step')} of the optimiser in every mode, each on: federated {sampled} x {own} "
        f"examples; centralised {pooled.batch_size * pooled.gradient_accumulation} ({meant[federation.budget_match]}); "
        f"isolated {own} of its own"
    )


def _equal_compute(config: Config, sizes: Sequence[int]) -> str:
    rounds, per_round, steps = config.federation.rounds, pooled_steps(config, sizes), steps_by_mode(config, sizes)
    more = steps["isolated"] > steps["federated"]
    resting = f", {steps['isolated']} in all, as each trains in every round" if more else ""
    return (
        f"federated: {per_round} optimiser steps a round over all sampled clients, {rounds * per_round} in total; "
        f"centralised: the same {rounds * per_round} on the pooled examples; "
        f"isolated: each institution does its own {'steps' if more else 'share of these steps'} on its own examples, "
        f"in every round{resting}"
    )


def _equal_time(config: Config, sizes: Sequence[int]) -> str:
    per_round, steps = pooled_steps(config, sizes), steps_by_mode(config, sizes)
    return (
        f"equal time, as each institution has hardware of its own: {per_round} optimiser steps a round at each of the "
        f"clients at once, {steps['federated']} in all; centralised: {per_round} a round on the pooled examples, "
        f"{steps['centralized']} in all; isolated: {per_round} a round at each institution, {steps['isolated']} in all"
    )


_SENTENCES = {"compute": _equal_compute, "time": _equal_time}
