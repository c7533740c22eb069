"""What the body of each kind of reply may hold: ``kinds`` names the readers, and nothing is believed before.

Scores come as ``evaluation.figures`` makes them of the order's labels. A site's policy may withhold any of them, which
is then None, and give rates in steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, FiniteFloat

from silotune.errors import MessageError
from silotune.evaluation.metrics import CALIBRATION_BINS
from silotune.federation.kinds import kind_named
from silotune.federation.wire.messages import MOST_COUNTED, Nats, TrainReport, read_body, read_report
from silotune.federation.wire.run_settings import RunSettings
from silotune.federation.wire.sum_orders import AcceptReport, CheckReport, InputReport, SharesReport, UnmaskReport
from silotune.privacy.secure_sum.terms import SignedKeys
from silotune.settings.base import Positive, Section
from silotune.settings.sections import Scoring
from silotune.structs import Reply

Count = Annotated[int, Field(ge=0, le=MOST_COUNTED)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Change = Annotated[FiniteFloat, Field(ge=-1, le=1)]
"""The difference of two such shares."""


class OneClass(Section):
    """Of one label: ``support`` examples have it."""

    precision: Share
    recall: Share
    f1: Share
    support: Count


class OneBin(Section):
    """Of the examples whose confidence lies in one interval."""

    begin: Share = Field(alias="from")
    end: Share = Field(alias="to")
    num_examples: Count
    confidence: Share
    accuracy: Share


class Scores(Section):
    """What all scores begin with."""

    num_examples: Annotated[Positive, Field(le=MOST_COUNTED)]


class OptionScores(Scores):
    """Of answers out of a closed set, as far as they were generated."""

    scoring: Scoring
    accuracy: Share | None
    macro_f1: Share | None
    unparsed: Share | None
    per_class: dict[str, OneClass] | None
    confusion: tuple[tuple[Count, ...], ...] | None


class LikelihoodScores(OptionScores):
    """The same where the likeliest option was taken, so that its probability is known."""

    ece: Share | None
    reliability: Annotated[tuple[OneBin, ...], Field(max_length=CALIBRATION_BINS)] | None


class OpenScores(Scores):
    """Of open answers; no perplexity is above the exponential of 700."""

    loss: Nats | None
    perplexity: Annotated[FiniteFloat, Field(ge=0, le=math.exp(700.0))] | None


class PairScores(Scores):
    """Of pairs of answers."""

    preference_accuracy: Share | None
    gain: Change | None
    win_rate: Share | None
    start_accuracy: Share | None
    margin: Nats | None


def read(reply: Reply, settings: RunSettings) -> Section:
    """The body of a reply in the form of its kind.

    Raises:
        MessageError: A value is missing, left over, or cannot be.
    """
    made: Section = kind_named(reply.kind).read(reply, settings)
    return made


def scores(reply: Reply, settings: RunSettings) -> Scores:
    """Figures of a model on the site's own examples, over the labels of the run."""
    if not settings.labels:
        return read_body(OpenScores if "loss" in reply.body else PairScores, reply)
    form = LikelihoodScores if settings.evaluation.scoring == "likelihood" else OptionScores
    found = read_body(form, reply)
    if odd := _odd_figure(found, settings):
        raise MessageError(f"the body of this {reply.kind} reply is not valid at {odd!r}")
    return found


def _odd_figure(scores: OptionScores, settings: RunSettings) -> str | None:
    """The first figure that cannot be one of these labels and as many examples; None for none."""
    faults = {
        "scoring": scores.scoring != settings.evaluation.scoring,
        "per_class": scores.per_class is not None and not _is_by_class(scores.per_class, scores, settings.labels),
        "confusion": scores.confusion is not None and not _is_confusion(scores.confusion, scores, settings.labels),
        "reliability": isinstance(scores, LikelihoodScores)
        and scores.reliability is not None
        and sum(one.num_examples for one in scores.reliability) != scores.num_examples,
    }
    return next((name for name, is_odd in faults.items() if is_odd), None)


def _is_by_class(by_class: Mapping[str, OneClass], scores: Scores, labels: Sequence[str]) -> bool:
    return by_class.keys() == set(labels) and sum(one.support for one in by_class.values()) == scores.num_examples


def _is_confusion(rows: Sequence[Sequence[int]], scores: Scores, labels: Sequence[str]) -> bool:
    """A row a label, in it a column a label and one for what names none, and every example in one cell."""
    has_shape = [len(row) for row in rows] == [len(labels) + 1] * len(labels)
    return has_shape and sum(map(sum, rows)) == scores.num_examples


def report(reply: Reply, settings: RunSettings) -> TrainReport:
    """What an update weighs and what it took."""
    return read_report(reply)


def empty(reply: Reply, settings: RunSettings) -> Section:
    """Nothing beside the tensors."""
    return read_body(Section, reply)


def keys(reply: Reply, settings: RunSettings) -> SignedKeys:
    """A site's keys for one secure sum."""
    return read_body(SignedKeys, reply)


def shares(reply: Reply, settings: RunSettings) -> SharesReport:
    """Sealed shares."""
    return read_body(SharesReport, reply)


def complaints(reply: Reply, settings: RunSettings) -> AcceptReport:
    """The owners of shares that cannot be opened."""
    return read_body(AcceptReport, reply)


def answers(reply: Reply, settings: RunSettings) -> InputReport:
    """What those that complain were given."""
    return read_body(InputReport, reply)


def agreement(reply: Reply, settings: RunSettings) -> CheckReport:
    """A signature under the list of inputs."""
    return read_body(CheckReport, reply)


def opened(reply: Reply, settings: RunSettings) -> UnmaskReport:
    """Revealed shares."""
    return read_body(UnmaskReport, reply)
