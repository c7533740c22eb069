"""What in the sections of a configuration does not go together, one line a fault, and why."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from silotune.settings.adapters import AdapterSettings, Lora
from silotune.settings.algorithms import ALGORITHMS
from silotune.settings.attacks import Malicious
from silotune.settings.guarantees import ByClient, Guarantee
from silotune.settings.links import DownloadSection
from silotune.settings.lora_rules import LORA_RULES
from silotune.settings.objectives import OBJECTIVES, Dpo
from silotune.settings.protections import SecureSum
from silotune.settings.sections import (
    DataSection,
    Engine,
    EvaluationSection,
    FederationSection,
    PrivacySection,
    RecordSection,
    TrainingSection,
)

RANK_TABLES = ("ranks", "memory_mb", "policies")
"""Keys that give clients LoRA ranks of their own."""


def is_lora_aware(federation: FederationSection) -> bool:
    """Whether clients do not all send the whole adapter at its rank, to be averaged factor by factor."""
    return not federation.lora.is_plain or federation.has_ranks or federation.personalization.makes_models


def lora_faults(
    adapter: AdapterSettings,
    federation: FederationSection,
    *,
    training: TrainingSection,
    evaluation: EvaluationSection,
    is_mixture: bool,
) -> list[str]:
    """What a rule for LoRA's factors, ranks by client and models of the clients' own do not go together with."""
    rule = f"federation.lora = {federation.lora.type!r}"
    faults = []
    if not adapter.has_factors:
        given = "adapter.dora = true" if isinstance(adapter, Lora) else f"adapter.type = {adapter.type!r}"
        asked = [] if federation.lora.is_plain else [rule]
        asked += [f"federation.{table}" for table in RANK_TABLES if getattr(federation, table)]
        faults += [f"{what} needs adapter.type = 'lora' or 'qlora' without dora, not {given}" for what in asked]
    faults += [
        f"federation.ranks: {name!r} = {rank} exceeds adapter.rank = {adapter.rank}, which is the largest"
        for name, rank in federation.ranks.items()
        if isinstance(adapter, Lora) and rank > adapter.rank
    ]
    faults += _product_faults(federation, training) if federation.lora.keeps_product else []
    if federation.algorithm.keeps_control and not federation.lora.sends_all:
        faults.append(
            f"federation.algorithm = {federation.algorithm.type!r} keeps a control for all that is trained, which goes "
            f"with federation.lora = {' or '.join(map(repr, LORA_RULES.those('sends_all')))} alone, not "
            f"{federation.lora.type!r}"
        )
    faults += [
        f"{name!r} stands in federation.{first} and in federation.{second}: keep one"
        for first, second in itertools.combinations(RANK_TABLES, 2)
        for name in getattr(federation, first)
        if name in getattr(federation, second)
    ]
    if federation.lora.has_core and federation.has_ranks:
        faults.append(f"{rule} trains one matrix R of adapter.rank at every client: no ranks by client")
    if is_mixture and (federation.lora.keeps_own_b or federation.personalization.makes_models):
        faults.append("models of the clients' own (federation.personalization, 'share-a') are for one task, no mixture")
    if federation.lora.keeps_own_b:
        if federation.personalization.makes_models:
            faults.append(f"{rule} gives every client a model of its own already: leave federation.personalization out")
        if evaluation.patience is not None or evaluation.keep == "best":
            faults.append(
                f"{rule} has no global model to select by: leave evaluation.patience out and evaluation.keep at 'last'"
            )
    return faults


def _product_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What a rule that puts the mean product into the model does not go together with."""
    rule = f"federation.lora = {federation.lora.type!r}"
    faults = []
    is_mean = federation.aggregation.is_mean and federation.algorithm.server_learning_rate == 1
    if not federation.algorithm.keeps_product or not is_mean:
        faults.append(
            f"{rule} keeps the mean of the clients' products: it needs federation.algorithm = "
            f"{' or '.join(map(repr, ALGORITHMS.those('keeps_product')))}, federation.aggregation = 'mean' and "
            "federation.algorithm.server_learning_rate = 1"
        )
    if federation.personalization.is_pulled:
        faults.append(
            f"federation.personalization = {federation.personalization.type!r} pulls to the factors received, and "
            f"{rule} changes them meanwhile: use 'fine-tune'"
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
    given, faults = f"training.objective = {training.objective.type!r}", []
    if training.objective.has_head and evaluation.scoring == "generation":
        faults.append(f"{given} writes no text and cannot use evaluation.scoring = 'generation'")
    if training.objective.has_head and evaluation.forgetting:
        faults.append(f"{given} writes no text: leave evaluation.forgetting out")
    return faults


def objective_faults(training: TrainingSection, adapter: AdapterSettings, evaluation: EvaluationSection) -> list[str]:
    """What does not go together with pairs of answers, with packing, or with an adapter to begin from."""
    faults, objective = [], training.objective
    if objective.compares and adapter.is_whole:
        faults.append(
            f"training.objective = {objective.type!r} compares with the model that training began with, which "
            f"adapter.type = {adapter.type!r} does not keep"
        )
    if objective.compares and evaluation.scoring == "generation":
        faults.append("evaluation.scoring = 'generation' is for options; pairs of answers are scored by likelihood")
    if objective.needs_several and training.batch_size == 1:
        faults.append(
            f"training.objective = {objective.type!r} compares the examples of a batch: training.batch_size needs 2 or "
            "more"
        )
    if isinstance(objective, Dpo) and objective.preference_loss == "ipo" and objective.label_smoothing:
        faults.append("training.objective.label_smoothing is for preference_loss = 'sigmoid' or 'robust'")
    return faults


def algorithm_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What an algorithm presumes of the local steps: SCAFFOLD and FedNova are derived for plain ones."""
    algorithm, given = federation.algorithm, f"federation.algorithm = {federation.algorithm.type!r}"
    faults = []
    if algorithm.needs_plain_steps and not training.optimizer.is_plain:
        faults.append(
            f"{given} divides an update by steps and learning rate, which holds for plain steps only: set "
            f"training.optimizer = 'sgd' (now {training.optimizer.type!r})"
        )
    if algorithm.needs_no_momentum and training.optimizer.keeps_momentum:
        faults.append(f"{given} needs training.optimizer.momentum = 0")
    if algorithm.sends_gradient and training.clip_norm:
        faults.append(
            "federation.algorithm.option = 'I' takes a whole gradient for its control, and steps that are clipped "
            f"never meet it: set training.clip_norm = 0 (now {training.clip_norm:g}), or take option 'II'"
        )
    if algorithm.trusted and not federation.aggregation.is_mean:
        faults.append(
            f"{given} sends {algorithm.trusted}, from which federation.aggregation = "
            f"{federation.aggregation.type!r} does not protect: use 'mean', or another algorithm"
        )
    return faults


def rule_faults(federation: FederationSection, num_clients: int | None) -> list[str]:
    """What weighting, rule and attack need; ``num_clients`` where it is known before the data."""
    faults = []
    in_round = federation.clients_per_round or num_clients
    rule, weighting = federation.aggregation, federation.weighting
    if rule.counts_once and not weighting.is_by_examples and weighting.needs_sizes:
        faults.append(
            f"federation.aggregation = {rule.type!r} counts every update once: federation.weighting = "
            f"{weighting.type!r} would do nothing; leave it out"
        )
    if in_round is not None and in_round < rule.least_updates:
        faults.append(
            f"federation.aggregation = {rule.type!r} with these settings needs at least {rule.least_updates} clients a "
            f"round, there are {in_round}"
        )
    attack = federation.attack
    if isinstance(attack, Malicious) and num_clients is not None and attack.clients >= num_clients:
        faults.append(f"federation.attack.clients = {attack.clients} leaves no honest one of {num_clients} clients")
    return faults


def unused_faults(data: DataSection, federation: FederationSection) -> list[str]:
    """What would be left aside without a word: settings of another choice than the one made."""
    faults = []
    if data.definition is not None and data.task not in ("custom", "mixture"):
        faults.append("data.definition is for data.task = 'custom'")
    for where, section in (
        ("data.partition", data.partition),
        ("federation.upload", federation.upload),
        ("federation.download", federation.download),
    ):
        for key, (choice, names) in type(section).depends.items():
            value, chosen = getattr(section, key), getattr(section, choice)
            if chosen not in names and value != type(section).model_fields[key].default:
                allowed = " or ".join(map(repr, names))
                faults.append(f"{where}.{key} is for {where}.{choice} = {allowed} (now {chosen!r})")
    return faults


def privacy_faults(
    privacy: PrivacySection,
    federation: FederationSection,
    training: TrainingSection,
    evaluation: EvaluationSection,
    record: RecordSection,
) -> list[str]:
    """Combinations under which a guarantee could not be given, or a setting would do nothing."""
    dp = privacy.dp
    if not isinstance(dp, Guarantee):
        return []
    faults = []
    given = f"privacy.dp = {dp.type!r}"
    if dp.epsilon is None and dp.noise_multiplier is None:
        faults.append(f"{given} needs privacy.dp.epsilon, privacy.dp.noise_multiplier or both")
    if evaluation.per_client:
        faults.append("evaluation.per_client releases exact figures on private examples: leave it out with privacy.dp")
    if federation.weighting.needs_loss:
        faults.append(
            f"federation.weighting = {federation.weighting.type!r} needs losses, which clients withhold "
            "under privacy.dp"
        )
    if federation.budget.joules is not None and not dp.report_costs:
        faults.append("federation.budget.joules needs joules, which clients withhold under privacy.dp: report_costs")
    if dp.is_on_sum and not dp.is_in_shares and record.keep_updates:
        faults.append(f"record.keep_updates proves sums that noise changes: leave it out with {given}")
    if is_linked(federation):
        faults.append(
            f"{given} is accounted for updates as they are, of whole rounds: leave "
            "federation.upload, federation.download and federation.clock out"
        )
    faults += _lora_faults(privacy, federation)
    faults += _example_faults(federation, training) if dp.is_by_example else _client_faults(privacy, federation)
    return faults


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
    upload, rule = federation.upload, f"federation.lora = {federation.lora.type!r}"
    faults = []
    if federation.lora.moves and (upload.keep != "all" or upload.values == "sign"):
        what = f"keep = {upload.keep!r}" if upload.keep != "all" else f"values = {upload.values!r}"
        faults.append(
            f"federation.upload.{what} sends later what it leaves out, and {rule} has other factors by then: take "
            "keep = 'all' with int8, int4, bfloat16 or float16"
        )
    if federation.download != DownloadSection() and (federation.has_ranks or federation.lora.grows):
        given = "federation.ranks, memory_mb and policies send" if federation.has_ranks else f"{rule} sends"
        faults.append(f"{given} down what has no one shape: leave federation.download out")
    is_dated = federation.lora.moves or federation.lora.grows
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
        if federation.algorithm.is_of_whole_updates:
            faults.append(
                f"federation.algorithm = {federation.algorithm.type!r} sums whole updates, and federation.clock.buffer "
                "weighs them by age: leave the buffer out, or use another algorithm"
            )
        if known and clock.buffer > known:
            faults.append(f"federation.clock.buffer = {clock.buffer} exceeds data.partition.clients = {known}")
    return faults


def _lora_faults(privacy: PrivacySection, federation: FederationSection) -> list[str]:
    """What reads single updates past the noise, or hands out models that no noise protects."""
    given, faults = f"privacy.dp = {privacy.dp.type!r}", []
    if not federation.lora.goes_with_noise:
        faults.append(
            f"federation.lora = {federation.lora.type!r} needs more of a client than a noised update, and cannot be "
            f"used with {given}; those that can: {', '.join(map(repr, LORA_RULES.those('goes_with_noise')))}"
        )
    if federation.personalization.makes_models or federation.has_ranks:
        faults.append(f"{given} covers one global model: leave personalization, ranks, memory_mb and policies out")
    return faults


def _example_faults(federation: FederationSection, training: TrainingSection) -> list[str]:
    """What would let examples reach the server past the noise of their steps."""
    faults = []
    if not training.objective.is_by_example:
        faults.append(
            f"training.objective = {training.objective.type!r} mixes examples, or cuts one into several, and cannot be "
            f"used with privacy.dp = 'example'; those that can: {', '.join(OBJECTIVES.those('is_by_example'))}"
        )
    if training.objective.packs:
        faults.append("training.objective.packing puts examples into one row: leave it out with privacy.dp = 'example'")
    if federation.algorithm.sends_gradient:
        faults.append(
            "federation.algorithm.option = 'I' sends an exact gradient: with privacy.dp = 'example' take 'II'"
        )
    return faults


def _client_faults(privacy: PrivacySection, federation: FederationSection) -> list[str]:
    """What protects whole institutions: one release a round, whose sensitivity is known."""
    given, faults = f"privacy.dp = {privacy.dp.type!r}", []
    if set(federation.modes) != {"federated"}:
        faults.append(f"{given} protects institutions from each other: federation.modes = ['federated']")
    if not federation.algorithm.linear:
        faults.append(
            f"federation.algorithm = {federation.algorithm.type!r} cannot be used with {given}; those that learn "
            f"nothing but the updates' mean: {', '.join(ALGORITHMS.those('linear'))}"
        )
    dp = privacy.dp
    if not dp.is_on_sum:
        return faults
    if not dp.is_in_shares and privacy.protection.is_sum:
        faults.append(
            f"{given} clips single updates, which privacy.protection = {privacy.protection.type!r} hides; "
            "privacy.dp = 'distributed' noises secure sums"
        )
    masks = privacy.protection if isinstance(privacy.protection, SecureSum) else None
    if dp.is_in_shares and masks is None:
        faults.append(
            f"{given} noises sums that nobody sees the parts of: set privacy.protection = 'secure_sum' "
            f"(now {privacy.protection.type!r})"
        )
    if dp.is_in_shares and masks is not None and masks.ring_bits < 32:
        faults.append(
            f"{given} needs room for the noise: privacy.protection.ring_bits = 32 or 64 (now {masks.ring_bits})"
        )
    if federation.weighting.largest is None or not federation.aggregation.is_mean:
        faults.append(
            f"{given} adds noise to a mean in which no client weighs more than a known share: set "
            "federation.weighting = 'uniform' or 'capped', and federation.aggregation = 'mean'"
        )
    is_drawn = isinstance(dp, ByClient) and dp.client_sampling == "poisson"
    if is_drawn and federation.clients_per_round is None:
        faults.append(
            "privacy.dp.client_sampling = 'poisson' needs federation.clients_per_round, the mean of its draws"
        )
    return faults


Way = Literal[Engine, "sites"]
"""How clients are reached: an engine, or ``silotune submit`` to sites that are elsewhere."""


class Asked(Protocol):
    """The sections of a run that the table looks at."""

    @property
    def adapter(self) -> AdapterSettings: ...
    @property
    def data(self) -> DataSection: ...
    @property
    def training(self) -> TrainingSection: ...
    @property
    def federation(self) -> FederationSection: ...
    @property
    def privacy(self) -> PrivacySection: ...


@dataclass(frozen=True)
class Limit:
    """Something that a run may ask for, where it cannot be done, and why.

    Attributes:
        what: The settings, as they are written.
        ways: Where it cannot be done.
        why: In one line, with what to do.
        is_asked: Whether a run asks for it.
    """

    what: str
    ways: tuple[Way, ...]
    why: str
    is_asked: Callable[[Asked], bool]


def limits(way: Way, run: Asked) -> list[str]:
    """What of a run cannot be done this way, one line each."""
    return [f"{limit.what}: {limit.why}" for limit in LIMITS if way in limit.ways and limit.is_asked(run)]


def _has_simulated_pace(run: Asked) -> bool:
    """Whether a clock is set for more than how a round ends."""
    clock = run.federation.clock
    if clock is None:
        return False
    plain = type(clock)(over_sampling=clock.over_sampling, deadline_seconds=clock.deadline_seconds)
    return clock != plain


def _needs_start_at_sites(run: Asked) -> bool:
    is_kept = run.federation.lora.needs_start or run.training.objective.compares
    return run.adapter.begins_from is not None and is_kept


LIMITS: tuple[Limit, ...] = (
    Limit(
        "federation.modes",
        ("sites",),
        "must name 'federated' to be submitted: sites' examples are not pooled",
        lambda run: "federated" not in run.federation.modes,
    ),
    Limit(
        "federation.attack",
        ("ray", "sites"),
        "attacks are simulated in one process: leave it out, or use 'silotune run' with engine = 'in_process'",
        lambda run: isinstance(run.federation.attack, Malicious),
    ),
    Limit(
        "federation.clock",
        ("ray",),
        "a clock is simulated in one process: leave it out, or use engine = 'in_process'",
        lambda run: run.federation.clock is not None,
    ),
    Limit(
        "federation.clock",
        ("sites",),
        "sites take real time: of this section only over_sampling and deadline_seconds, which is real seconds here",
        _has_simulated_pace,
    ),
    Limit(
        "federation.personalization, or lora = 'share-a'",
        ("ray", "sites"),
        "a client's own model stays where it is trained, and is not scored there: use 'silotune run' with engine = "
        "'in_process'",
        lambda run: run.federation.personalization.makes_models or run.federation.lora.keeps_own_b,
    ),
    Limit(
        "privacy.protection",
        ("ray",),
        "the secrets of a sum lie in one process's memory, and Ray's actors share their clients: use engine = "
        "'in_process'",
        lambda run: run.privacy.protection.is_sum,
    ),
    Limit(
        "federation.policies",
        ("sites",),
        "the sites' policies are at the sites: give federation.ranks or memory_mb",
        lambda run: bool(run.federation.policies),
    ),
    Limit(
        "privacy.dp.ledger",
        ("sites",),
        "every site keeps a ledger of its own over all runs: leave it out",
        lambda run: run.privacy.ledger is not None,
    ),
    Limit(
        "federation.weighting = 'capped' with privacy.dp = 'client'",
        ("sites",),
        "the noise depends on the sites' numbers of examples, which are known only when they reply: use 'uniform'",
        lambda run: isinstance(run.privacy.dp, ByClient) and run.federation.weighting.needs_sizes,
    ),
    Limit(
        "adapter.start",
        ("sites",),
        "sites get it as the first round's model, and keep no copy, which training.objective = 'dpo' or 'kto' and "
        "every federation.lora but 'factors' need: use 'silotune run'",
        _needs_start_at_sites,
    ),
)
"""Everything that one process does and another way does not."""
