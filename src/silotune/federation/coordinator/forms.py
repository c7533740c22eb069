"""What the body of each kind of reply may hold: the forms that ``kinds`` names, checked before a reply is believed.

Scores come as ``evaluation.figures`` makes them of the order's labels. A site's policy may withhold any of them, which
is then None, and give rates in steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

from pydantic import Field, FiniteFloat

from silotune.errors import MessageError
from silotune.evaluation.metrics import CALIBRATION_BINS
from silotune.federation.kinds import ReplyForm, kind_named
from silotune.federation.wire.messages import MOST_COUNTED, Nats, read_body, read_report
from silotune.federation.wire.orders import EvaluateOrder
from silotune.federation.wire.sum_orders import AcceptReport, CheckReport, InputReport, SharesReport, UnmaskReport
from silotune.privacy.secure_sum.terms import SignedKeys
from silotune.settings.base import Positive, Section
from silotune.settings.sections import Scoring
from silotune.structs import Reply, Request

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


def check_body(reply: Reply, request: Request) -> None:
    """Refuses a reply whose body does not have the form of its kind.

    Raises:
        MessageError: A value is missing, left over, or cannot be.
    """
    FORMS[kind_named(reply.kind).reply](reply, request)


def _check_scores(reply: Reply, request: Request) -> None:
    order = read_body(EvaluateOrder, request)
    if not order.labels:
        read_body(OpenScores if "loss" in reply.body else PairScores, reply)
        return
    scores = read_body(LikelihoodScores if order.scoring == "likelihood" else OptionScores, reply)
    if odd := _odd_figure(scores, order):
        raise MessageError(f"the body of this {reply.kind} reply is not valid at {odd!r}")


def _odd_figure(scores: OptionScores, order: EvaluateOrder) -> str | None:
    """The first figure that cannot be one of these labels and as many examples; None for none."""
    faults = {
        "scoring": scores.scoring != order.scoring,
        "per_class": scores.per_class is not None and not _is_by_class(scores.per_class, scores, order.labels),
        "confusion": scores.confusion is not None and not _is_confusion(scores.confusion, scores, order.labels),
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


def _check_report(reply: Reply, request: Request) -> None:
    read_report(reply)


def _check_section(form: type[Section], reply: Reply, request: Request) -> None:
    read_body(form, reply)


FORMS: Mapping[ReplyForm, Callable[[Reply, Request], None]] = {
    "nothing": partial(_check_section, Section),
    "report": _check_report,
    "scores": _check_scores,
    "keys": partial(_check_section, SignedKeys),
    "shares": partial(_check_section, SharesReport),
    "complaints": partial(_check_section, AcceptReport),
    "answers": partial(_check_section, InputReport),
    "agreement": partial(_check_section, CheckReport),
    "opened": partial(_check_section, UnmaskReport),
}
"""Form -> what refuses a body that does not have it."""
