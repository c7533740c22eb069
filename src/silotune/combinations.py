"""Settings of different sections that do not go together under a guarantee of privacy, one line each."""

from __future__ import annotations

from silotune.faults import PRODUCT_RULES
from silotune.sections import (
    BY_EXAMPLE,
    LINEAR,
    EvaluationSection,
    FederationSection,
    PrivacySection,
    RecordSection,
    TrainingSection,
)


def privacy_faults(
    privacy: PrivacySection,
    federation: FederationSection,
    training: TrainingSection,
    evaluation: EvaluationSection,
    record: RecordSection,
) -> list[str]:
    """Combinations under which a guarantee could not be given, or a setting would do nothing."""
    if privacy.dp == "none":
        return [
            f"privacy.{key} = {getattr(privacy, key)!r} needs privacy.dp = 'example', 'client' or 'local'"
            for key in ("epsilon", "noise_multiplier", "ledger")
            if getattr(privacy, key) is not None
        ]
    faults = []
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        faults.append(f"privacy.dp = {privacy.dp!r} needs privacy.epsilon, privacy.noise_multiplier or both")
    if evaluation.per_client:
        faults.append("evaluation.per_client releases exact figures on private examples: leave it out with privacy.dp")
    if federation.weighting == "q-ffl":
        faults.append("federation.weighting = 'q-ffl' needs losses, which clients withhold under privacy.dp")
    if federation.budget.joules is not None and not privacy.report_costs:
        faults.append("federation.budget.joules needs joules, which clients withhold under privacy.dp: report_costs")
    if privacy.dp == "client" and record.keep_updates:
        faults.append("record.keep_updates proves sums that noise changes: leave it out with privacy.dp = 'client'")
    if privacy.dp != "client" and (privacy.clipping != "fixed" or privacy.client_sampling != "fixed"):
        faults.append("privacy.clipping and privacy.client_sampling are of privacy.dp = 'client' alone")
    faults += _lora_faults(privacy, federation)
    faults += _example_faults(federation, training) if privacy.dp == "example" else _client_faults(privacy, federation)
    return faults


def _lora_faults(privacy: PrivacySection, federation: FederationSection) -> list[str]:
    """What reads single updates past the noise, or hands out models that no noise protects."""
    given, faults = f"privacy.dp = {privacy.dp!r}", []
    if federation.lora in (*PRODUCT_RULES, "share-a"):
        faults.append(
            f"federation.lora = {federation.lora!r} needs more of a client than a noised update, and cannot be used "
            f"with {given}; those that can: 'factors', 'freeze-a', 'alternate', 'sb'"
        )
    if federation.personalization != "none" or federation.ranks or federation.memory_mb:
        faults.append(f"{given} covers one global model: leave personalization, ranks and memory_mb out")
    return faults


def _example_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What would let examples reach the server past the noise of their steps."""
    faults = []
    if training.objective not in BY_EXAMPLE:
        faults.append(
            f"training.objective = {training.objective!r} mixes examples and cannot be used with "
            f"privacy.dp = 'example'; those that can: {', '.join(BY_EXAMPLE)}"
        )
    if training.packing:
        faults.append("training.packing puts examples into one row: leave it out with privacy.dp = 'example'")
    if federation.algorithm == "scaffold" and federation.scaffold_option == "I":
        faults.append("federation.scaffold_option = 'I' sends an exact gradient: with privacy.dp = 'example' take 'II'")
    return faults


def _client_faults(privacy: PrivacySection, federation: FederationSection) -> list[str]:
    """What protects whole institutions: one release a round, whose sensitivity is known."""
    given, faults = f"privacy.dp = {privacy.dp!r}", []
    if set(federation.modes) != {"federated"}:
        faults.append(f"{given} protects institutions from each other: federation.modes = ['federated']")
    if federation.algorithm not in LINEAR:
        faults.append(
            f"federation.algorithm = {federation.algorithm!r} cannot be used with {given}; those that learn nothing "
            f"but the updates' mean: {', '.join(LINEAR)}"
        )
    if privacy.dp == "local":
        return faults
    if privacy.protection != "none":
        faults.append(f"{given} clips single updates, which privacy.protection = {privacy.protection!r} hides")
    if federation.weighting not in ("uniform", "capped") or federation.aggregation != "mean":
        faults.append(
            f"{given} adds noise to a mean in which no client weighs more than a known share: set "
            "federation.weighting = 'uniform' or 'capped', and federation.aggregation = 'mean'"
        )
    if privacy.client_sampling == "poisson" and federation.clients_per_round is None:
        faults.append("privacy.client_sampling = 'poisson' needs federation.clients_per_round, the mean of its draws")
    return faults
