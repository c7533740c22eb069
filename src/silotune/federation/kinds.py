"""The kinds of requests: one record each of all that both sides must know of it. A kind without one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from silotune.errors import MessageError, unknown_choice

TRAIN, EVALUATE = "train", "evaluate"
"""The orders that a submitter signs: how to train, and how to score."""
ReplyForm = Literal["nothing", "report", "scores", "keys", "shares", "complaints", "answers", "agreement", "opened"]
"""What the body of a reply may hold; ``replies.FORMS`` checks each of them."""


@dataclass(frozen=True)
class Kind:
    """What is true of one kind of request.

    Attributes:
        reply: What the body of its reply may hold: nothing is believed of a body without a form.
        trains: What a site sends back is learnt from its examples.
        scores: Exact figures on its examples are sent back.
        sends_update: A change of the model is sent back.
        carries_adapter: The request's tensors are an adapter.
        is_protected: What is sent back is seen by nobody but within a sum.
        order: Which of the signed orders its body is, or holds under ``train`` in a protected sum; empty for bodies
            that no submitter can know beforehand, such as keys, which the protocol of a sum checks.
        cohort: Where its body names the sites of the sum, or how many they are.
        first_round: The least round that it can be of: a round of training begins at 1, what comes after all rounds
            may come after none.
    """

    reply: ReplyForm
    trains: bool = False
    scores: bool = False
    sends_update: bool = False
    carries_adapter: bool = False
    is_protected: bool = False
    order: str = ""
    cohort: tuple[str, ...] = ()
    first_round: int = 1

    @property
    def is_seen_alone(self) -> bool:
        """Whether its reply shows the coordinator this site's own update or figures."""
        return (self.trains or self.scores) and not self.is_protected

    @property
    def is_metered(self) -> bool:
        """Whether its reply says what the client spent."""
        return self.trains and not self.is_protected


_INPUT = {"trains": True, "sends_update": True, "carries_adapter": True, "is_protected": True, "order": TRAIN}
KINDS: Mapping[str, Kind] = {
    "train": Kind("report", trains=True, sends_update=True, carries_adapter=True, order=TRAIN),
    "personalize": Kind("report", trains=True, carries_adapter=True, order=TRAIN),
    "evaluate": Kind("scores", scores=True, carries_adapter=True, order=EVALUATE, first_round=0),
    "countersign": Kind("nothing", first_round=0),
    "secure_sum.keys": Kind("keys", is_protected=True, cohort=("terms", "cohort")),
    "secure_sum.shares": Kind("shares", is_protected=True, cohort=("keys",)),
    "secure_sum.accept": Kind("complaints", is_protected=True, cohort=("arrived",)),
    "secure_sum.input": Kind("answers", **_INPUT, cohort=("arrived",)),  # type: ignore[arg-type]
    "secure_sum.check": Kind("agreement", is_protected=True, cohort=("survivors",)),
    "secure_sum.unmask": Kind("opened", is_protected=True),
    "he.weight": Kind("nothing", is_protected=True),
    "he.input": Kind("nothing", **_INPUT, cohort=("clients",)),  # type: ignore[arg-type]
    "he.open": Kind("nothing", is_protected=True),
}
"""Kind of request -> its record."""


def steps_of(protection: str) -> tuple[str, ...]:
    """The kinds of requests that make a round under ``privacy.protection``, in their order."""
    return tuple(name for name in KINDS if name.startswith(f"{protection}.")) or (TRAIN,)


def kind_named(name: str) -> Kind:
    """The record of a kind.

    Raises:
        MessageError: There is none: what is not listed is not done.
    """
    if name not in KINDS:
        raise MessageError(unknown_choice("request", name, KINDS))
    return KINDS[name]


EPSILON_RULES = ("largest_epsilon_run", "largest_epsilon_total")
"""Rules that refuse because the owner's privacy budget is spent."""
