"""The leakage audit: attacks a run's own updates and models, and says what came out beside what chance would give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.config import Config
from silotune.errors import PrivacyError, RunFolderError
from silotune.evaluation.leakage import canaries, extraction, labels, membership, span
from silotune.evaluation.leakage.membership import Advantage
from silotune.experiment.held_back import sampled
from silotune.experiment.needs import config_of
from silotune.experiment.parts import exposed_of, forecast_of
from silotune.experiment.prepare import Prepared, prepare
from silotune.experiment.scoring import MixtureScorer, Scorer
from silotune.experiment.start import check_same_data
from silotune.federation.coordinator.audit import model_name
from silotune.federation.coordinator.course import updates_of
from silotune.methods.algorithms import local_training
from silotune.models import adapters
from silotune.models.load import rows_of
from silotune.models.threads import operation_threads
from silotune.record.audit import FILE, KEY_FILE
from silotune.record.chain import read_chain
from silotune.record.checkpoints import file_sha256
from silotune.record.environment import versions
from silotune.record.plain_json import canonical, sha256
from silotune.record.printable import counted
from silotune.record.runs import RunFolder
from silotune.record.signatures import SigningKey, read_key
from silotune.seeds import derive
from silotune.settings.privacy import Guarantee
from silotune.settings.sections import AuditSection
from silotune.structs import Tensors
from silotune.tensors import digest
from silotune.training.batches import shuffled
from silotune.training.encode import Encoded
from silotune.training.local import RoundPlace, steps_in_round, train_round
from silotune.training.scores import class_logits

SERVER, MEMBER, PUBLIC = "server", "member", "public"
ADVERSARIES: Mapping[str, str] = {
    SERVER: "sees every update that reaches it: single ones, or under a protected sum their sum alone",
    MEMBER: "is a client, and sees the global model of every round",
    PUBLIC: "has the final adapter and the base",
}
"""Who attacks -> what it sees."""
_MOST_ORDERS = 2
"""Updates whose texts are looked for in order: the search is long."""
_MOST_CONTINUED = 64


@dataclass(frozen=True)
class Figure:
    """One figure of the audit.

    Attributes:
        attack: Its name in `ATTACKS`.
        adversary: Who can make it.
        about: Which client, round or score it is about.
        metric: What is counted.
        value: The figure.
        interval: 95 %; None where it is a count.
        baseline: What is reached without the run.
        baseline_is: What that is.
        says: The figure as a sentence.
        more: Other figures of the same attack.
    """

    attack: str
    adversary: str
    about: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    baseline: float | None
    baseline_is: str
    says: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """A client's update: of which round, from how many steps."""

    round_number: int
    steps: int
    delta: Tensors


@dataclass(frozen=True)
class Evidence:
    """What the attacks have.

    Attributes:
        prepared: Model and examples, members and reserve told apart.
        final: The adapter that the run ended with.
        models: Round -> global model after it, 0 the first; empty where none were kept.
        updates: Client -> its updates; empty where none were kept.
        settings: The ``[audit]`` section.
        claimed: Epsilon that the run claims; None where it promises nothing.
        rounds: Rounds of the run.
    """

    prepared: Prepared
    final: Tensors
    models: Mapping[int, Tensors]
    updates: Mapping[str, Sequence[Update]]
    settings: AuditSection
    claimed: float | None
    rounds: int

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.prepared.config

    @cached_property
    def gold(self) -> Sequence[Encoded]:
        """The examples that the coordinator scores on, which are public to it."""
        scorer = self.prepared.gold
        parts = scorer.parts.values() if isinstance(scorer, MixtureScorer) else [scorer]
        return [example for part in parts if isinstance(part, Scorer) for example in part.examples]

    @cached_property
    def log_frequency(self) -> torch.Tensor:
        """Logarithm of how often each token stands in the coordinator's own examples [vocabulary]."""
        rows = rows_of(self.prepared.adapted.base.model)
        counts = torch.full((rows,), 0.5, dtype=torch.float64)
        for example in self.gold:
            for token in (*example.prompt, *example.answer):
                counts[token] += 1
        return counts.log()

    def used(self, client: str, update: Update) -> list[Encoded]:
        """The examples that an update was made from."""
        examples, training = self.prepared.clients[client], self.config.training
        if self.config.privacy.dp.is_by_example:
            return list(examples)  # the draw is secret
        seed = derive(self.config.seed, "train", round_number=update.round_number, client=client)
        batches = islice(
            shuffled(examples, training.batch_size, seed=seed), update.steps * training.gradient_accumulation
        )
        seen = {id(example): example for batch in batches for example in batch}
        return list(seen.values())

    def sample(self, examples: Sequence[Encoded], purpose: str) -> list[int]:
        """Places of at most ``audit.max_examples`` of them."""
        return sampled(len(examples), self.settings.max_examples, seed=self.config.seed, purpose=purpose)

    @cached_property
    def members(self) -> list[tuple[str, int, Encoded]]:
        """Client, row and example of those that were trained on and are attacked."""
        return [
            (client, held.rows[place], held.members[place])
            for client, held in self.prepared.held.items()
            for place in self.sample(held.members, f"members of {client}")
        ]

    @cached_property
    def others(self) -> list[tuple[str, Encoded]]:
        """Client and example of the reserve that are attacked."""
        return [
            (client, held.reserve[place])
            for client, held in self.prepared.held.items()
            for place in self.sample(held.reserve, f"reserve of {client}")
        ]

    @cached_property
    def every(self) -> list[Encoded]:
        """The members that are attacked, then those of the reserve."""
        return [*(example for _, _, example in self.members), *(example for _, example in self.others)]

    @cached_property
    def of_base(self) -> list[float]:
        """Losses of ``every`` at the adapter that training began with."""
        return self.losses(self.prepared.initial, self.every)

    @cached_property
    def of_final(self) -> list[float]:
        """The same at the final adapter."""
        return self.losses(self.final, self.every)

    def losses(self, weights: Tensors, examples: Sequence[Encoded]) -> list[float]:
        """Loss of each example at an adapter."""
        config = self.config
        return membership.losses(
            self.prepared.adapted, weights, examples, training=config.training, batch_size=config.evaluation.batch_size
        )


@dataclass(frozen=True)
class Attack:
    """An attack, as the audit knows it.

    Attributes:
        adversary: Who can make it.
        title: What it is, for people.
        lacks: What a run lacks for it, in a few words; empty where nothing is lacking.
        run: Makes the figures.
    """

    adversary: str
    title: str
    lacks: Callable[[Evidence], str]
    run: Callable[[Evidence], Iterator[Figure]]


def _inputs(examples: Sequence[Encoded]) -> set[int]:
    """The distinct tokens that the model reads of examples."""
    return {token for example in examples for token in (*example.prompt, *example.answer[:-1])}


def _span_figure(
    found: span.Found, present: set[int], evidence: Evidence, *, attack: str, adversary: str, about: str
) -> Figure:
    """What a span attack found, beside what word frequency alone finds with as many guesses."""
    frequency = evidence.log_frequency
    hit, wrong = len(found.tokens & present), len(found.tokens - present)
    likeliest = set(torch.topk(frequency, min(hit + wrong, len(frequency))).indices.tolist())
    by_frequency = len(likeliest & present)
    of_frequency = span.area(frequency, present)
    of_both = span.area(2 * found.presence + frequency, present)
    lift = None if of_both is None or of_frequency is None else of_both - of_frequency
    who = {SERVER: "A server that sees single updates", MEMBER: "Whoever sees the models of all rounds"}.get(
        adversary, "Whoever has the final adapter"
    )
    exact = f"can name {hit} of the {len(present)} distinct tokens {about}"
    named = f"{exact}, with {wrong} false ones; as many guesses by word frequency name {by_frequency}"
    says = named if found.tokens else f"can name none of the {len(present)} distinct tokens {about} exactly"
    if lift is not None:
        says += (
            f". Ranked by presence, the vocabulary has an AUC of {of_both:.3f}, by word frequency alone "
            f"{of_frequency:.3f}"
        )
    more: dict[str, float | None] = {"present": len(present), "found": hit, "false": wrong, "rank": found.rank}
    more |= {"auc": of_both, "auc_of_frequency": of_frequency, "lift_of_auc": lift}
    share = hit / len(present) if present else 0.0
    return Figure(
        attack, adversary, about, "share of distinct tokens recovered", share, None,
        by_frequency / len(present) if present else 0.0, "word frequency", f"{who} {says}.", more,
    )  # fmt: skip


def _span_of_updates(evidence: Evidence) -> Iterator[Figure]:
    """Each client's updates of all rounds together; then texts in order, where a round was plain steps."""
    prepared, orders = evidence.prepared, 0
    inputs = None
    for client, updates in evidence.updates.items():
        adapters.write(prepared.adapted, prepared.initial)
        deltas = [update.delta for update in updates]
        if inputs is None:
            first, _ = span.readers_of(prepared.adapted, deltas[0])
            inputs = None if first is None else span.token_inputs(prepared.adapted, first)
        found = span.attack_rounds(prepared.adapted, deltas, weights=prepared.initial, inputs=inputs)
        present = _inputs([example for update in updates for example in evidence.used(client, update)])
        if found is not None:
            about = f"of {client} in {counted(len(updates), 'round')}"
            yield _span_figure(found, present, evidence, attack="span", adversary=SERVER, about=about)
        if not local_training(evidence.config.federation, evidence.config.training).optimizer.is_plain:
            continue
        for update in updates:
            received = evidence.models.get(update.round_number - 1)
            if orders < _MOST_ORDERS and received is not None and update.round_number > 1:
                orders += 1
                yield from _order_figure(evidence, client, update, received, inputs)


def _order_figure(
    evidence: Evidence, client: str, update: Update, received: Tensors, inputs: torch.Tensor | None
) -> Iterator[Figure]:
    """Texts of one update, word by word."""
    adapters.write(evidence.prepared.adapted, received)
    found = span.attack(evidence.prepared.adapted, [update.delta], weights=received, in_order=True, inputs=inputs)
    if found is None or not found.tokens:
        return
    texts = [(*example.prompt, *example.answer[:-1]) for example in evidence.used(client, update)]
    scores = [max((span.rouge_l(each, text) for each in found.texts), default=0.0) for text in texts]
    exact = sum(any(each[: len(text)] == text for each in found.texts) for text in texts)
    public = [(*example.prompt, *example.answer[:-1]) for example in evidence.gold[: max(1, len(found.texts))]]
    chance = [max((span.rouge_l(each, text) for each in public), default=0.0) for text in texts]
    value, baseline = float(np.mean(scores)), float(np.mean(chance))
    about = f"of {client} in round {update.round_number}"
    yield Figure(
        "span, in order", SERVER, about, "mean ROUGE-L of texts", value, None, baseline,
        "as many examples of the coordinator's own",
        f"A server that sees single updates can write down {exact} of {len(texts)} texts {about} word for word; "
        f"ROUGE-L {value:.2f}, of as many examples of its own {baseline:.2f}.",
        {"texts": len(texts), "exact": exact, "tried": found.tried},
    )  # fmt: skip


def _changes(models: Mapping[int, Tensors]) -> list[Tensors]:
    """What each round changed in the global model, where its tensors have the same shapes."""
    numbers = sorted(models)
    return [_change(models[before], models[after]) for before, after in zip(numbers, numbers[1:], strict=False)]


def _change(before: Tensors, after: Tensors) -> Tensors:
    """What was added to the tensors that both have in one shape; residuals that grow are left out."""
    return {
        name: value - before[name]
        for name, value in after.items()
        if name in before and value.shape == before[name].shape
    }


def _span_of_models(evidence: Evidence) -> Iterator[Figure]:
    """The changes of the global model, which are sums over the clients: all that a protected sum leaves to see."""
    return _span_of_all(evidence, _changes(evidence.models), MEMBER, "of all clients together")


def _span_of_final(evidence: Evidence) -> Iterator[Figure]:
    change = _change(evidence.prepared.initial, evidence.final)
    return _span_of_all(evidence, [change], PUBLIC, "of all clients in all rounds")


def _span_of_all(evidence: Evidence, changes: Sequence[Tensors], adversary: str, about: str) -> Iterator[Figure]:
    prepared = evidence.prepared
    adapters.write(prepared.adapted, prepared.initial)
    if not changes or not changes[0]:
        return
    first, _ = span.readers_of(prepared.adapted, changes[0])
    inputs = None if first is None else span.token_inputs(prepared.adapted, first)
    found = span.attack_rounds(prepared.adapted, changes, weights=prepared.initial, inputs=inputs)
    if found is not None:
        yield _span_figure(found, _read_in_all(evidence), evidence, attack="span", adversary=adversary, about=about)


def _read_in_all(evidence: Evidence) -> set[int]:
    """The distinct tokens that all clients' steps read in all rounds; of rounds of some clients, those of all."""
    training, found = evidence.config.training, set[int]()
    for client, examples in evidence.prepared.clients.items():
        steps = steps_in_round(len(examples), training)
        for number in range(1, evidence.rounds + 1):
            found |= _inputs(evidence.used(client, Update(number, steps, {})))
    return found


def _membership(evidence: Evidence) -> Iterator[Figure]:
    """Every score on the final model, over all clients and by client."""
    scored = _scored(evidence)
    count = len(evidence.members)
    for name, score in membership.SCORES.items():
        if name not in (*_PLAIN, *scored):
            continue
        values = score(scored)
        found = membership.advantage(values[:count], values[count:])
        if found is not None:
            yield _membership_figure(found, PUBLIC, f"by {name}")
        if name in _PLAIN:
            yield from _by_client(evidence, values, name)


_PLAIN = ("loss", "ratio")
"""Scores that take no more than losses: made by client and by round, too."""


def _by_client(evidence: Evidence, values: Sequence[float], score: str) -> Iterator[Figure]:
    count = len(evidence.members)
    for client in evidence.prepared.held:
        inside = [value for value, (who, _, _) in zip(values, evidence.members, strict=False) if who == client]
        outside = [value for value, (who, _) in zip(values[count:], evidence.others, strict=True) if who == client]
        found = membership.advantage(inside, outside)
        if found is not None:
            yield _membership_figure(found, PUBLIC, f"by {score}, at {client}")


def _scored(evidence: Evidence) -> dict[str, list[float]]:
    """The figures of every member, then of every example of the reserve, that scores of the final model are made of."""
    examples = evidence.every
    scored = {"loss": evidence.of_final, "base": evidence.of_base}
    if not evidence.config.training.objective.has_head and all(example.answer for example in examples):
        batch = evidence.config.evaluation.batch_size
        scored["min-k"] = membership.min_k(evidence.prepared.adapted, evidence.final, examples, batch_size=batch)
    if evidence.settings.shadows and len(examples) >= 4:
        was_in = membership.balanced_halves(len(examples), evidence.settings.shadows, seed=evidence.config.seed)
        shadows = [_shadow(evidence, examples, chosen, number) for number, chosen in enumerate(was_in)]
        scored["lira"] = membership.likelihood_ratio(scored["loss"], shadows, was_in)
    return scored


def _shadow(evidence: Evidence, examples: Sequence[Encoded], chosen: np.ndarray, number: int) -> list[float]:
    """Losses of all examples under a model that was trained on some of them as often as the run trained on its own."""
    inside = [example for example, is_in in zip(examples, chosen, strict=True) if is_in]
    config, prepared = evidence.config, evidence.prepared
    largest = max(map(len, prepared.clients.values()))
    passes = steps_in_round(largest, config.training) * config.training.batch_size / largest * evidence.rounds
    steps = max(1, math.ceil(passes * len(inside) / config.training.batch_size))
    training = config.training.model_copy(update={"max_steps": steps, "schedule": "constant"})
    place = RoundPlace(derive(config.seed, "shadow", round_number=number))
    made = train_round(prepared.adapted, prepared.initial, inside, settings=training, place=place)
    return evidence.losses(arithmetic.add(prepared.initial, made.delta), examples)


def _membership_figure(found: Advantage, adversary: str, about: str) -> Figure:
    low, high = found.auc_interval
    which = {MEMBER: "Whoever sees the model", PUBLIC: "Whoever has the final adapter"}[adversary]
    return Figure(
        "membership", adversary, about, "AUC", found.auc, found.auc_interval, 0.5, "guessing",
        f"{which} can tell an example that was trained on from one that was not with an AUC of {found.auc:.3f} "
        f"({low:.3f} to {high:.3f}) {about}; guessing has 0.5. At 1 % false alarms it finds {found.tpr:.1%} of them.",
        {
            "advantage": found.advantage, "tpr_at_1_percent": found.tpr, "tpr_interval": list(found.tpr_interval),
            "members": found.members, "others": found.others,
        },
    )  # fmt: skip


def _membership_by_round(evidence: Evidence) -> Iterator[Figure]:
    """The loss, and the gain over the base, at the model of every round."""
    count = len(evidence.members)
    for number in sorted(evidence.models):
        if number == 0:
            continue
        tuned = evidence.losses(evidence.models[number], evidence.every)
        for name in _PLAIN:
            values = membership.SCORES[name]({"loss": tuned, "base": evidence.of_base})
            found = membership.advantage(values[:count], values[count:])
            if found is not None:
                yield _membership_figure(found, MEMBER, f"by {name}, after round {number}")


def _words_alone(evidence: Evidence) -> Iterator[Figure]:
    """A check of the other figures: members and reserve must not differ by their words."""
    members = [example for _, _, example in evidence.members]
    found = membership.words_alone(members, [example for _, example in evidence.others])
    if found is not None:
        low, high = found.auc_interval
        yield Figure(
            "members differ from the reserve", PUBLIC, "by their words", "AUC", found.auc, found.auc_interval, 0.5,
            "guessing",
            f"A classifier of words that never saw the model tells members from the reserve with an AUC of "
            f"{found.auc:.3f} ({low:.3f} to {high:.3f}); above 0.5, the other figures of membership are too high.",
        )  # fmt: skip


def _canaries(evidence: Evidence) -> Iterator[Figure]:
    """The least epsilon that guessing the coins proves, and the exposure of those that were in."""
    held = evidence.prepared.held.values()
    odd = [canary for each in held for canary in each.canaries]
    was_in = [is_in for each in held for is_in in each.was_in]
    scores = [
        base - tuned
        for base, tuned in zip(
            evidence.losses(evidence.prepared.initial, odd), evidence.losses(evidence.final, odd), strict=True
        )
    ]
    dp = evidence.config.privacy.dp
    delta = dp.delta if isinstance(dp, Guarantee) else 1e-5
    found = canaries.audited_epsilon(scores, was_in, delta=delta)
    if found is not None:
        claim = "nothing is claimed" if evidence.claimed is None else f"{evidence.claimed:.3g} is claimed"
        yield Figure(
            "canaries", PUBLIC, "epsilon", "least epsilon, at 95 % confidence", found.epsilon, None, evidence.claimed,
            "claimed epsilon",
            f"Telling {found.right} of {found.guesses} canaries apart proves an epsilon of at least "
            f"{found.epsilon:.3g} at delta = {delta:g}; {claim}, and {found.canaries} canaries could prove "
            f"{found.most:.3g} at most.",
            asdict(found),
        )  # fmt: skip
    exposed = canaries.exposures(scores, was_in)
    if exposed:
        out = len(was_in) - sum(was_in)
        yield Figure(
            "canaries", PUBLIC, "exposure", "mean exposure in bits", float(np.mean(exposed)), None,
            _chance_exposure(out + 1), "a model that knows none of them",
            f"The canaries that were trained on have an exposure of {np.mean(exposed):.2f} bits on average and "
            f"{max(exposed):.2f} at most, of {math.log2(out + 1):.2f} that {out} others allow.",
            {"largest": max(exposed), "inserted": len(exposed)},
        )  # fmt: skip


def _chance_exposure(size: int) -> float:
    """Mean exposure of a canary whose rank among so many is drawn."""
    return math.log2(size) - float(np.mean(np.log2(np.arange(1, size + 1))))


def _extraction(evidence: Evidence) -> Iterator[Figure]:
    """Beginnings of training texts, continued by the model and by its base."""
    adapted, initial = evidence.prepared.adapted, evidence.prepared.initial
    groups = []
    for examples in ([example for _, _, example in evidence.members], [example for _, example in evidence.others]):
        groups.append(extraction.beginnings(examples)[:_MOST_CONTINUED])
    for name, temperature in (("greedily", 0.0), ("sampled", 1.0)):
        shares = []
        for group in groups:
            tuned, base = (
                extraction.recalled(adapted, weights, group, temperature=temperature)
                for weights in (evidence.final, initial)
            )
            beyond = [
                one >= extraction.LEAST and other < extraction.LEAST for one, other in zip(tuned, base, strict=True)
            ]
            shares.append((sum(beyond), len(beyond), max(tuned, default=0)))
        (right, count, longest), (by_chance, of, _) = shares
        if not count:
            return
        yield Figure(
            "extraction", PUBLIC, name, f"share of texts with {extraction.LEAST} tokens or more recalled, beyond the "
            "base", right / count, None, by_chance / of if of else None, "texts of the reserve",
            f"Continued {name}, {right} of {count} beginnings of texts that were trained on go on word for word for "
            f"{extraction.LEAST} tokens or more where the base does not (the longest for {longest}); of texts of the "
            f"reserve {by_chance} of {of}.",
            {"longest": longest, "texts": count},
        )  # fmt: skip


def _labels(evidence: Evidence) -> Iterator[Figure]:
    """How many examples of each class a client's update came from; exact for one plain step that was not clipped."""
    classes = len(evidence.prepared.adapted.base.labels)
    training = local_training(evidence.config.federation, evidence.config.training)
    for client, updates in evidence.updates.items():
        update = updates[0]
        signal, received = labels.class_signal(update.delta, classes), evidence.models.get(update.round_number - 1)
        if signal is None or received is None:
            continue
        used = evidence.used(client, update)
        true = [sum(example.label == place for example in used) for place in range(classes)]
        adapters.write(evidence.prepared.adapted, received)
        with torch.no_grad():
            some = evidence.gold[: evidence.config.evaluation.batch_size]
            expected = torch.softmax(class_logits(evidence.prepared.adapted, some).double(), dim=-1).mean(dim=0).cpu()
        step = signal / training.learning_rate / max(1, update.steps)
        scale = 1.0 if training.optimizer.is_plain else float(expected.max()) / max(float(step.abs().max()), 1e-12)
        found = labels.counts_of(step * scale, expected, len(used))
        wrong = labels.mean_error(found, true)
        chance = labels.mean_error(labels.counts_of(torch.zeros(classes), expected, len(used)), true)
        yield Figure(
            "labels", SERVER, f"of {client} in round {update.round_number}", "share of examples whose class is told",
            1 - wrong / len(used), None, 1 - chance / len(used), "the model's mean answer",
            f"A server that sees a single update of {client} can tell the classes of "
            f"{len(used) - wrong:g} of its {len(used)} examples in number; without it, {len(used) - chance:g}.",
            {"found": found, "true": true},
        )  # fmt: skip


def _needs_updates(evidence: Evidence) -> str:
    if evidence.updates:
        return ""
    if evidence.config.privacy.protection.is_sum:
        return "the coordinator saw only protected sums: no single update exists outside its site"
    return "the run kept no updates: record.keep_updates = true"


def _needs_models(evidence: Evidence) -> str:
    return "" if len(evidence.models) > 1 else "the run kept no models of its rounds: audit.leakage = true"


def _needs_reserve(evidence: Evidence) -> str:
    if not evidence.config.training.objective.is_by_example:
        return "the objective has no loss of single examples"
    if not evidence.others:
        return "no share of the examples was held back: audit.leakage = true with audit.reserve"
    few = min(len(evidence.members), len(evidence.others))
    if few < membership.LEAST_EACH:
        return (
            f"{few} examples are too few for an interval: at least {membership.LEAST_EACH} members and as many of "
            "the reserve"
        )
    return ""


def _needs_canaries(evidence: Evidence) -> str:
    return "" if any(held.canaries for held in evidence.prepared.held.values()) else "the run had no privacy.canaries"


def _needs_text(evidence: Evidence) -> str:
    if evidence.config.training.objective.has_head:
        return "a classifier writes no text"
    found = extraction.beginnings([example for _, _, example in evidence.members])
    return "" if found else f"no answer has more than {extraction.LEAST} tokens to be recalled"


def _needs_head(evidence: Evidence) -> str:
    if not evidence.config.training.objective.has_head:
        return "no head is trained, whose gradient would tell classes"
    return _needs_updates(evidence) or _needs_models(evidence)


def _both(*needs: Callable[[Evidence], str]) -> Callable[[Evidence], str]:
    return lambda evidence: next(filter(None, (need(evidence) for need in needs)), "")


def _needs_reader(evidence: Evidence) -> str:
    """Whether the adapter has a factor that is trained and reads what the model reads."""
    exposed = exposed_of(evidence.prepared)
    if exposed is None or exposed.ranks:
        return ""
    return "nothing that is trained reads the model's inputs, so their span is not in an update"


ATTACKS: Mapping[str, Attack] = {
    "tokens of single updates": Attack(
        SERVER, "which tokens, and which texts, a client's updates were made from",
        _both(_needs_updates, _needs_reader), _span_of_updates,
    ),
    "tokens of sums": Attack(
        MEMBER, "which tokens the changes of the global model were made from",
        _both(_needs_models, _needs_reader), _span_of_models,
    ),
    "tokens of the final adapter": Attack(
        PUBLIC, "which tokens the whole training was made from", _needs_reader, _span_of_final
    ),
    "classes of single updates": Attack(SERVER, "which classes a client holds", _needs_head, _labels),
    "membership": Attack(PUBLIC, "whether an example was trained on, by the final model", _needs_reserve, _membership),
    "membership by round": Attack(
        MEMBER, "whether an example was trained on, by the model of every round",
        _both(_needs_models, _needs_reserve), _membership_by_round,
    ),
    "members differ from the reserve": Attack(
        PUBLIC, "a check: whether words alone tell members", _needs_reserve, _words_alone
    ),
    "canaries": Attack(PUBLIC, "which canaries were trained on", _needs_canaries, _canaries),
    "extraction": Attack(PUBLIC, "texts that the model writes on from their beginnings", _needs_text, _extraction),
}  # fmt: skip
"""Name -> an attack. Its figures carry its metric and its baseline."""


def evidence_of(prepared: Prepared, folder: RunFolder, settings: AuditSection) -> Evidence:
    """What a run left of itself for the attacks.

    Raises:
        RunFolderError: The federated mode has no adapter, or a file is broken.
    """
    part = folder.part("federated")
    if not part.has("result"):
        raise RunFolderError(
            f"{str(folder.path)!r} has no result of the federated mode: 'silotune resume' finishes the run"
        )
    result = part.read_json("result")
    final = _final(part, prepared)
    models, updates = {}, dict[str, list[Update]]()
    for number in range(int(result["rounds"]) + 1):
        if (part.path / "updates" / f"{model_name(number)}.safetensors").is_file():
            models[number] = part.kept_tensors(model_name(number))
    if (part.path / FILE).is_file():
        for entry, replies in updates_of(read_chain(part.path / FILE)):
            for reply in replies:
                if reply.fields.get("file"):
                    made = Update(
                        int(entry.fields["round"]),
                        int(reply.fields["report"]["steps"]),
                        part.kept_tensors(str(reply.fields["file"])),
                    )
                    updates.setdefault(str(reply.fields["client"]), []).append(made)
    claimed = (result.get("privacy") or {}).get("epsilon") if prepared.config.privacy.dp.is_promised else None
    return Evidence(prepared, final, models, updates, settings, claimed, int(result["rounds"]))


def _final(part: RunFolder, prepared: Prepared) -> Tensors:
    """The trained tensors that the result was saved from: those of the checkpoint, as a saved adapter may be in another
    form; where the checkpoint was removed, the saved adapter.

    Raises:
        RunFolderError: There is no checkpoint, and the saved adapter is in another form.
    """
    checkpoint = part.load_checkpoint()
    if checkpoint is not None:
        state = checkpoint[0]
        keeps_best = prepared.config.evaluation.keep == "best" and state.best_weights
        return state.best_weights if keeps_best else state.weights
    saved, initial = part.load_adapter()[0], prepared.initial
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in initial.items()}:
        raise RunFolderError(f"{str(part.path)!r}: its checkpoint is gone, and its adapter was saved in another form")
    return saved


def audited(prepared: Prepared, folder: RunFolder, settings: AuditSection) -> dict[str, Any]:
    """Attacks a run and gives the report, unsigned.

    Args:
        prepared: What the run was made from.
        folder: The run folder, with the result of its federated mode.
        settings: The ``[audit]`` section.
    """
    began = time.perf_counter()
    evidence = evidence_of(prepared, folder, settings)
    figures: list[Figure] = []
    missing: list[dict[str, str]] = []
    for name, attack in ATTACKS.items():
        lacks = attack.lacks(evidence)
        made = [] if lacks else list(attack.run(evidence))
        figures += made
        if not made:
            missing.append({"attack": name, "adversary": attack.adversary, "why": lacks or _NOTHING})
    adapters.write(prepared.adapted, prepared.initial)
    return {
        **_identity(prepared, folder),
        "seconds": time.perf_counter() - began,
        "figures": [asdict(figure) for figure in figures],
        "not_tried": [*missing, *_never(prepared.config)],
        "worst": _worst(evidence),
    }


_NOTHING = "its part of the examples was too few for an interval, or the updates hold nothing that it reads"


def _never(config: Config) -> list[dict[str, str]]:
    """What this audit makes of no run, and why."""
    crossing = "the run sends no activations"
    if config.federation.split is not None:
        crossing = "the compute server sees them: inversion.json of the run says what a test read of them"
    return [
        {
            "attack": "texts from gradients by optimisation",
            "adversary": SERVER,
            "why": "not part of this audit: where the span attack finds nothing, optimising inputs (LAMP, TIGER) may",
        },
        {"attack": "activations of split training", "adversary": SERVER, "why": crossing},
    ]


def _worst(evidence: Evidence) -> dict[str, Any] | None:
    """The member that the final model gives away most, by its client and row; None without a reserve."""
    if _needs_reserve(evidence):
        return None
    count = len(evidence.members)
    gains = membership.SCORES["ratio"]({"loss": evidence.of_final, "base": evidence.of_base})
    inside, outside = np.asarray(gains[:count]), np.asarray(gains[count:])
    place = int(inside.argmax())
    client, row, _ = evidence.members[place]
    above = float((outside >= inside[place]).mean())
    return {"client": client, "row": row + 1, "share_of_reserve_above": above, "of": count}


def gathered(prepared: Prepared, folder: RunFolder, by_site: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The report of a run over sites, unsigned: the figures that the sites measured on their own examples.

    Args:
        prepared: What the coordinator has: no example of a site.
        folder: The run folder.
        by_site: Site -> what it said, or why it said nothing.
    """
    figures, missing = [], []
    for site, said in by_site.items():
        if said.get("auc") is None:
            why = said.get("failed") or "the site withholds its figures"
            missing.append({"attack": f"membership at {site}", "adversary": PUBLIC, "why": str(why)})
            continue
        low, high = said["auc_interval"] or (said["auc"], said["auc"])
        figures.append(
            Figure(
                "membership",
                PUBLIC,
                f"at {site}",
                "AUC",
                said["auc"],
                (low, high),
                0.5,
                "guessing",
                f"Whoever has the final adapter can tell an example of {site} that was trained on from one that was "
                f"not with an AUC of {said['auc']:.3f} ({low:.3f} to {high:.3f}), as {site} measured; guessing has "
                "0.5.",
                dict(said),
            )  # fmt: skip
        )
    away = "its examples are at the sites: whether it worked can be told there alone"
    missing += [
        {"attack": name, "adversary": attack.adversary, "why": away}
        for name, attack in ATTACKS.items()
        if name != "membership"
    ]
    return {
        **_identity(prepared, folder),
        "seconds": 0.0,
        "figures": [asdict(figure) for figure in figures],
        "not_tried": [*missing, *_never(prepared.config)],
        "worst": None,
    }


def _identity(prepared: Prepared, folder: RunFolder) -> dict[str, Any]:
    """What a report says of the run that it is about."""
    config, part = prepared.config, folder.part("federated")
    trail = part.path / FILE
    return {
        "format": 1,
        "run": folder.path.name,
        "round": int(part.read_json("result")["rounds"]),
        "time": time.time(),
        "seed": config.seed,
        "protection": protection_of(config),
        "adversaries": dict(ADVERSARIES),
        "forecast": forecast_of(prepared),
        "hashes": {
            "config": sha256(config.model_dump(mode="json")),
            "data": prepared.skew.get("data_sha256", ""),
            "adapter": digest(part.load_adapter()[0]),
            "trail when attacked": file_sha256(trail) if trail.is_file() else "",
        },
        "versions": versions(),
    }


def protection_of(config: Config) -> str:
    """What protects a run's updates, in one line."""
    dp = config.privacy.dp
    promised = f"DP ({dp.type}, epsilon {dp.epsilon:g})" if isinstance(dp, Guarantee) and dp.epsilon else ""
    parts = [
        promised or (f"DP ({dp.type})" if dp.is_promised else ""),
        config.privacy.protection.type if config.privacy.protection.is_sum else "",
        f"upload in {config.federation.upload.values}" if config.federation.upload.values != "float32" else "",
    ]
    return ", ".join(filter(None, parts)) or "none"


def claim_broken(report: Mapping[str, Any]) -> str:
    """What a report says against the claimed epsilon, in one line; empty where nothing."""
    for figure in report["figures"]:
        is_epsilon = (figure["attack"], figure["about"]) == ("canaries", "epsilon")
        if is_epsilon and figure["baseline"] is not None and figure["value"] > figure["baseline"]:
            return (
                f"run {report['run']!r}, round {report['round']}: the audited epsilon {figure['value']:.3g} is above "
                f"the claimed {figure['baseline']:.3g}: the guarantee does not hold; stop using the model, and look "
                "at how noise was added"
            )
    return ""


def check_claim(report: Mapping[str, Any]) -> None:
    """Raises ``PrivacyError`` (exit code 13) where the audited epsilon is above the claimed one."""
    if line := claim_broken(report):
        raise PrivacyError(line)


def signed(report: Mapping[str, Any], key: SigningKey | None) -> dict[str, Any]:
    """The report with the key and its signature of all the rest; both empty without a key."""
    said = {**report, "key": "" if key is None else key.public}
    return {**said, "signature": "" if key is None else key.sign("leakage", canonical(said))}


def key_of(folder: RunFolder, given: Path | None) -> SigningKey | None:
    """The key that signs the report of a run: the one that is given, or the run's own where it is still there.

    Raises:
        SignatureError: It is not a key.
    """
    own = config_of(folder).record.audit_key
    place = given or (own if own is not None and own.is_file() else folder.part("federated").path / KEY_FILE)
    return read_key(place) if given is not None or place.is_file() else None


def audit_run(path: str | Path, *, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Attacks a run after the fact.

    Args:
        path: The run folder.
        changes: Settings of ``[audit]`` that are other than the run's; what was held back stays as it was.

    Raises:
        RunFolderError: There is no finished federated run, or its examples are at sites.
        SilotuneError: Its examples or its model are not here, or changed.
    """
    folder = RunFolder.open(path)
    config = config_of(folder)
    if "federated" not in config.federation.modes:
        raise RunFolderError(f"{str(path)!r} has no federated mode: nothing was sent that could be attacked")
    if folder.is_of_sites():
        raise RunFolderError(
            f"{str(path)!r} is of a run over sites, whose examples are not here: each audits its own, with 'silotune "
            f"site audit KIT --run {folder.path.name}'"
        )
    prepared = prepare(config)
    check_same_data(folder, prepared.skew)
    settings = config.audit.model_copy(update=dict(changes or {}))
    with operation_threads(prepared.threads.an_operation):
        return audited(prepared, folder, settings)
