"""What the body of each kind of reply may hold. ``kinds`` names the reader that checks a body before it is used.

Scores have the form that ``evaluation.figures`` gives them. A site's policy may withhold any of them, which is then
None, and may round rates to steps.
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
from silotune.federation.wire.run_setup import RunSettings
from silotune.settings.base import Positive, Section
from silotune.settings.sections import Scoring
from silotune.structs import Reply

Count = Annotated[int, Field(ge=0, le=MOST_COUNTED)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Change = Annotated[FiniteFloat, Field(ge=-1, le=1)]
"""The difference of two such shares."""


class OneClass(Section):
    """Scores of one label, which ``support`` examples have."""

    precision: Share
    recall: Share
    f1: Share
    support: Count


class OneBin(Section):
    """Scores of the examples whose confidence lies in one interval."""

    begin: Share = Field(alias="from")
    end: Share = Field(alias="to")
    num_examples: Count
    confidence: Share
    accuracy: Share


class Scores(Section):
    """What all scores begin with."""

    num_examples: Annotated[Positive, Field(le=MOST_COUNTED)]


class OptionScores(Scores):
    """Scores of answers from a closed set, with the figures that generated answers have, too."""

    scoring: Scoring
    accuracy: Share | None
    macro_f1: Share | None
    unparsed: Share | None
    per_class: dict[str, OneClass] | None
    confusion: tuple[tuple[Count, ...], ...] | None


class LikelihoodScores(OptionScores):
    """Scores of answers from a closed set where the likeliest option was taken, so that its probability is known."""

    ece: Share | None
    reliability: Annotated[tuple[OneBin, ...], Field(max_length=CALIBRATION_BINS)] | None


class OpenScores(Scores):
    """Scores of open answers; a perplexity is at most the exponential of 700."""

    loss: Nats | None
    perplexity: Annotated[FiniteFloat, Field(ge=0, le=math.exp(700.0))] | None


class PairScores(Scores):
    """Scores of pairs of answers."""

    preference_accuracy: Share | None
    gain: Change | None
    win_rate: Share | None
    start_accuracy: Share | None
    margin: Nats | None


class Leakage(Scores):
    """What a model gives away of a site's examples, as the site measured it; figures may be withheld."""

    others: Annotated[Positive, Field(le=MOST_COUNTED)]
    auc: Share | None
    auc_interval: tuple[Share, Share] | None
    advantage: Change | None


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
    """The first figure that does not fit the labels and the number of examples; None if all of them fit."""
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
    """Whether each label has a row, with a column for each label and one for none, and each example one cell."""
    has_shape = [len(row) for row in rows] == [len(labels) + 1] * len(labels)
    return has_shape and sum(map(sum, rows)) == scores.num_examples


def report(reply: Reply, settings: RunSettings) -> TrainReport:
    """The weight of an update and what it cost."""
    return read_report(reply)
