"""Settings that do not go together: with a guarantee of privacy, a compressed link or a simulated clock."""

from __future__ import annotations

from collections.abc import Mapping

from silotune.settings.limits import PRODUCT_RULES
from silotune.settings.links import DownloadSection
from silotune.settings.sections import (
    BY_EXAMPLE,
    LINEAR,
    EvaluationSection,
    FederationSection,
    PrivacySection,
    RecordSection,
    TrainingSection,
)

MOVING_RULES = ("stack", "svd", "alternate")
"""LoRA rules under which the same name stands for other factors in the next round, or for none."""
RESIDUAL_RULES = ("exact-residual", "stack")
"""LoRA rules whose model grows."""


def privacy_faults(
    privacy: PrivacySection,
    federation: FederationSection,
    training: TrainingSection,
    evaluation: EvaluationSection,
    record: RecordSection,
) -> list[str]:
    """Combinations under which a guarantee could not be given, or a setting would do nothing."""
    faults = _unused_faults(privacy)
    if privacy.dp == "none":
        return faults
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
    if is_linked(federation):
        faults.append(
            f"privacy.dp = {privacy.dp!r} is accounted for updates as they are, of whole rounds: leave "
            "federation.upload, federation.download and federation.clock out"
        )
    if privacy.dp != "client" and (privacy.clipping != "fixed" or privacy.client_sampling != "fixed"):
        faults.append("privacy.clipping and privacy.client_sampling are of privacy.dp = 'client' alone")
    faults += _lora_faults(privacy, federation)
    faults += _example_faults(federation, training) if privacy.dp == "example" else _client_faults(privacy, federation)
    return faults


_OF_GUARANTEE = (
    "epsilon", "noise_multiplier", "ledger", "delta", "clip_norm", "accountant", "colluding", "clipping",
    "clip_quantile", "clip_learning_rate", "client_sampling", "report_costs",
)  # fmt: skip
_OF_PROTECTION: Mapping[str, tuple[str, ...]] = {
    "threshold": ("secure_sum",),
    "ring_bits": ("secure_sum",),
    "max_examples": ("secure_sum",),
    "bound": ("secure_sum", "he"),
    "he_scheme": ("he",),
    "he_packing": ("he",),
    "he_fraction": ("he",),
}
"""Keys that say something of these protections alone."""


def _unused_faults(privacy: PrivacySection) -> list[str]:
    """Settings that would do nothing: who gives one believes in a protection that is not there."""
    faults = []
    for key in _OF_GUARANTEE:
        if privacy.dp == "none" and _is_given(privacy, key):
            faults.append(
                f"privacy.{key} = {getattr(privacy, key)!r} needs a guarantee: privacy.dp = 'example', for one"
            )
    for key, kinds in _OF_PROTECTION.items():
        if privacy.protection not in kinds and _is_given(privacy, key):
            asked = " or ".join(map(repr, kinds))
            faults.append(f"privacy.{key} = {getattr(privacy, key)!r} is for privacy.protection = {asked}")
    if privacy.dp not in ("none", "distributed") and _is_given(privacy, "colluding"):
        faults.append(f"privacy.colluding = {privacy.colluding} is for privacy.dp = 'distributed'")
    return faults


def _is_given(privacy: PrivacySection, key: str) -> bool:
    return bool(getattr(privacy, key) != type(privacy).model_fields[key].default)


def is_linked(federation: FederationSection) -> bool:
    """Whether anything is compressed on its way, or a simulated clock runs."""
    plain = FederationSection()
    return (federation.upload, federation.download, federation.clock) != (plain.upload, plain.download, plain.clock)


def link_faults(federation: FederationSection) -> list[str]:
    """What cannot be sent: a sparse or signed model instead of a change of it, and packed parts of an adapter."""
    download, faults = federation.download, []
    faults += _rule_link_faults(federation)
    if download.delta or (download.keep == "all" and download.values != "sign"):
        return faults
    which = f"keep = {download.keep!r}" if download.keep != "all" else f"values = {download.values!r}"
    faults.append(
        f"federation.download.{which} leaves too little of a whole model: set federation.download.delta = true"
    )
    return faults


def _rule_link_faults(federation: FederationSection) -> list[str]:
    """Links that a rule for LoRA's factors, or ranks by client, cannot be put on."""
    upload, rule = federation.upload, f"federation.lora = {federation.lora!r}"
    faults = []
    if federation.lora in MOVING_RULES and (upload.keep != "all" or upload.values == "sign"):
        what = f"keep = {upload.keep!r}" if upload.keep != "all" else f"values = {upload.values!r}"
        faults.append(
            f"federation.upload.{what} sends later what it leaves out, and {rule} has other factors by then: take "
            "keep = 'all' with int8, int4, bfloat16 or float16"
        )
    if federation.download != DownloadSection() and (federation.has_ranks or federation.lora in RESIDUAL_RULES):
        given = "federation.ranks, memory_mb and policies send" if federation.has_ranks else f"{rule} sends"
        faults.append(f"{given} down what has no one shape: leave federation.download out")
    is_dated = federation.lora in (*MOVING_RULES, "exact-residual")
    if is_dated and federation.clock is not None and federation.clock.buffer is not None:
        faults.append(
            f"federation.clock.buffer takes late updates, which with {rule} are of other factors than the model's"
        )
    return faults


def clock_faults(federation: FederationSection, known: int | None, *, keeps_updates: bool) -> list[str]:
    """What a simulated clock needs of the rest; ``known`` is the number of clients, where the section says it."""
    clock = federation.clock
    faults = []
    if clock is not None and clock.over_sampling > 1 and federation.clients_per_round is None:
        faults.append("federation.clock.over_sampling needs federation.clients_per_round: how many replies count")
    if clock is not None and clock.buffer is not None:
        if federation.download.delta:
            faults.append(
                "federation.clock.buffer lets clients hold different models: set federation.download.delta = false"
            )
        if keeps_updates:
            faults.append(
                "federation.clock.buffer weighs updates by their age, which nobody can do again from the audit trail: "
                "set record.keep_updates = false"
            )
        if federation.algorithm == "feddyn":
            faults.append(
                "federation.algorithm = 'feddyn' sums whole updates, and federation.clock.buffer weighs them by age: "
                "leave the buffer out, or use another algorithm"
            )
        if known and clock.buffer > known:
            faults.append(f"federation.clock.buffer = {clock.buffer} exceeds data.partition.clients = {known}")
    return faults


def _lora_faults(privacy: PrivacySection, federation: FederationSection) -> list[str]:
    """What reads single updates past the noise, or hands out models that no noise protects."""
    given, faults = f"privacy.dp = {privacy.dp!r}", []
    if federation.lora in (*PRODUCT_RULES, "share-a"):
        faults.append(
            f"federation.lora = {federation.lora!r} needs more of a client than a noised update, and cannot be used "
            f"with {given}; those that can: 'factors', 'freeze-a', 'alternate', 'sb'"
        )
    if federation.personalization != "none" or federation.has_ranks:
        faults.append(f"{given} covers one global model: leave personalization, ranks, memory_mb and policies out")
    return faults


def _example_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What would let examples reach the server past the noise of their steps."""
    faults = []
    if training.objective not in BY_EXAMPLE:
        faults.append(
            f"training.objective = {training.objective!r} mixes examples, or cuts one into several, and cannot be "
            f"used with privacy.dp = 'example'; those that can: {', '.join(BY_EXAMPLE)}"
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
    if privacy.dp == "client" and privacy.protection != "none":
        faults.append(
            f"{given} clips single updates, which privacy.protection = {privacy.protection!r} hides; "
            "privacy.dp = 'distributed' noises secure sums"
        )
    if privacy.dp == "distributed" and privacy.protection != "secure_sum":
        faults.append(
            f"{given} noises sums that nobody sees the parts of: set privacy.protection = 'secure_sum' "
            f"(now {privacy.protection!r})"
        )
    if privacy.dp == "distributed" and privacy.ring_bits < 32:
        faults.append(f"{given} needs room for the noise: privacy.ring_bits = 32 or 64 (now {privacy.ring_bits})")
    if federation.weighting not in ("uniform", "capped") or federation.aggregation != "mean":
        faults.append(
            f"{given} adds noise to a mean in which no client weighs more than a known share: set "
            "federation.weighting = 'uniform' or 'capped', and federation.aggregation = 'mean'"
        )
    if privacy.client_sampling == "poisson" and federation.clients_per_round is None:
        faults.append("privacy.client_sampling = 'poisson' needs federation.clients_per_round, the mean of its draws")
    return faults
