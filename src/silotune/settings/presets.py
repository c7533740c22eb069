"""``federation.preset = "auto"``: settings that were measured to bring federated training near pooled training.

A preset fills in what a configuration leaves open and changes nothing that it says, so a run's configuration always
holds every value that it ran with. The figures behind it are in ``docs/algorithms.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from silotune.settings.adapters import ADAPTERS
from silotune.settings.lora_rules import LORA_RULES
from silotune.settings.objectives import OBJECTIVES
from silotune.settings.registry import name_of
from silotune.settings.sections import FederationSection, TrainingSection

STEPS: Final = 100
"""Optimiser steps of a run, where it does not say."""
FEWEST_STEPS: Final = 48
"""Below so many steps no shared step was seen to learn more than the commonest answer."""
STEP_EXAMPLES: Final = 16
"""Examples of a pooled step; clients share them out."""
RATES: Final = {"lora": 1e-3, "qlora": 1e-3, "ia3": 1e-2}
"""Adapter -> learning rate, chosen on validation examples."""
HEAD_RATES: Final = {**RATES, "lora": 2e-3, "qlora": 2e-3}
"""The same where a new head is trained along."""
_ROUNDS, _LOCAL_STEPS = 8, 4
"""Of plain averaging, where no step can be shared."""


def filled(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with what its preset fills in; as it is without one.

    Args:
        document: A configuration as a user says it: section -> key -> value.
    """
    if _said(document, "federation", "preset") != "auto":
        return dict(document)
    shares = _can_share(document)
    algorithm = _said(document, "federation", "algorithm")
    rounds = _said(document, "federation", "rounds") or (STEPS if shares else _ROUNDS)
    values: dict[tuple[str, str], Any] = {
        ("federation", "algorithm"): algorithm or ("fedsgd" if shares else "fedavg"),
        ("federation", "rounds"): rounds,
        ("training", "batch_size"): _batch(document) if shares else STEP_EXAMPLES,
    }
    if _said(document, "training", "epochs") is None:
        values["training", "max_steps"] = 1 if shares else _LOCAL_STEPS
    has_head = _objective(document) in OBJECTIVES.those("has_head")
    rate = (HEAD_RATES if has_head else RATES).get(str(name_of(document.get("adapter")) or ADAPTERS.default))
    if rate is not None:
        values["training", "learning_rate"] = rate
    if isinstance(rounds, int) and rounds > _ROUNDS:
        values["evaluation", "every"] = max(1, rounds // 4)
    return _put(document, values)


def said(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What a preset chose and why, for the introduction of a run; nothing without one."""
    if federation.preset == "none":
        return []
    chosen = f"federation.preset = 'auto': {federation.algorithm.type}, rate {training.learning_rate:g}"
    if not federation.algorithm.shares_step:
        why = "what else is set does not go with a step that all clients share"
        return [f"{chosen}, {federation.rounds} rounds of local steps: {why}"]
    why = (
        "where institutions hold different answers, local steps pull their models apart, and a step of all together is "
        "one of pooled training; it takes more rounds and bytes, and sends gradients"
    )
    return [f"{chosen}, {federation.rounds} steps, each of {training.batch_size} examples at every client: {why}"]


def _can_share(document: Mapping[str, Any]) -> bool:
    """Whether clients may share each step: nothing that is set needs local steps, or another algorithm."""
    algorithm = name_of(_said(document, "federation", "algorithm"))
    rule = name_of(_said(document, "federation", "lora"))
    clock = _said(document, "federation", "clock")
    return (
        algorithm in (None, "fedsgd")
        and rule not in LORA_RULES.those("keeps_product")
        and _said(document, "training", "epochs") is None
        and _said(document, "training", "max_steps") in (None, 1)
        and _said(document, "training", "optimizer_state") in (None, "reset")
        and not (clock is not None and _of(clock, "buffer"))
    )


def _batch(document: Mapping[str, Any]) -> int:
    """A client's share of a pooled step's examples; all of them where every institution has hardware of its own."""
    if _said(document, "federation", "budget_match") == "time":
        return STEP_EXAMPLES
    partition = _said(document, "data", "partition")
    clients = _said(document, "federation", "clients_per_round") or _of(partition, "clients")
    least = 2 if _objective(document) in OBJECTIVES.those("needs_several") else 1
    return max(least, round(STEP_EXAMPLES / clients)) if isinstance(clients, int) and clients > 0 else max(least, 2)


def _objective(document: Mapping[str, Any]) -> Any:
    return name_of(_said(document, "training", "objective"))


def _put(document: Mapping[str, Any], values: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    result = dict(document)
    for (section, key), value in values.items():
        inner = result.get(section, {})
        if not isinstance(inner, Mapping | BaseModel) or _said(result, section, key) is not None:
            continue
        given = dict(inner) if isinstance(inner, Mapping) else inner.model_dump(exclude_unset=True)
        result[section] = {**given, key: value}
    return result


def _said(document: Mapping[str, Any], section: str, key: str) -> Any:
    """What a document says of a key; None where it leaves it open."""
    return _of(document.get(section), key)


def _of(section: Any, key: str) -> Any:
    if isinstance(section, Mapping):
        return section.get(key)
    if isinstance(section, BaseModel):
        return getattr(section, key) if key in section.model_fields_set else None
    return None
