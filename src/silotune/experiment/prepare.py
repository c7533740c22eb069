"""Loads what all modes of a run share: examples, clients, base model, adapter and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.config import Config
from silotune.data.load import Dataset
from silotune.data.mixture import load_examples, load_scored_examples
from silotune.data.partition import counted_by, deal_alike, dealt_by, digest_of, find_faults, partition, skew
from silotune.data.rows import Task
from silotune.errors import ConfigError, DataError, unknown_choice
from silotune.experiment.budget import matched
from silotune.experiment.examples import check_objective, encoded_apart, notes_of, spread
from silotune.experiment.held_back import HeldBack, hold_back
from silotune.experiment.needs import check_packages
from silotune.experiment.scoring import (
    Forgetting,
    SetScorer,
    closed_labels,
    encoder_for,
    forgetting_of,
    scored_examples,
    scorer_of,
)
from silotune.experiment.start import check_same_function, read_adapter
from silotune.federation.simulation.pace import paces
from silotune.federation.site.policy import read_policy
from silotune.lora import is_of_experts
from silotune.methods.algorithms import method
from silotune.methods.ranks import client_ranks
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.fingerprint import check_memory
from silotune.models.head import Classes
from silotune.models.load import Base, load_base, settled
from silotune.models.split import cut_of
from silotune.models.threads import Threads, threads_of
from silotune.record import environment
from silotune.settings import presets
from silotune.settings.attacks import AttackSettings, Malicious
from silotune.settings.limits import RANK_TABLES
from silotune.settings.lora_rules import LoraRuleSettings
from silotune.settings.sections import FederationSection
from silotune.structs import Example, Tensors
from silotune.training.encode import Encoded
from silotune.training.probe import probed


@dataclass(frozen=True)
class Prepared:
    """What all modes of a run share.

    Attributes:
        config: The run's configuration, with the precision that the machine has, and the steps of its budget.
        task: What the examples are examples of.
        clients: Encoded training examples by client.
        held: What was held back of each client's examples.
        text_bytes: UTF-8 bytes of the clients' examples: what pooling the data would send.
        adapted: The resident model.
        threads: How the run uses its CPU threads.
        initial: Adapter tensors that every mode starts from.
        ranks: LoRA rank by client; those not named have the adapter's.
        gold: Scores on the gold-standard set.
        own_shares: Client -> places of the gold-standard set that are like its training examples.
        selection: Scores on the selection set; None where nothing is selected.
        forgetting: Scores on a general text; None where it is not asked for.
        skew: Examples and labels by client.
        notes: What a reader of results should know.
    """

    config: Config
    task: Task
    clients: Mapping[str, Sequence[Encoded]]
    held: Mapping[str, HeldBack]
    text_bytes: int
    adapted: Adapted
    threads: Threads
    initial: Tensors
    ranks: Mapping[str, int]
    gold: SetScorer
    own_shares: Mapping[str, Sequence[int]]
    selection: SetScorer | None
    forgetting: Forgetting | None
    skew: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of training examples of each client; 0 where they are elsewhere."""
        return {name: len(examples) for name, examples in self.clients.items()}


def prepare(config: Config, *, sites: Sequence[str] | None = None) -> Prepared:
    """Loads data and model and checks that they fit each other; writes nothing.

    Args:
        config: The run's configuration.
        sites: Clients whose examples are elsewhere: no training example is read. None where they are here.

    Raises:
        SilotuneError: Whatever is wrong with data, model or their fit, in one line.
    """
    check_packages(config)
    config = config.model_copy(update={"model": settled(config.model)})
    read = load_examples if sites is None else load_scored_examples
    dataset = read(config.data, seed=config.seed)
    task, train = dataset.task, dataset.splits["train"]
    shares = client_shares(config, dataset) if sites is None else {name: () for name in sites}
    faults = find_faults(train, shares) if train else ()
    by_preset = presets.said(config.federation, config.training)
    notes = [*by_preset, *dataset.notes, *faults, *_attack_notes(config.federation.attack)]
    for each in dataset.tasks or (task,):
        check_objective(config, each)
    if config.federation.clock is not None:
        paces(config.federation.clock, tuple(shares), seed=config.seed)  # an unknown client or a broken trace
    adapted = adapted_of(config, task)
    encoded, places = encoded_apart(encoder_for(config, adapted.base), train)

    settings = config.evaluation
    gold_examples, read_so = scored_examples(config, dataset, settings.gold)
    gold, gold_places, *cut = scorer_of(config, adapted, dataset, gold_examples, name=settings.gold)
    selection = None
    if settings.selects:
        chosen, chosen_so = scored_examples(config, dataset, settings.selection)
        read_so = [*read_so, *(note for note in chosen_so if note not in read_so)]
        selection, _, note = scorer_of(config, adapted, dataset, chosen, name=settings.selection)
        cut.append(note)
    notes.extend(filter(None, [*read_so, *cut, *notes_of(encoded, places, "train", truncate=config.data.truncate)]))
    field = dealt_by(config.data.partition)
    own_shares = deal_alike(gold_examples, train, shares, seed=config.seed, field=field) if train else {}
    if config.federation.split is not None:
        cut_of(adapted, config.federation.split)  # a model that cannot be cut there
    initial = adapters.read(adapted)
    notes.extend(_factor_notes(config.federation, initial))
    notes.extend(filter(None, [*adapted.base.notes, adapted.fast.note]))
    held = {
        name: hold_back(
            _kept(name, [encoded[place] for place in spread(share, places)], share),
            config,
            client=name,
            tokenizer=adapted.base.tokenizer,
            classes=len(adapted.base.labels),
        )
        for name, share in shares.items()
    }
    clients = {name: each.trained for name, each in held.items()}
    notes.extend(_held_notes(held))
    return Prepared(
        config=matched(config, [len(examples) for examples in clients.values()]),
        task=task,
        clients=clients,
        held=held,
        text_bytes=sum(_text_bytes(example) for example in train),
        adapted=adapted,
        threads=threads_of(adapted, config.training.threads),
        initial=initial,
        ranks=_ranks(config, initial),
        gold=gold,
        own_shares={name: spread(share, gold_places) for name, share in own_shares.items()},
        selection=selection,
        forgetting=forgetting_of(config, adapted, initial),
        skew={
            **(skew(train, shares, field=counted_by(config.data.partition, train)) if train else {}),
            "data_sha256": digest_of(dataset.splits, shares),
        },
        notes=tuple(notes),
    )


def adapted_of(config: Config, task: Task) -> Adapted:
    """The base model of a run with its adapter, as training begins with it, on the shortcuts that hold for it.

    Raises:
        SilotuneError: The base or ``adapter.start`` is not found, or they do not fit each other.
    """
    start, rule = config.adapter.begins_from, config.federation.lora
    known = 0 if start is None else check_same_function(start, config.adapter)
    base = base_of(config, task)
    adapted = adapters.attach(base, config.adapter, seed=config.seed, has_core=rule.has_core, known_rank=known)
    _check_experts(adapted, rule)
    if start is not None:
        adapted = adapters.begin_from(adapted, read_adapter(start))
    return probed(adapted, config.model)


def _check_experts(adapted: Adapted, rule: LoraRuleSettings) -> None:
    """Checks that a rule which needs linear layers is not asked for tensors that hold several experts.

    Raises:
        ConfigError: It is.
    """
    wrapped = adapted.config.get("target_parameters")
    if wrapped and (rule.grows or rule.has_core):
        linear = adapted.config["target_modules"] or adapters.linear_names(adapted.base.model)
        raise ConfigError(
            f"federation.lora = {rule.type!r} is for linear layers, and the adapter is also on tensors that hold a "
            f"mixture's experts ({', '.join(wrapped)}): set adapter.targets to linear layers alone, such as {linear}"
        )


def base_of(config: Config, task: Task) -> Base:
    """The base model of a run, with a head for the task's classes where the objective trains one."""
    check_memory(config.model, environment.memory()["total"])
    has_head = config.training.objective.has_head
    return load_base(config.model, Classes(closed_labels(task), config.seed) if has_head else None)


def client_shares(config: Config, dataset: Dataset) -> Mapping[str, tuple[int, ...]]:
    """Client name -> indices into the training examples.

    Raises:
        DataError: There are too few examples.
        ConfigError: More clients are to be sampled a round than there are, or one with a rank is not there.
    """
    if dataset.clients is not None:
        shares = dataset.clients
    else:
        shares = partition(dataset.splits["train"], config.data.partition, seed=config.seed)
    wanted = config.federation.clients_per_round
    for table in RANK_TABLES:
        strange = sorted(set(getattr(config.federation, table)) - set(shares))
        if strange:
            raise ConfigError(f"federation.{table}: {unknown_choice('client', strange[0], shares)}")
    if wanted is not None and wanted > len(shares):
        raise ConfigError(
            f"federation.clients_per_round = {wanted}, but the partition made {len(shares)} clients; ask for fewer"
        )
    return shares


def _ranks(config: Config, initial: Tensors) -> dict[str, int]:
    """The rank of every client that the configuration gives one of its own."""
    federation = config.federation
    return client_ranks(
        initial,
        federation.ranks,
        memory_mb=federation.memory_mb,
        most_values=_most_values(federation.policies),
        bytes_a_value=config.training.optimizer.bytes_a_value,
    )


def _most_values(policies: Mapping[str, Path]) -> dict[str, int]:
    """Values that an adapter may have by each client's policy; one without such a rule does not restrict.

    Raises:
        PolicyError: A policy is missing or broken.
    """
    found = {name: read_policy(path).largest_adapter for name, path in policies.items()}
    return {name: most for name, most in found.items() if most is not None}


def _kept(name: str, encoded: list[Encoded], share: Sequence[int]) -> list[Encoded]:
    """A client's examples as ids.

    Raises:
        DataError: All of its pairs were left out.
    """
    if share and not encoded:
        raise DataError(
            f"client {name!r}: the two answers of all its pairs are the same up to model.max_length; raise it"
        )
    return encoded


def _held_notes(held: Mapping[str, HeldBack]) -> list[str]:
    """What was held back of the clients' examples, in one line."""
    reserved = sum(len(each.reserve) for each in held.values())
    canaries, inside = (sum(map(count, held.values())) for count in (lambda each: len(each.canaries), _inserted))
    told = [f"{reserved} examples are trained on by nobody (audit.reserve)"] if reserved else []
    told += [f"{canaries} became canaries, {inside} of them trained on (privacy.canaries)"] if canaries else []
    return [f"held back: {', '.join(told)}"] if told else []


def _inserted(held: HeldBack) -> int:
    return sum(held.was_in)


def _attack_notes(attack: AttackSettings) -> list[str]:
    if not isinstance(attack, Malicious):
        return []
    return [f"simulated attack: {attack.clients} of the clients are malicious ({attack.type}, x {attack.factor:g})"]


def _factor_notes(federation: FederationSection, initial: Tensors) -> list[str]:
    """What a reader should know of the rule for LoRA's factors.

    Raises:
        ConfigError: The rule knows linear layers alone, and the adapter is on an embedding as well.
    """
    odd = [name for name in initial if "lora_embedding" in name]
    if odd and not federation.lora.is_plain:
        raise ConfigError(
            f"federation.lora = {federation.lora.type!r} is for linear layers, and adapter.targets names an embedding "
            f"({odd[0]}): leave it out"
        )
    notes = []
    if any(map(is_of_experts, initial)) and (federation.lora.keeps_product or federation.has_ranks):
        notes.append(
            "factors of fused experts are averaged one by one and always whole: federation.lora and ranks by client "
            "are for the linear layers"
        )
    if any(map(method(federation).schedule(1).is_personal, initial)):
        notes.append(
            f"federation.lora = {federation.lora.type!r}: B stays with each client, so the global model alone is the "
            "base; read the figures of the clients' own models"
        )
    return notes


def _text_bytes(example: Example) -> int:
    turns = [content for _, content in example.messages]
    return sum(len(text.encode()) for text in (*turns, example.answer, example.rejected))
