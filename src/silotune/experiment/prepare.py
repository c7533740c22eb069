"""Loads what all modes of a run share: examples, clients, base model, adapter and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from silotune.config import Config
from silotune.data.load import Dataset, read_examples
from silotune.data.mixture import load_examples, load_scored_examples
from silotune.data.partition import counted_by, deal_alike, dealt_by, digest_of, find_faults, partition, skew
from silotune.data.rows import SPLITS, Task
from silotune.data.text import EMBEDDED, documents
from silotune.errors import ConfigError, DataError, unknown_choice
from silotune.evaluation.evaluate import Answers, answers, figures
from silotune.evaluation.forgetting import perplexity, windows
from silotune.experiment.examples import Places, check_objective, encoded_apart, spread
from silotune.experiment.mixture import MixtureScorer, SetScorer
from silotune.experiment.needs import check_packages
from silotune.experiment.start import check_same_function, read_adapter
from silotune.federation.simulation.pace import paces
from silotune.federation.site.policy import read_policy
from silotune.methods.algorithms import method
from silotune.methods.lora_rules import LORA_RULES, LoraAggregation
from silotune.methods.ranks import client_ranks
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.head import Classes
from silotune.models.load import Base, load_base
from silotune.settings.limits import RANK_TABLES
from silotune.settings.sections import AttackSection, EvaluationSection, FederationSection
from silotune.structs import Example, Tensors
from silotune.tensors import digest
from silotune.training.encode import Encoded, truncation_note
from silotune.training.objectives import OBJECTIVES, Encode, encoder_of

FORGETTING_WINDOW = 512
"""Tokens of general text that are read together at most."""
FORGETTING_TOKENS_A_PASS = 2048
"""Every one of them has a row of logits over the vocabulary: they are what bounds memory."""


@dataclass
class Scorer:
    """Scores adapter tensors on one set of examples, and remembers what it has scored.

    Attributes:
        adapted: The resident model.
        examples: The set.
        split: Its name, as it stands in results.
        labels: The options' names; empty for open answers.
        settings: The ``[evaluation]`` section.
        known: Metrics by digest of the scored tensors.
        answers: What the model said to each example, by the same.
    """

    adapted: Adapted
    examples: Sequence[Encoded]
    split: str
    labels: Sequence[str]
    settings: EvaluationSection
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)

    def __call__(self, weights: Tensors) -> dict[str, Any]:
        """Metrics of the model with these adapter tensors."""
        key = digest(weights)
        if key not in self.known:
            adapters.write(self.adapted, weights)
            self.answers[key] = answers(
                self.adapted,
                self.examples,
                labels=self.labels,
                batch_size=self.settings.batch_size,
                scoring=self.settings.scoring,
                max_new_tokens=self.settings.max_new_tokens,
                start_margins=next((known.start_margins for known in self.answers.values()), ()),
            )
            made = figures(self.answers[key], bootstrap_samples=self.settings.bootstrap_samples)
            self.known[key] = {"split": self.split, **made}
        return dict(self.known[key])

    def by_client(self, weights: Tensors, shares: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        """Figures on each client's own share of the set, from the same answers: nothing is scored again.

        Without intervals and bins: a share can be small. A client whose share is empty has ``num_examples`` 0 alone.
        """
        self(weights)
        answered = self.answers[digest(weights)]
        left_out = ("scoring", "reliability")
        made = {name: figures(answered.of(share)) if share else {"num_examples": 0} for name, share in shares.items()}
        return {name: {key: own[key] for key in own if key not in left_out} for name, own in made.items()}


@dataclass
class Forgetting:
    """Perplexity of adapter tensors on a general text, against that of the base; remembers what it has scored.

    Attributes:
        adapted: The resident model.
        source: The text, as it stands in results.
        text: Its windows.
        initial: Adapter tensors that leave the base as it is.
        batch_size: Windows a forward pass.
        known: Perplexity by digest of the scored tensors.
    """

    adapted: Adapted
    source: str
    text: Sequence[Encoded]
    initial: Tensors
    batch_size: int
    known: dict[str, float] = field(default_factory=dict)

    def __call__(self, weights: Tensors) -> dict[str, Any]:
        """Both perplexities, and by what factor the tuned model's is higher."""
        base, tuned = self._perplexity(self.initial), self._perplexity(weights)
        return {
            "text": self.source,
            "num_tokens": sum(len(window.answer) for window in self.text),
            "base_perplexity": base,
            "tuned_perplexity": tuned,
            "ratio": tuned / base,
        }

    def _perplexity(self, weights: Tensors) -> float:
        key = digest(weights)
        if key not in self.known:
            adapters.write(self.adapted, weights)
            self.known[key] = perplexity(self.adapted, self.text, batch_size=self.batch_size)
        return self.known[key]


@dataclass(frozen=True)
class Prepared:
    """What all modes of a run share.

    Attributes:
        config: The run's configuration.
        task: What the examples are examples of.
        clients: Encoded training examples by client.
        text_bytes: UTF-8 bytes of the clients' examples: what pooling the data would send.
        adapted: The resident model.
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
    text_bytes: int
    adapted: Adapted
    initial: Tensors
    ranks: Mapping[str, int]
    gold: SetScorer
    own_shares: Mapping[str, Sequence[int]]
    selection: SetScorer | None
    forgetting: Forgetting | None
    skew: dict[str, Any]
    notes: tuple[str, ...]


def prepare(config: Config, *, sites: Sequence[str] | None = None) -> Prepared:
    """Loads data and model and checks that they fit each other; writes nothing.

    Args:
        config: The run's configuration.
        sites: Clients whose examples are elsewhere: no training example is read. None where they are here.

    Raises:
        SilotuneError: Whatever is wrong with data, model or their fit, in one line.
    """
    check_packages(config)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    read = load_examples if sites is None else load_scored_examples
    dataset = read(config.data, seed=config.seed)
    task, train = dataset.task, dataset.splits["train"]
    shares = client_shares(config, dataset) if sites is None else {name: () for name in sites}
    faults = find_faults(train, shares) if train else ()
    notes = [*dataset.notes, *faults, *_attack_notes(config.federation.attack)]
    for each in dataset.tasks or (task,):
        check_objective(config, each)
    if config.federation.clock is not None:
        paces(config.federation.clock, tuple(shares), seed=config.seed)  # a client that there is not, a broken trace
    adapted = adapted_of(config, task)
    encoded, places = encoded_apart(encoder_for(config, adapted.base), train)

    settings = config.evaluation
    gold_examples = scored_examples(config, dataset, settings.gold)
    gold, gold_places, *cut = scorer_of(config, adapted, dataset, gold_examples, name=settings.gold)
    selects = settings.patience is not None or settings.target is not None or settings.keep == "best"
    selection = None
    if selects:
        chosen = scored_examples(config, dataset, settings.selection)
        selection, _, note = scorer_of(config, adapted, dataset, chosen, name=settings.selection)
        cut.append(note)
    notes.extend(filter(None, [*cut, truncation_note(encoded, "train")]))
    field = dealt_by(config.data.partition)
    own_shares = deal_alike(gold_examples, train, shares, seed=config.seed, field=field) if train else {}
    initial = adapters.read(adapted)
    notes.extend(_factor_notes(config.federation, initial))
    return Prepared(
        config=config,
        task=task,
        clients={name: [encoded[place] for place in spread(share, places)] for name, share in shares.items()},
        text_bytes=sum(_text_bytes(example) for example in train),
        adapted=adapted,
        initial=initial,
        ranks=_ranks(config, initial),
        gold=gold,
        own_shares={name: spread(share, gold_places) for name, share in own_shares.items()},
        selection=selection,
        forgetting=_forgetting(config, adapted, initial),
        skew={
            **(skew(train, shares, field=counted_by(config.data.partition, train)) if train else {}),
            "data_sha256": digest_of(dataset.splits, shares),
        },
        notes=tuple(notes),
    )


def scorer_of(
    config: Config, adapted: Adapted, dataset: Dataset, examples: Sequence[Example], *, name: str
) -> tuple[SetScorer, Places, str | None]:
    """Scores on the examples of a set; for a mixture, one scorer a task.

    Returns:
        The scorer, the places of each example among the encoded ones, and a note on those that were cut.
    """
    encoded, places = encoded_apart(encoder_for(config, adapted.base), examples)
    note = truncation_note(encoded, name)
    alone = Scorer(adapted, encoded, name, closed_labels(dataset.task), config.evaluation)
    if not dataset.tasks:
        return alone, places, note
    parts, own_places = {}, {}
    for task in dataset.tasks:
        share = [number for number, example in enumerate(examples) if example.fields["task"] == task.name]
        if share:
            own_places[task.name] = spread(share, places)
            chosen = [encoded[place] for place in own_places[task.name]]
            parts[task.name] = replace(alone, examples=chosen, labels=closed_labels(task), known={}, answers={})
    return MixtureScorer(parts, own_places, dataset.task.metric, name), places, note


def encoder_for(config: Config, base: Base) -> Encode:
    """What turns a run's examples into ids for its model."""
    training = config.training
    return encoder_of(base, max_length=config.model.max_length, wording=training.wording, turns=training.turns)


def adapted_of(config: Config, task: Task) -> Adapted:
    """The base model of a run with its adapter, as training begins with it.

    Raises:
        SilotuneError: The base or ``adapter.start`` is not found, or they do not fit each other.
    """
    has_core = LORA_RULES[config.federation.lora].has_core
    adapted = adapters.attach(base_of(config, task), config.adapter, seed=config.seed, has_core=has_core)
    if config.adapter.start is None:
        return adapted
    started = adapters.begin_from(adapted, read_adapter(config.adapter.start))
    check_same_function(config.adapter.start, config.adapter)
    return started


def base_of(config: Config, task: Task) -> Base:
    """The base model of a run, with a head for the task's classes where the objective trains one."""
    has_head = OBJECTIVES[config.training.objective].has_head
    return load_base(config.model, Classes(closed_labels(task), config.seed) if has_head else None)


def _forgetting(config: Config, adapted: Adapted, initial: Tensors) -> Forgetting | None:
    settings = config.evaluation
    if not settings.forgetting:
        return None
    length = min(config.model.max_length, FORGETTING_WINDOW)
    text = windows(adapted, documents(settings.forgetting), max_tokens=settings.forgetting_tokens, max_length=length)
    name = settings.forgetting if settings.forgetting == EMBEDDED else Path(settings.forgetting).name
    batch_size = max(1, min(settings.batch_size, FORGETTING_TOKENS_A_PASS // length))
    return Forgetting(adapted, name, text, initial, batch_size)


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
        optimizer=config.training.optimizer,
    )


def _most_values(policies: Mapping[str, Path]) -> dict[str, int]:
    """Values that an adapter may have by each client's policy; one without such a rule does not restrict.

    Raises:
        PolicyError: A policy is missing or broken.
    """
    found = {name: read_policy(path).largest_adapter for name, path in policies.items()}
    return {name: most for name, most in found.items() if most is not None}


def _attack_notes(attack: AttackSection) -> list[str]:
    if attack.kind == "none":
        return []
    return [f"simulated attack: {attack.clients} of the clients are malicious ({attack.kind}, x {attack.factor:g})"]


def closed_labels(task: Task) -> tuple[str, ...]:
    """Names of the classes that a task's examples are scored over; empty for open answers."""
    return tuple(task.options)


def scored_examples(config: Config, dataset: Dataset, name: str) -> Sequence[Example]:
    """The examples that ``evaluation.gold`` or ``evaluation.selection`` names: a split, or a file.

    Raises:
        DataError: It is neither, or holds nothing.
    """
    if name in dataset.splits:
        examples: Sequence[Example] = dataset.splits[name]
    elif Path(name).suffix:
        examples = read_examples(name, dataset.task)
    else:
        remedy = f": set data.{name} to a file of them" if name in SPLITS else ""
        if name == "validation":
            remedy += "; without evaluation.keep = 'best', patience and target, no validation examples are needed"
        raise DataError(f"{name!r} is neither a split that is there ({', '.join(dataset.splits)}) nor a file{remedy}")
    if not examples:
        raise DataError(f"{name!r} holds no examples to evaluate on")
    most = min(config.evaluation.max_examples or len(examples), len(examples))
    return [examples[place * len(examples) // most] for place in range(most)]  # from all of it: it may be sorted


def _factor_notes(federation: FederationSection, initial: Tensors) -> list[str]:
    """What a reader should know of the rule for LoRA's factors.

    Raises:
        ConfigError: The rule knows linear layers alone, and the adapter is on an embedding as well.
    """
    odd = [name for name in initial if "lora_embedding" in name]
    if odd and LORA_RULES[federation.lora] != LoraAggregation():
        raise ConfigError(
            f"federation.lora = {federation.lora!r} is for linear layers, and adapter.targets names an embedding "
            f"({odd[0]}): leave it out"
        )
    parts = method(federation).schedule(1)
    if not any(map(parts.is_personal, initial)):
        return []
    return [
        f"federation.lora = {federation.lora!r}: B stays with each client, so the global model alone is the base; "
        "read the figures of the clients' own models"
    ]


def _text_bytes(example: Example) -> int:
    turns = [content for _, content in example.messages]
    return sum(len(text.encode()) for text in (*turns, example.answer, example.rejected))
