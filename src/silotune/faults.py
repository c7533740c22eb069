"""Says what in the sections of a configuration does not go together, one line a fault."""

from __future__ import annotations

import itertools

from silotune.sections import AdapterSection, EvaluationSection, FederationSection, TrainingSection

LORA_KINDS = ("lora", "qlora")
PRODUCT_RULES = ("exact-residual", "stack", "svd")
"""LoRA rules that put the mean product itself into the model."""
WHOLE_RULES = ("factors", "sb")
"""LoRA rules under which everything that trains travels in every round."""
RANK_TABLES = ("ranks", "memory_mb", "policies")
"""Keys that give clients LoRA ranks of their own."""
CONTROLLED = ("scaffold", "feddyn")
"""Algorithms whose clients keep a control of every trained tensor."""
PRODUCT_ALGORITHMS = ("fedavg", "fedprox")
"""Algorithms whose aggregate is the mean and whose server step adds it as it is."""


def is_lora_aware(federation: FederationSection) -> bool:
    """Whether clients do not all send the whole adapter at its rank, to be averaged factor by factor."""
    return federation.lora != "factors" or federation.has_ranks or federation.personalization != "none"


def lora_faults(
    adapter: AdapterSection,
    federation: FederationSection,
    *,
    training: TrainingSection,
    evaluation: EvaluationSection,
    is_mixture: bool,
) -> list[str]:
    """What a rule for LoRA's factors, ranks by client and models of the clients' own do not go together with."""
    rule = f"federation.lora = {federation.lora!r}"
    faults = []
    if adapter.kind not in LORA_KINDS or adapter.dora:
        given = "adapter.dora = true" if adapter.kind in LORA_KINDS else f"adapter.kind = {adapter.kind!r}"
        asked = [rule] if federation.lora != "factors" else []
        asked += [f"federation.{table}" for table in RANK_TABLES if getattr(federation, table)]
        faults += [f"{what} needs adapter.kind = 'lora' or 'qlora' without dora, not {given}" for what in asked]
    faults += [
        f"federation.ranks: {name!r} = {rank} exceeds adapter.rank = {adapter.rank}, which is the largest"
        for name, rank in federation.ranks.items()
        if rank > adapter.rank
    ]
    faults += _product_faults(federation, training) if federation.lora in PRODUCT_RULES else []
    if federation.algorithm in CONTROLLED and federation.lora not in WHOLE_RULES:
        faults.append(
            f"federation.algorithm = {federation.algorithm!r} keeps a control for all that is trained, which goes with "
            f"federation.lora = {' or '.join(map(repr, WHOLE_RULES))} alone, not {federation.lora!r}"
        )
    faults += [
        f"{name!r} stands in federation.{first} and in federation.{second}: keep one"
        for first, second in itertools.combinations(RANK_TABLES, 2)
        for name in getattr(federation, first)
        if name in getattr(federation, second)
    ]
    if federation.lora == "sb" and federation.has_ranks:
        faults.append(f"{rule} trains one matrix R of adapter.rank at every client: no ranks by client")
    if is_mixture and (federation.lora == "share-a" or federation.personalization != "none"):
        faults.append("models of the clients' own (federation.personalization, 'share-a') are for one task, no mixture")
    if federation.lora == "share-a":
        if federation.personalization != "none":
            faults.append(f"{rule} gives every client a model of its own already: leave federation.personalization out")
        if evaluation.patience is not None or evaluation.keep == "best":
            faults.append(
                f"{rule} has no global model to select by: leave evaluation.patience out and evaluation.keep at 'last'"
            )
    return faults


def _product_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What a rule that puts the mean product into the model does not go together with."""
    rule = f"federation.lora = {federation.lora!r}"
    faults = []
    is_mean = federation.aggregation == "mean" and federation.server_learning_rate == 1
    if federation.algorithm not in PRODUCT_ALGORITHMS or not is_mean:
        faults.append(
            f"{rule} keeps the mean of the clients' products: it needs federation.algorithm = "
            f"{' or '.join(map(repr, PRODUCT_ALGORITHMS))}, federation.aggregation = 'mean' and "
            "federation.server_learning_rate = 1"
        )
    if federation.personalization == "ditto":
        faults.append(
            f"federation.personalization = 'ditto' pulls to the factors received, and {rule} changes them meanwhile: "
            "use 'fine-tune'"
        )
    if training.optimizer_state == "keep":
        faults.append(f"{rule} gives clients other factors each round: use training.optimizer_state = 'reset'")
    return faults
