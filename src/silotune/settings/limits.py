"""Says what in the sections of a configuration does not go together, one line a fault."""

from __future__ import annotations

import itertools

from silotune.settings.sections import (
    UNWEIGHTED,
    AdapterSection,
    DataSection,
    EvaluationSection,
    FederationSection,
    TrainingSection,
)

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


def mixture_faults(data: DataSection, evaluation: EvaluationSection) -> list[str]:
    """What a mixture of tasks cannot have."""
    if data.task != "mixture":
        return ["data.mixture needs data.task = 'mixture'"] if data.mixture else []
    faults = []
    if data.partition.scheme == "file" or any((data.train, data.validation, data.test)):
        faults.append("data.task = 'mixture' takes files from the tasks' folders under data.root only")
    if data.prompt is not None or data.definition is not None:
        faults.append("data.task = 'mixture' takes tasks as they are, without data.prompt and data.definition")
    if evaluation.per_client:
        faults.append("evaluation.per_client is for one task; a mixture has results per task (by_task)")
    return faults


def classify_faults(training: TrainingSection, evaluation: EvaluationSection) -> list[str]:
    """What does not go together with a classification head, or needs one."""
    if training.objective != "classify":
        is_default = training.wording == "auto"
        return [] if is_default else [f"training.wording = {training.wording!r} needs training.objective = 'classify'"]
    faults = []
    if evaluation.scoring == "generation":
        faults.append("training.objective = 'classify' writes no text and cannot use evaluation.scoring = 'generation'")
    if evaluation.forgetting:
        faults.append("training.objective = 'classify' writes no text: leave evaluation.forgetting out")
    return faults


def objective_faults(training: TrainingSection, adapter: AdapterSection, evaluation: EvaluationSection) -> list[str]:
    """What does not go together with pairs of answers, with packing, or with an adapter to begin from."""
    faults, objective = [], training.objective
    compares = objective in ("dpo", "kto")
    if compares and adapter.kind == "none":
        faults.append(
            f"training.objective = {objective!r} compares with the model that training began with, which "
            "adapter.kind = 'none' does not keep"
        )
    if compares and evaluation.scoring == "generation":
        faults.append("evaluation.scoring = 'generation' is for options; pairs of answers are scored by likelihood")
    if objective == "kto" and training.batch_size == 1:
        faults.append(
            "training.objective = 'kto' compares the examples of a batch: training.batch_size needs 2 or more"
        )
    if training.preference_loss == "ipo" and training.label_smoothing:
        faults.append("training.label_smoothing is for training.preference_loss = 'sigmoid' or 'robust'")
    if training.packing and objective not in ("sft", "pretrain"):
        faults.append("training.packing is for training.objective = 'sft' or 'pretrain'")
    if adapter.start is not None and adapter.kind == "none":
        faults.append("adapter.start needs an adapter: with adapter.kind = 'none' give the model as model.name")
    return faults


def algorithm_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What an algorithm presumes of the local steps: SCAFFOLD and FedNova are derived for plain ones."""
    name = federation.algorithm
    faults = []
    if name == "scaffold" and training.optimizer != "sgd":
        faults.append(
            f"federation.algorithm = 'scaffold' divides an update by steps and learning rate, which holds for plain "
            f"steps only: set training.optimizer = 'sgd' (now {training.optimizer!r})"
        )
    if name in ("scaffold", "fednova") and training.optimizer == "sgd" and training.momentum:
        faults.append(f"federation.algorithm = {name!r} needs training.momentum = 0 (now {training.momentum:g})")
    if name == "scaffold" and federation.scaffold_option == "I" and training.clip_norm:
        faults.append(
            "federation.scaffold_option = 'I' takes a whole gradient for its control, and steps that are clipped never "
            f"meet it: set training.clip_norm = 0 (now {training.clip_norm:g}), or take option 'II'"
        )
    trusted = {"scaffold": "controls", "fednova": "numbers of steps"}
    if name in trusted and federation.aggregation != "mean":
        faults.append(
            f"federation.algorithm = {name!r} sends {trusted[name]}, from which federation.aggregation = "
            f"{federation.aggregation!r} does not protect: use 'mean', or another algorithm"
        )
    return faults


def rule_faults(federation: FederationSection, num_clients: int | None) -> list[str]:
    """What weighting, rule and attack need; ``num_clients`` where it is known before the data."""
    faults = []
    in_round = federation.clients_per_round or num_clients
    rule, weighting = federation.aggregation, federation.weighting
    if weighting == "capped" and federation.weight_cap is None:
        faults.append("federation.weighting = 'capped' needs federation.weight_cap, the most examples that count")
    if rule in UNWEIGHTED and weighting in ("q-ffl", "capped"):
        faults.append(
            f"federation.aggregation = {rule!r} counts every update once: federation.weighting = {weighting!r} "
            "would do nothing; leave it out"
        )
    least = 2 * federation.malicious + 3
    if rule in ("krum", "multi-krum") and in_round is not None and in_round < least:
        faults.append(
            f"federation.aggregation = {rule!r} with federation.malicious = {federation.malicious} needs at least "
            f"{least} clients a round, there are {in_round}"
        )
    attack = federation.attack
    if attack.kind != "none" and num_clients is not None and attack.clients >= num_clients:
        faults.append(f"federation.attack.clients = {attack.clients} leaves no honest one of {num_clients} clients")
    return faults


def unused_faults(data: DataSection, adapter: AdapterSection, training: TrainingSection) -> list[str]:
    """What would be left aside without a word: settings of another choice than the one made."""
    kind, definition = adapter.kind, data.definition is not None and data.task not in ("custom", "mixture")
    unused = {
        "data.definition is for data.task = 'custom'": definition,
        "data.partition.files is for data.partition.scheme = 'file'": bool(data.partition.files)
        and data.partition.scheme != "file",
        f"adapter.dora is for adapter.kind = 'lora' or 'qlora' (now {kind!r})": adapter.dora and kind not in LORA_KINDS,
        f"adapter.rslora is for adapter.kind = 'lora' or 'qlora' (now {kind!r})": adapter.rslora
        and kind not in LORA_KINDS,
        f"training.momentum is for training.optimizer = 'sgd' (now {training.optimizer!r})": bool(training.momentum)
        and training.optimizer != "sgd",
    }
    return [why for why, is_given in unused.items() if is_given]
