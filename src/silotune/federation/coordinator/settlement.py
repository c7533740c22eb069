"""What a coordinator believes of what comes back. It uses nothing that has not passed ``settle``.

A reply is believed where it answers a request that was made, once, in the site's own name and under its own signature;
where its body has the form of its kind and says what can be true; and where its tensors have the shapes that were asked
for and values that can be added up. Whatever else goes wrong while one site's answer is looked at is that site's
failure, under its name, and the others' answers go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from silotune.errors import MessageError, require
from silotune.federation.coordinator import audit as audit_trail
from silotune.federation.coordinator import forms
from silotune.federation.coordinator.audit import Audit, Digests
from silotune.federation.coordinator.decisions import MOST_TRIES
from silotune.federation.kinds import kind_named
from silotune.federation.wire.messages import TrainReport
from silotune.federation.wire.run_setup import RunSettings
from silotune.privacy.accountant import Spend, epsilon
from silotune.record.plain_json import check_form
from silotune.settings.base import Section
from silotune.settings.sections import PrivacySection, TrainingSection
from silotune.structs import Failure, Reply, Request, Tensors
from silotune.tensors import all_finite, check_alike, largest
from silotune.training.release import release_of

_LOG = logging.getLogger(__name__)
LARGEST_VALUE = 1e12
"""The largest value in an update: the squares of a billion such values still add up in 32 bits, and no adapter comes
near it."""
MOST_WATTS, SPARE_JOULES = 2e5, 1e5
"""The most power of one site by the coordinator's clock, and energy on top. A site that reports more is refused, so
that it cannot use up the budget of joules."""
UNKNOWN = "unknown"
"""The name under which an answer is recorded that comes from none of the clients."""


@dataclass
class Settlement:
    """The requests of one exchange, and who has been believed so far.

    Attributes:
        requests: What was sent, by client.
        settings: Of the run; they say what a reply may hold.
        audit: The trail that believed replies and failures enter; None where none is kept.
        shapes: Client -> tensors of the shapes that its update must have; empty for kinds without updates.
        oldest_round: Rounds from which replies may still come, where rounds are asynchronous; None for this one alone.
        reported: What bounds an epsilon in a report; None where sites add no noise, so that there is none.
        clock: Seconds that only grow.
    """

    requests: Mapping[str, Request]
    settings: RunSettings = RunSettings()
    audit: Audit | None = None
    shapes: Mapping[str, Tensors] = field(default_factory=dict)
    oldest_round: int | None = None
    reported: Reported | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._answered: set[str] = set()
        self._digests = Digests()
        self._began = self.clock()

    def settled(self, outcomes: Iterator[Reply | Failure]) -> Iterator[Reply | Failure]:
        """What came in, one after the other, as it is believed."""
        for outcome in outcomes:
            yield self.settle(outcome)
            del outcome  # or a reply would live on until the next one is there

    def settle(self, outcome: Reply | Failure) -> Reply | Failure:
        """A reply that is believed, or a failure; either stands in the trail."""
        if isinstance(outcome, Failure):
            failure = outcome if outcome.client in self.requests else replace(outcome, client=UNKNOWN)
        else:
            try:
                outcome = replace(outcome, read=self._read(outcome))
                audit_trail.believes(self.audit, outcome, self.requests.get(outcome.client), self._digests)
                self._answered.add(outcome.client)
                return outcome
            except MessageError as error:
                failure = self._failure(outcome, str(error))
            except Exception as error:  # noqa: BLE001  # whatever a site's answer brings about is that site's failure
                _LOG.warning("an answer of %s: %s", outcome.client, type(error).__name__, exc_info=True)
                failure = self._failure(outcome, f"the answer cannot be used: {type(error).__name__}")
        audit_trail.fails(self.audit, failure)
        return failure

    def _failure(self, reply: Reply, reason: str) -> Failure:
        client = reply.client if reply.client in self.requests else UNKNOWN
        number = max((request.round_number for request in self.requests.values()), default=0)
        return Failure(client, number, "reply", reason, reply.bytes_down, reply.bytes_up)

    def _read(self, reply: Reply) -> Section:
        """What the body of a reply says, where all of it can be believed."""
        request = self.requests.get(reply.client)
        if request is None or reply.kind != request.kind or not self._is_of_round(reply, request):
            number = request.round_number if request is not None else "this exchange"
            raise MessageError(f"a reply answers no request of round {number}")
        if reply.client in self._answered:
            raise MessageError(f"{reply.client!r} replied twice in round {reply.round_number}")
        check_form(_plain(reply.body), "reply")
        said = forms.read(reply, self.settings)
        if isinstance(said, TrainReport):
            self._check_report(said, reply.client)
        if reply.client in self.shapes and kind_named(reply.kind).sends_update:
            check_alike(self.shapes[reply.client], reply.tensors)
        check_values(reply)
        return said

    def _is_of_round(self, reply: Reply, request: Request) -> bool:
        oldest = request.round_number if self.oldest_round is None else self.oldest_round
        return oldest <= reply.round_number <= request.round_number

    def _check_report(self, report: TrainReport, client: str) -> None:
        """Refuses a report of more energy or epsilon than a site can have spent since it was asked."""
        most = SPARE_JOULES + MOST_WATTS * (self.clock() - self._began)
        if report.joules is not None and report.joules > most and self.oldest_round is None:
            raise MessageError(f"{report.joules:.3g} joules are more than {client!r} can have used meanwhile")
        check_epsilon(report, self.reported)


def check_values(reply: Reply) -> None:
    """Refuses tensors that cannot be added up.

    Raises:
        MessageError: A value is not finite, or larger than a value of an update may be.
    """
    if not all_finite(reply.tensors):
        raise MessageError(f"the update of {reply.client!r} holds values that are not finite")
    floating = {name: tensor for name, tensor in reply.tensors.items() if tensor.is_floating_point()}
    if (found := largest(floating)) > LARGEST_VALUE:
        raise MessageError(
            f"the update of {reply.client!r} holds a value of {found:.3g}: at most {LARGEST_VALUE:g} is taken"
        )


def _plain(value: Any) -> Any:
    """A body that this process made as plain JSON, with lists for tuples; a decoded body is plain already."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


SPARE_ROUNDS = 10
"""Rounds that a killed run may have begun in addition to its own; sites were charged for these, too."""
_ROUNDING = 1 + 1e-6


@dataclass(frozen=True)
class Reported:
    """What bounds an epsilon in a report.

    Attributes:
        privacy: The run's ``[privacy]`` section.
        training: Its ``[training]`` section.
        rounds: Of the run.
        is_tried_again: Whether a round with too few replies is done again, which costs its sites once more.
    """

    privacy: PrivacySection
    training: TrainingSection
    rounds: int
    is_tried_again: bool = False

    def __post_init__(self) -> None:
        if self.privacy.dp.is_at_site and self.privacy.guarantee.epsilon is None:
            require("dp_accounting", extra="dp")

    def most(self, num_examples: int) -> float:
        """For a site with so many examples: ``privacy.dp.epsilon``, or what all rounds of such a site cost.

        Counted by moments, which is quick, and looser than the accountant that a site may count with.
        """
        if self.privacy.guarantee.epsilon is not None:
            return self.privacy.guarantee.epsilon * _ROUNDING
        spend = release_of(self.privacy, self.training, num_examples=num_examples, rounds=self.rounds)
        rounds = (self.rounds + SPARE_ROUNDS) * (MOST_TRIES if self.is_tried_again else 1)
        return _cost(spend.noise_multiplier, spend.sampling_rate, spend.steps * rounds, self.privacy.guarantee.delta)


def check_epsilon(report: TrainReport, facts: Reported | None) -> None:
    """Refuses an epsilon that no site of the run can have reached.

    Args:
        report: A site's.
        facts: Of the run; None where its sites add no noise of their own.

    Raises:
        MessageError: The epsilon is too large, or the sites of this run add no noise.
    """
    if report.epsilon is None:
        return
    if facts is None or not facts.privacy.dp.is_at_site:
        raise MessageError("a report names an epsilon, and the sites of this run add no noise")
    most = facts.most(report.num_examples)
    if report.epsilon > most:
        raise MessageError(f"a report names epsilon = {report.epsilon:.4g}: at most {most:.4g} can have been spent")


@lru_cache(1024)
def _cost(noise: float, rate: float, steps: int, delta: float) -> float:
    return epsilon([Spend(noise, rate, steps)], delta, accountant="rdp")
