"""What in the sections of a configuration does not go together, and why: one table for all of it.

``docs/limits.md`` shows the same table. A row is a condition over traits of the choices made, not over their names, so
that a choice of a plug-in stands in it, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from silotune.settings.adapters import Lora
from silotune.settings.algorithms import ALGORITHMS
from silotune.settings.attacks import Malicious
from silotune.settings.base import Section
from silotune.settings.links import DownloadSection
from silotune.settings.lora_rules import LORA_RULES
from silotune.settings.objectives import OBJECTIVES, ClosedSettings, Dpo
from silotune.settings.presets import FEWEST_STEPS, STEPS
from silotune.settings.privacy import ByClient, Guarantee, SecureSum, SumSettings
from silotune.settings.registry import Table
from silotune.settings.sections import Engine, EvaluationSection, FederationSection, Sections

RANK_TABLES = ("ranks", "memory_mb", "policies")
"""Keys that give clients LoRA ranks of their own."""

Way = Literal[Engine, "sites"]
"""How clients are reached: an engine, or ``silotune submit`` to sites that are elsewhere."""


SECTIONS = tuple(name for name in Sections.model_fields if name != "seed")


def _once(run: Sections) -> Iterable[Mapping[str, object]]:
    return ({},)


@dataclass(frozen=True)
class Limit:
    """Something that a run may ask for and cannot have.

    Attributes:
        says: In one line what was asked, why it cannot be, and what to do. Names in braces are values of the run, as in
            ``{training.clip_norm}``, or of a case.
        when: Whether a run asks for it.
        ways: Where it cannot be done; empty for a limit that holds everywhere.
        cases: The times that a run asks for it, each with the names that are said of it.
    """

    says: str
    when: Callable[[Sections], bool] = lambda run: True
    ways: tuple[Way, ...] = ()
    cases: Callable[[Sections], Iterable[Mapping[str, object]]] = _once


def faults(run: Sections, *subjects: str) -> list[str]:
    """What of a run does not go together, one line each, whatever runs it; all subjects of the table by default."""
    rows = (limit for subject in subjects or LIMITS for limit in LIMITS[subject] if not limit.ways)
    return [line for limit in rows for line in _lines(limit, run)]


def limits(way: Way, run: Sections) -> list[str]:
    """What of a run cannot be done this way, one line each."""
    rows = (limit for subject in LIMITS.values() for limit in subject if way in limit.ways)
    return [line for limit in rows for line in _lines(limit, run)]


def _lines(limit: Limit, run: Sections) -> Iterator[str]:
    if limit.when(run):
        sections = {name: getattr(run, name) for name in SECTIONS}
        for case in limit.cases(run):
            yield limit.says.format(**sections, **case)


def _is_adjusted(run: Sections) -> bool:
    objective = run.training.objective
    return isinstance(objective, ClosedSettings) and objective.logit_adjustment > 0


def is_linked(federation: FederationSection) -> bool:
    """Whether anything is compressed on its way, or a simulated clock runs."""
    plain = FederationSection()
    return (federation.upload, federation.download, federation.clock) != (plain.upload, plain.download, plain.clock)


def _known(run: Sections) -> int | None:
    """The number of clients, where it is known before the data."""
    partition = run.data.partition
    return partition.clients if partition.scheme in ("iid", "dirichlet", "quantity") else None


def _in_round(run: Sections) -> int | None:
    """The number of clients of a round, where it is known before the data."""
    return run.federation.clients_per_round or _known(run)


def _clients(run: Sections) -> Iterable[Mapping[str, object]]:
    return ({"clients": _in_round(run)},)


def _exceeds_known(number: int | None, run: Sections) -> bool:
    known = _known(run)
    return number is not None and known is not None and number > known


def _named(trait: str, table: Table[Any], *, word: str = ", ") -> str:
    return word.join(map(repr, table.those(trait)))


def _without_factors(run: Sections) -> Iterator[Mapping[str, object]]:
    """What is asked of LoRA's factors, and the adapter that has none."""
    adapter, federation = run.adapter, run.federation
    given = "adapter.dora = true" if isinstance(adapter, Lora) else f"adapter.type = {adapter.type!r}"
    asked = [] if federation.lora.is_plain else [f"federation.lora = {federation.lora.type!r}"]
    asked += [f"federation.{table}" for table in RANK_TABLES if getattr(federation, table)]
    return ({"what": what, "given": given} for what in asked)


def _ranks_above(run: Sections) -> Iterator[Mapping[str, object]]:
    if isinstance(run.adapter, Lora):
        for name, rank in run.federation.ranks.items():
            if rank > run.adapter.rank:
                yield {"name": name, "rank": rank}


def _names_twice(run: Sections) -> Iterator[Mapping[str, object]]:
    for first, second in itertools.combinations(RANK_TABLES, 2):
        for name in getattr(run.federation, first):
            if name in getattr(run.federation, second):
                yield {"name": name, "first": first, "second": second}


def _unused(run: Sections) -> Iterator[Mapping[str, object]]:
    """Settings of another choice than the one made, by what sections say of their keys."""
    for name in SECTIONS:
        yield from _unused_in(getattr(run, name), name)


def _unused_in(section: Section, where: str) -> Iterator[Mapping[str, object]]:
    kind = type(section)
    for key, needs in kind.depends.items():
        value, chosen = getattr(section, key), getattr(section, needs.key)
        if not needs.is_met(chosen) and value != kind.model_fields[key].get_default(call_default_factory=True):
            yield {"what": f"{where}.{key}", "why": needs.told(where, chosen)}
    for key in kind.model_fields:
        if isinstance(inner := getattr(section, key), Section):
            yield from _unused_in(inner, f"{where}.{key}")


def _promised(test: Callable[[Sections, Guarantee], bool]) -> Callable[[Sections], bool]:
    """Whether there is a guarantee, and the test holds of it."""
    return lambda run: isinstance(run.privacy.dp, Guarantee) and test(run, run.privacy.dp)


def _summed(test: Callable[[Sections, SumSettings], bool]) -> Callable[[Sections], bool]:
    """Whether the coordinator sees sums alone, and the test holds of them."""
    return lambda run: isinstance(run.privacy.protection, SumSettings) and test(run, run.privacy.protection)


def _is_buffered(run: Sections) -> bool:
    return run.federation.clock is not None and run.federation.clock.buffer is not None


def _is_mixture(run: Sections) -> bool:
    return run.data.task == "mixture"


def _of_selection(run: Sections) -> Iterator[Mapping[str, object]]:
    plain = EvaluationSection()
    return (
        {"key": key} for key in ("selection", "select_every") if getattr(run.evaluation, key) != getattr(plain, key)
    )


def _has_simulated_pace(run: Sections) -> bool:
    """Whether a clock is set for more than how a round ends."""
    clock = run.federation.clock
    if clock is None:
        return False
    plain = type(clock)(over_sampling=clock.over_sampling, deadline_seconds=clock.deadline_seconds)
    return clock != plain


def _is_split(run: Sections) -> bool:
    return run.federation.split is not None


def _trains_server_alone(run: Sections) -> bool:
    """Whether one part of the compute server's is all that trains."""
    split = run.federation.split
    return split is not None and split.train == "server" and split.schedule != "hierarchical"


def _is_fedavg(run: Sections) -> bool:
    algorithm = run.federation.algorithm
    return algorithm.type == "fedavg" and algorithm.server_learning_rate == 1


_NOT_SPLIT: tuple[tuple[str, str, Callable[[Sections], bool]], ...] = (
    ("federation.lora", "leave it at 'factors'", lambda run: not run.federation.lora.is_plain),
    ("federation.ranks, memory_mb or policies", "leave them out", lambda run: run.federation.has_ranks),
    (
        "federation.personalization",
        "leave it at 'none'",
        lambda run: run.federation.personalization.makes_models,
    ),
    (
        "federation.algorithm",
        "use one that corrects no gradients, such as 'fedavg' or 'fedadam'",
        lambda run: not run.federation.algorithm.is_of_server_alone,
    ),
    (
        "federation.upload, download or clock",
        "leave it out; federation.split.compress is for what crosses the cut",
        lambda run: is_linked(run.federation),
    ),
    ("federation.attack", "leave it out", lambda run: isinstance(run.federation.attack, Malicious)),
    ("training.optimizer_state = 'keep'", "take 'reset'", lambda run: run.training.optimizer_state == "keep"),
    ("record.keep_updates", "leave it out", lambda run: run.record.keep_updates),
    ("evaluation.per_client", "leave it out", lambda run: run.evaluation.per_client),
    (
        "model.gradient_checkpointing",
        "leave it out: what a party does not have, it does not hold in memory",
        lambda run: run.model.gradient_checkpointing,
    ),
)
"""What cannot be done in split training, what to do instead, and whether a run asks for it."""


def _not_split(run: Sections) -> Iterable[Mapping[str, object]]:
    return [{"what": what, "why": instead} for what, instead, is_asked in _NOT_SPLIT if is_asked(run)]


_RULE = "federation.lora = {federation.lora.type!r}"
_ALGORITHM = "federation.algorithm = {federation.algorithm.type!r}"
_AGGREGATION = "federation.aggregation = {federation.aggregation.type!r}"
_WEIGHTING = "federation.weighting = {federation.weighting.type!r}"
_OBJECTIVE = "training.objective = {training.objective.type!r}"
_PERSONAL = "federation.personalization = {federation.personalization.type!r}"
_DP = "privacy.dp = {privacy.dp.type!r}"
_PROTECTION = "privacy.protection = {privacy.protection.type!r}"
_SEES = f"{_PROTECTION} shows the coordinator a sum weighted by examples alone"

_MODEL_AND_DATA = (
    Limit(
        "adapter.type = {adapter.type!r} needs model.precision = 'int4'",
        lambda run: run.adapter.needs_int4 and run.model.precision != "int4",
    ),
    Limit(
        "adapter.type = {adapter.type!r} trains all weights and cannot use model.precision = 'int4'",
        lambda run: run.adapter.is_whole and run.model.precision == "int4",
    ),
    Limit(
        "data.partition.scheme = 'file' needs [data.partition.files]: client name = path",
        lambda run: run.data.partition.scheme == "file" and not run.data.partition.files,
    ),
    Limit(
        "federation.clients_per_round = {federation.clients_per_round} exceeds data.partition.clients = "
        "{data.partition.clients}",
        lambda run: _exceeds_known(run.federation.clients_per_round, run),
    ),
    Limit(
        "data.task = 'custom' needs a section [data.definition]",
        lambda run: run.data.task == "custom" and run.data.definition is None,
    ),
    Limit(
        "data.prompt is for known tasks; one of your own has data.definition.prompt",
        lambda run: run.data.task == "custom" and run.data.prompt is not None,
    ),
    Limit(
        "data.definition is for data.task = 'custom'",
        lambda run: run.data.definition is not None and run.data.task not in ("custom", "mixture"),
    ),
    Limit("{what} {why}", cases=_unused),
    Limit(
        "evaluation.{key}: nothing is decided by the selection set: set evaluation.patience, evaluation.target or "
        "evaluation.keep = 'best', or leave it out",
        lambda run: not run.evaluation.selects,
        cases=_of_selection,
    ),
    Limit(
        "data.mixture needs data.task = 'mixture'",
        lambda run: bool(run.data.mixture) and not _is_mixture(run),
    ),
    Limit(
        "data.task = 'mixture' takes files from the tasks' folders under data.root only",
        lambda run: (
            _is_mixture(run)
            and (run.data.partition.scheme == "file" or any((run.data.train, run.data.validation, run.data.test)))
        ),
    ),
    Limit(
        "data.task = 'mixture' takes tasks as they are, without data.prompt and data.definition",
        lambda run: _is_mixture(run) and (run.data.prompt is not None or run.data.definition is not None),
    ),
    Limit(
        "data.shorten names columns of one task's prompt; a mixture has several: leave it out",
        lambda run: _is_mixture(run) and bool(run.data.shorten),
    ),
    Limit(
        f"{_OBJECTIVE} reads plain text to its end: data.truncate would do nothing; leave it out",
        lambda run: run.training.objective.learns_from == ("document",) and run.data.truncate != "left",
    ),
    Limit(
        "evaluation.per_client is for one task; a mixture has results per task (by_task)",
        lambda run: _is_mixture(run) and run.evaluation.per_client,
    ),
)

_OBJECTIVES = (
    Limit(
        f"{_OBJECTIVE} writes no text and cannot use evaluation.scoring = 'generation'",
        lambda run: run.training.objective.has_head and run.evaluation.scoring == "generation",
    ),
    Limit(
        f"{_OBJECTIVE} writes no text: leave evaluation.forgetting out",
        lambda run: run.training.objective.has_head and bool(run.evaluation.forgetting),
    ),
    Limit(
        f"{_OBJECTIVE} compares with the model that training began with, which adapter.type = {{adapter.type!r}} does "
        "not keep",
        lambda run: run.training.objective.compares and run.adapter.is_whole,
    ),
    Limit(
        "evaluation.scoring = 'generation' is for options; pairs of answers are scored by likelihood",
        lambda run: run.training.objective.compares and run.evaluation.scoring == "generation",
    ),
    Limit(
        f"{_OBJECTIVE} compares the examples of a batch: training.batch_size needs 2 or more",
        lambda run: run.training.objective.needs_several and run.training.batch_size == 1,
    ),
    Limit(
        "training.objective.label_smoothing is for preference_loss = 'sigmoid' or 'robust'",
        lambda run: (
            isinstance(run.training.objective, Dpo)
            and run.training.objective.preference_loss == "ipo"
            and bool(run.training.objective.label_smoothing)
        ),
    ),
)

_METHOD = (
    Limit(
        f"{_ALGORITHM} divides an update by steps and learning rate, which holds for plain steps only: set "
        "training.optimizer = 'sgd' (now {training.optimizer.type!r})",
        lambda run: run.federation.algorithm.needs_plain_steps and not run.training.optimizer.is_plain,
    ),
    Limit(
        f"{_ALGORITHM} needs training.optimizer.momentum = 0",
        lambda run: run.federation.algorithm.needs_no_momentum and run.training.optimizer.keeps_momentum,
    ),
    Limit(
        "federation.algorithm.option = 'I' takes a whole gradient for its control, and steps that are clipped never "
        "meet it: set training.clip_norm = 0 (now {training.clip_norm:g}), or take option 'II'",
        lambda run: run.federation.algorithm.sends_gradient and bool(run.training.clip_norm),
    ),
    Limit(
        f"federation.preset = 'auto' takes one step a round, and {{federation.rounds}} steps learn no more than the "
        f"commonest answer: set federation.rounds to {FEWEST_STEPS} or more, or leave it out ({STEPS})",
        lambda run: (
            run.federation.preset == "auto"
            and run.federation.algorithm.shares_step
            and run.federation.rounds < FEWEST_STEPS
        ),
    ),
    Limit(
        f"{_ALGORITHM} shares one step of the optimiser a round among its clients: set training.max_steps = 1",
        lambda run: run.federation.algorithm.shares_step and run.training.max_steps != 1,
    ),
    Limit(
        f"{_ALGORITHM} shares one step of the optimiser a round, taken at once: leave federation.clock.buffer out",
        lambda run: run.federation.algorithm.shares_step and _is_buffered(run),
    ),
    Limit(
        f"{_ALGORITHM} has the server take the step, whose moments are its own: leave training.optimizer_state out",
        lambda run: run.federation.algorithm.shares_step and run.training.optimizer_state == "keep",
    ),
    Limit(
        f"{_ALGORITHM} sends {{federation.algorithm.trusted}}, from which {_AGGREGATION} does not protect: use "
        "'mean', or another algorithm",
        lambda run: bool(run.federation.algorithm.trusted) and not run.federation.aggregation.is_mean,
    ),
    Limit(
        f"{_ALGORITHM} sums whole updates, as its clients do, and {_AGGREGATION} leaves out or shortens some: the run "
        "would settle where its start leads it, away from any optimum, with updates of zero: use 'mean', or another "
        "algorithm",
        lambda run: run.federation.algorithm.is_of_whole_updates and not run.federation.aggregation.is_mean,
    ),
    Limit(
        f"{_ALGORITHM} adds up what its clients keep, by weights that stay, and {_WEIGHTING} changes them with the "
        "loss: use 'examples', 'uniform' or 'capped', or another algorithm",
        lambda run: run.federation.algorithm.keeps_control and run.federation.weighting.needs_loss,
    ),
    Limit(
        f"{_AGGREGATION} counts every update once: {_WEIGHTING} would do nothing; leave it out",
        lambda run: (
            run.federation.aggregation.counts_once
            and run.federation.weighting.needs_sizes
            and not run.federation.weighting.is_by_examples
        ),
    ),
    Limit(
        f"{_AGGREGATION} with these settings needs at least {{federation.aggregation.least_updates}} clients a round, "
        "there are {clients}",
        lambda run: (clients := _in_round(run)) is not None and clients < run.federation.aggregation.least_updates,
        cases=_clients,
    ),
    Limit(
        "federation.attack.clients = {federation.attack.clients} leaves no honest one of {data.partition.clients} "
        "clients",
        lambda run: (
            isinstance(run.federation.attack, Malicious)
            and (known := _known(run)) is not None
            and run.federation.attack.clients >= known
        ),
    ),
    Limit(
        "federation.modes must name at least one mode, each once",
        lambda run: not run.federation.modes or len(set(run.federation.modes)) != len(run.federation.modes),
    ),
)

_FACTORS = (
    Limit(
        "{what} needs adapter.type = 'lora' or 'qlora' without dora, not {given}",
        lambda run: not run.adapter.has_factors,
        cases=_without_factors,
    ),
    Limit(
        "federation.ranks: {name!r} = {rank} exceeds adapter.rank = {adapter.rank}, which is the largest",
        cases=_ranks_above,
    ),
    Limit(
        f"{_RULE} keeps the mean of the clients' products: it needs federation.algorithm = "
        f"{_named('keeps_product', ALGORITHMS, word=' or ')}, federation.aggregation = 'mean' and "
        "federation.algorithm.server_learning_rate = 1",
        lambda run: (
            run.federation.lora.keeps_product
            and not (
                run.federation.algorithm.keeps_product
                and run.federation.aggregation.is_mean
                and run.federation.algorithm.server_learning_rate == 1
            )
        ),
    ),
    Limit(
        f"{_PERSONAL} pulls to the factors received, and {_RULE} changes them meanwhile: use 'fine-tune'",
        lambda run: run.federation.lora.keeps_product and run.federation.personalization.is_pulled,
    ),
    Limit(
        f"{_RULE} gives clients other factors each round: use training.optimizer_state = 'reset'",
        lambda run: run.federation.lora.keeps_product and run.training.optimizer_state == "keep",
    ),
    Limit(
        f"{_ALGORITHM} keeps a control for all that is trained, which goes with federation.lora = "
        f"{_named('sends_all', LORA_RULES, word=' or ')} alone, not {{federation.lora.type!r}}",
        lambda run: run.federation.algorithm.keeps_control and not run.federation.lora.sends_all,
    ),
    Limit("{name!r} stands in federation.{first} and in federation.{second}: keep one", cases=_names_twice),
    Limit(
        f"{_RULE} trains one matrix R of adapter.rank at every client: no ranks by client",
        lambda run: run.federation.lora.has_core and run.federation.has_ranks,
    ),
    Limit(
        "models of the clients' own (federation.personalization, 'share-a') are for one task, no mixture",
        lambda run: (
            _is_mixture(run) and (run.federation.lora.keeps_own_b or run.federation.personalization.makes_models)
        ),
    ),
    Limit(
        f"{_RULE} gives every client a model of its own already: leave federation.personalization out",
        lambda run: run.federation.lora.keeps_own_b and run.federation.personalization.makes_models,
    ),
    Limit(
        f"{_RULE} has no global model to select by: leave evaluation.patience out and evaluation.keep at 'last'",
        lambda run: (
            run.federation.lora.keeps_own_b and (run.evaluation.patience is not None or run.evaluation.keep == "best")
        ),
    ),
)

_LINKS = (
    Limit(
        "federation.upload.keep = {federation.upload.keep!r} sends later what it leaves out, and "
        f"{_RULE} has other factors by then: take keep = 'all' with int8, int4, bfloat16 or float16",
        lambda run: run.federation.lora.moves and run.federation.upload.keep != "all",
    ),
    Limit(
        "federation.upload.values = {federation.upload.values!r} sends later what it leaves out, and "
        f"{_RULE} has other factors by then: take keep = 'all' with int8, int4, bfloat16 or float16",
        lambda run: (
            run.federation.lora.moves and run.federation.upload.keep == "all" and run.federation.upload.values == "sign"
        ),
    ),
    Limit(
        "federation.ranks, memory_mb and policies send down what has no one shape: leave federation.download out",
        lambda run: run.federation.has_ranks and run.federation.download != DownloadSection(),
    ),
    Limit(
        f"{_RULE} sends down what has no one shape: leave federation.download out",
        lambda run: (
            run.federation.lora.grows and not run.federation.has_ranks and run.federation.download != DownloadSection()
        ),
    ),
    Limit(
        f"federation.clock.buffer takes late updates, which with {_RULE} are of other factors than the model's",
        lambda run: _is_buffered(run) and (run.federation.lora.moves or run.federation.lora.grows),
    ),
    Limit(
        "federation.download.keep = {federation.download.keep!r} leaves too little of a whole model: set "
        "federation.download.delta = true",
        lambda run: run.federation.download.keep != "all" and not run.federation.download.delta,
    ),
    Limit(
        "federation.download.values = 'sign' leaves too little of a whole model: set federation.download.delta = true",
        lambda run: (
            run.federation.download.values == "sign"
            and run.federation.download.keep == "all"
            and not run.federation.download.delta
        ),
    ),
    Limit(
        "federation.clock.over_sampling needs federation.clients_per_round: how many replies count",
        lambda run: (
            run.federation.clock is not None
            and run.federation.clock.over_sampling > 1
            and run.federation.clients_per_round is None
        ),
    ),
    Limit(
        "federation.clock.buffer lets clients hold different models: set federation.download.delta = false",
        lambda run: _is_buffered(run) and run.federation.download.delta,
    ),
    Limit(
        "federation.clock.buffer weighs updates by their age, which nobody can do again from the audit trail: set "
        "record.keep_updates = false",
        lambda run: _is_buffered(run) and run.record.keep_updates,
    ),
    Limit(
        f"{_ALGORITHM} sums whole updates, and federation.clock.buffer weighs them by age: leave the buffer out, or "
        "use another algorithm",
        lambda run: _is_buffered(run) and run.federation.algorithm.is_of_whole_updates,
    ),
    Limit(
        "federation.clock.buffer = {federation.clock.buffer} exceeds data.partition.clients = {data.partition.clients}",
        lambda run: run.federation.clock is not None and _exceeds_known(run.federation.clock.buffer, run),
    ),
)

_AUDITS = (
    Limit(
        "audit.leakage attacks what institutions sent: add 'federated' to federation.modes",
        lambda run: run.audit.leakage and "federated" not in run.federation.modes,
    ),
    Limit(
        "audit.leakage needs the models of all rounds, which are kept beside the trail: set record.audit = true",
        lambda run: run.audit.leakage and not run.record.audit,
    ),
    Limit(
        f"privacy.canaries needs a loss of every example by itself, and {_OBJECTIVE} has none; those that have: "
        f"{', '.join(OBJECTIVES.those('is_by_example'))}",
        lambda run: run.privacy.canaries > 0 and not run.training.objective.is_by_example,
    ),
    Limit(
        f"privacy.canaries gives an example another answer, and {_OBJECTIVE} compares two: leave it out",
        lambda run: run.privacy.canaries > 0 and run.training.objective.learns_from == ("preference",),
    ),
)

_GUARANTEES = (
    Limit(
        f"{_DP} needs privacy.dp.epsilon, privacy.dp.noise_multiplier or both",
        _promised(lambda run, dp: dp.epsilon is None and dp.noise_multiplier is None),
    ),
    Limit(
        "evaluation.per_client releases exact figures on private examples: leave it out with privacy.dp",
        _promised(lambda run, dp: run.evaluation.per_client),
    ),
    Limit(
        f"{_WEIGHTING} needs losses, which clients withhold under privacy.dp",
        _promised(lambda run, dp: run.federation.weighting.needs_loss),
    ),
    Limit(
        "federation.budget.joules needs joules, which clients withhold under privacy.dp: report_costs",
        _promised(lambda run, dp: run.federation.budget.joules is not None and not dp.report_costs),
    ),
    Limit(
        f"record.keep_updates proves sums that noise changes: leave it out with {_DP}",
        _promised(lambda run, dp: dp.is_on_sum and not dp.is_in_shares and run.record.keep_updates),
    ),
    Limit(
        f"{_DP} is accounted for updates as they are, of whole rounds: leave federation.upload, federation.download "
        "and federation.clock out",
        _promised(lambda run, dp: is_linked(run.federation)),
    ),
    Limit(
        f"{_RULE} needs more of a client than a noised update, and cannot be used with {_DP}; those that can: "
        + _named("goes_with_noise", LORA_RULES),
        _promised(lambda run, dp: not run.federation.lora.goes_with_noise),
    ),
    Limit(
        f"{_DP} covers one global model: leave personalization, ranks, memory_mb and policies out",
        _promised(lambda run, dp: run.federation.personalization.makes_models or run.federation.has_ranks),
    ),
    Limit(
        f"{_OBJECTIVE} mixes examples, or cuts one into several, and cannot be used with privacy.dp = 'example'; "
        f"those that can: {', '.join(OBJECTIVES.those('is_by_example'))}",
        _promised(lambda run, dp: dp.is_by_example and not run.training.objective.is_by_example),
    ),
    Limit(
        "training.objective.packing puts examples into one row: leave it out with privacy.dp = 'example'",
        _promised(lambda run, dp: dp.is_by_example and run.training.objective.packs),
    ),
    Limit(
        "training.objective.logit_adjustment lets every example's loss depend on all the client's answers: leave it "
        "out with privacy.dp = 'example'",
        _promised(lambda run, dp: dp.is_by_example and _is_adjusted(run)),
    ),
    Limit(
        "federation.algorithm.option = 'I' sends an exact gradient: with privacy.dp = 'example' take 'II'",
        _promised(lambda run, dp: dp.is_by_example and run.federation.algorithm.sends_gradient),
    ),
    Limit(
        f"{_DP} protects institutions from each other: federation.modes = ['federated']",
        _promised(lambda run, dp: not dp.is_by_example and set(run.federation.modes) != {"federated"}),
    ),
    Limit(
        f"{_ALGORITHM} cannot be used with {_DP}; those that learn nothing but the updates' mean: "
        f"{', '.join(ALGORITHMS.those('linear'))}",
        _promised(lambda run, dp: not dp.is_by_example and not run.federation.algorithm.linear),
    ),
    Limit(
        f"{_DP} clips single updates, which {_PROTECTION} hides; privacy.dp = 'distributed' noises secure sums",
        _promised(lambda run, dp: dp.is_on_sum and not dp.is_in_shares and run.privacy.protection.is_sum),
    ),
    Limit(
        f"{_DP} noises sums that nobody sees the parts of: set privacy.protection = 'secure_sum' (now "
        "{privacy.protection.type!r})",
        _promised(lambda run, dp: dp.is_in_shares and not isinstance(run.privacy.protection, SecureSum)),
    ),
    Limit(
        f"{_DP} needs room for the noise: privacy.protection.ring_bits = 32 or 64 (now "
        "{privacy.protection.ring_bits})",
        _promised(
            lambda run, dp: (
                dp.is_in_shares
                and isinstance(run.privacy.protection, SecureSum)
                and run.privacy.protection.ring_bits < 32
            )
        ),
    ),
    Limit(
        f"{_DP} adds noise to a mean in which no client weighs more than a known share: set federation.weighting = "
        "'uniform' or 'capped', and federation.aggregation = 'mean'",
        _promised(
            lambda run, dp: (
                dp.is_on_sum and (run.federation.weighting.largest is None or not run.federation.aggregation.is_mean)
            )
        ),
    ),
    Limit(
        "privacy.dp.client_sampling = 'poisson' needs federation.clients_per_round, the mean of its draws",
        _promised(
            lambda run, dp: (
                isinstance(dp, ByClient)
                and dp.client_sampling == "poisson"
                and run.federation.clients_per_round is None
            )
        ),
    ),
)

_PROTECTIONS = (
    Limit(
        f"{_SEES}, and {_ALGORITHM} needs more; it works with {', '.join(ALGORITHMS.those('summable'))}",
        _summed(lambda run, protection: not run.federation.algorithm.summable),
    ),
    Limit(
        f"{_SEES}: {_AGGREGATION} looks at single updates; use 'mean'",
        _summed(lambda run, protection: not run.federation.aggregation.is_mean),
    ),
    Limit(
        f"{_PROTECTION} hides the updates that record.keep_updates would keep: leave it out",
        _summed(lambda run, protection: run.record.keep_updates),
    ),
    Limit(
        f"{_SEES}: {_WEIGHTING} is another weighting; use 'examples'",
        _summed(
            lambda run, protection: not run.federation.weighting.is_by_examples and not run.privacy.dp.is_in_shares
        ),
    ),
    Limit(
        f"{_PROTECTION} hides updates, which federation.attack = {{federation.attack.type!r}} changes: leave one of "
        "them out",
        _summed(
            lambda run, protection: (
                isinstance(run.federation.attack, Malicious) and run.federation.attack.changes_updates
            )
        ),
    ),
    Limit(
        f"{_SEES}: {_RULE} needs each client's product",
        _summed(lambda run, protection: run.federation.lora.keeps_product),
    ),
    Limit(
        f"{_SEES}: federation.ranks, memory_mb and policies give updates different shapes",
        _summed(lambda run, protection: run.federation.has_ranks),
    ),
    Limit(
        f"{_SEES}: {_PERSONAL} reports by client",
        _summed(lambda run, protection: run.federation.personalization.comes_after),
    ),
    Limit(
        f"{_PROTECTION} hides each client's figures, which evaluation.per_client asks for: turn one of them off",
        _summed(lambda run, protection: run.evaluation.per_client),
    ),
    Limit(
        f"{_PROTECTION} sends sums in a form of its own: leave federation.upload, federation.download and "
        "federation.clock out; privacy.protection.ring_bits = 16 takes half the bytes",
        _summed(lambda run, protection: is_linked(run.federation)),
    ),
    Limit(
        f"{_PROTECTION} opens no sum of fewer than privacy.protection.least_clients = "
        "{privacy.protection.least_clients}: a round has {clients} clients",
        _summed(lambda run, protection: (clients := _in_round(run)) is not None and clients < protection.least_clients),
        cases=_clients,
    ),
)

_SPLIT = (
    Limit(
        "federation.split trains the federated mode alone: name 'federated' in federation.modes",
        lambda run: _is_split(run) and "federated" not in run.federation.modes,
    ),
    Limit(
        "federation.split cuts an adapter between clients and the compute server, and adapter.type = {adapter.type!r} "
        "is none: take 'lora' or 'ia3'",
        lambda run: _is_split(run) and run.adapter.is_whole,
    ),
    Limit(
        "federation.split: the two parts of a quantised base cannot be told apart: set model.precision = 'float32' or "
        "'bfloat16'",
        lambda run: _is_split(run) and run.model.precision == "int4",
    ),
    Limit(
        f"{_OBJECTIVE} compares with the model that training began with, whose middle a client of federation.split "
        "has not: use 'sft', 'choice', 'classify' or 'pretrain'",
        lambda run: _is_split(run) and run.training.objective.compares,
    ),
    Limit(
        f"federation.split.train = 'server' would leave the head of {_OBJECTIVE}, which is the clients', as it was "
        "drawn: set federation.split.train = 'both'",
        lambda run: (
            run.federation.split is not None
            and run.federation.split.train == "server"
            and run.training.objective.has_head
        ),
    ),
    Limit(
        "federation.split averages the clients' own tensors plainly, and {what} changes what is averaged or what "
        "trains: {why}",
        _is_split,
        cases=_not_split,
    ),
    Limit(
        "federation.split.schedule = {federation.split.schedule!r} trains one part of the server's, which is not an "
        f"average: {_ALGORITHM} would move the clients' part alone; use 'fedavg' with server_learning_rate = 1, or "
        "schedule = 'hierarchical'",
        lambda run: (
            run.federation.split is not None and run.federation.split.schedule != "hierarchical" and not _is_fedavg(run)
        ),
    ),
    Limit(
        f"{_DP} needs the gradient or update of the whole model at one party, which federation.split parts: leave one "
        "of them out",
        lambda run: _is_split(run) and run.privacy.dp.is_promised,
    ),
    Limit(
        f"{_PROTECTION} hides whole updates, and with federation.split a part of each is at the compute server: leave "
        "one of them out",
        lambda run: _is_split(run) and run.privacy.protection.is_sum,
    ),
    Limit(
        "federation.split.train = 'server' with schedule = {federation.split.schedule!r} has no clients' tensors to "
        f"average: {_AGGREGATION} would do nothing; leave it at 'mean'",
        lambda run: _trains_server_alone(run) and not run.federation.aggregation.is_mean,
    ),
    Limit(
        "federation.split: clients and compute server are in one process so far: use 'silotune run' with "
        "federation.engine = 'in_process'",
        _is_split,
        ("ray", "sites"),
    ),
)

_WAYS = (
    Limit(
        "federation.modes: must name 'federated' to be submitted: sites' examples are not pooled",
        lambda run: "federated" not in run.federation.modes,
        ("sites",),
    ),
    Limit(
        "federation.budget_match = 'time' gives every client the steps of pooled training, and sites' examples are not "
        "pooled: leave it out, and set training.max_steps to what a site is to do in a round",
        lambda run: run.federation.budget_match == "time",
        ("sites",),
    ),
    Limit(
        "federation.attack: attacks are simulated in one process: leave it out, or use 'silotune run' with engine = "
        "'in_process'",
        lambda run: isinstance(run.federation.attack, Malicious),
        ("ray", "sites"),
    ),
    Limit(
        "federation.clock: a clock is simulated in one process: leave it out, or use engine = 'in_process'",
        lambda run: run.federation.clock is not None,
        ("ray",),
    ),
    Limit(
        "federation.clock: sites take real time: of this section only over_sampling and deadline_seconds, which is "
        "real seconds here",
        _has_simulated_pace,
        ("sites",),
    ),
    Limit(
        "federation.personalization, or lora = 'share-a': a client's own model stays where it is trained, and is not "
        "scored there: use 'silotune run' with engine = 'in_process'",
        lambda run: run.federation.personalization.makes_models or run.federation.lora.keeps_own_b,
        ("ray", "sites"),
    ),
    Limit(
        "privacy.protection: the secrets of a sum lie in one process's memory, and Ray's actors share their clients: "
        "use engine = 'in_process'",
        lambda run: run.privacy.protection.is_sum,
        ("ray",),
    ),
    Limit(
        "federation.policies: the sites' policies are at the sites: give federation.ranks or memory_mb",
        lambda run: bool(run.federation.policies),
        ("sites",),
    ),
    Limit(
        "privacy.dp.ledger: every site keeps a ledger of its own over all runs: leave it out",
        lambda run: run.privacy.ledger is not None,
        ("sites",),
    ),
    Limit(
        "federation.weighting = 'capped' with privacy.dp = 'client': the noise depends on the sites' numbers of "
        "examples, which are known only when they reply: use 'uniform'",
        lambda run: isinstance(run.privacy.dp, ByClient) and run.federation.weighting.needs_sizes,
        ("sites",),
    ),
    Limit(
        "adapter.start: sites get it as the first round's model, and keep no copy, which training.objective = 'dpo' or "
        "'kto' and every federation.lora but 'factors' need: use 'silotune run'",
        lambda run: (
            run.adapter.begins_from is not None and (run.federation.lora.needs_start or run.training.objective.compares)
        ),
        ("sites",),
    ),
    Limit(
        "federation.encode: messages to sites are always encoded: leave it out",
        lambda run: not run.federation.encode,
        ("sites",),
    ),
    Limit(
        "federation.workers: every site trains by itself: leave it out",
        lambda run: run.federation.workers is not None,
        ("sites",),
    ),
)

LIMITS: Mapping[str, tuple[Limit, ...]] = {
    "model and data": _MODEL_AND_DATA,
    "links": _LINKS,
    "audits": _AUDITS,
    "guarantees": _GUARANTEES,
    "factors": _FACTORS,
    "objectives": _OBJECTIVES,
    "method": _METHOD,
    "protections": _PROTECTIONS,
    "split": _SPLIT,
    "ways": _WAYS,
}
"""Everything that does not go together, by subject."""
