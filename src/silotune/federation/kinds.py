"""The kinds of requests, each with a record of all that both sides must know of it. Other kinds are refused.

Both sides import this module, and neither imports the other's code: a record names a function of one side by its
place, and the function is imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from silotune.errors import MessageError, unknown_choice

TRAIN, EVALUATE, COUNTERSIGN, PERSONALIZE = "train", "evaluate", "countersign", "personalize"
LEAKAGE = "leakage"
EPSILON_RULES = ("largest_epsilon_run", "largest_epsilon_total")
"""Rules of a site's policy that refuse because the owner's privacy budget is spent."""


@dataclass(frozen=True)
class At:
    """A function, or a class, by its place below ``silotune.federation``; imported when it is called first."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        return self.found()(*args)

    def found(self) -> Callable[..., Any]:
        """The function."""
        function: Callable[..., Any] = getattr(import_module(f"silotune.federation.{self.module}"), self.name)
        return function


@dataclass(frozen=True)
class Body(At):
    """Reads a reply's body as one class of settings, which it names by its place."""

    def __call__(self, reply: Any, settings: Any) -> Any:
        """The body as an instance of the class."""
        read_body = At("wire.messages", "read_body").found()
        return read_body(self.found(), reply)


EMPTY = Body("wire.messages", "Section")
"""Of a reply that has nothing beside its tensors."""


def nothing(*args: Any) -> dict[str, Any]:
    """The layout of a message without tensors."""
    return {}


@dataclass(frozen=True)
class Kind:
    """What is true of one kind of request.

    Attributes:
        answer: What a site does, ``(Request, Site) -> Reply``.
        read: What a coordinator makes of the body of its reply, ``(Reply, RunSettings) -> Section``; it raises
            ``MessageError`` where that does not have the form of the kind.
        carries: The layout of a request's tensors at a site, ``(Known, Header, Layout) -> Layout``.
        returns: The layout of a reply's tensors, ``(Request, FederationSection) -> Layout``.
        trains: What a site sends back is learnt from its examples.
        scores: Exact figures on its examples are sent back.
        audits: What a model gives away of its examples is measured, and figures of that are sent back.
        ends_run: What is sent back vouches for the end of the run.
        sends_update: A change of the model is sent back.
        protection: The protection whose sum it is a step of, so that what is sent back is seen only within the sum;
            empty where each reply is seen alone.
        cohort: The path in its body to the sites of the sum, or to their number.
        first_round: The smallest round number that it may have. Training begins with round 1; what follows the
            training may also follow 0 rounds.
        message: The type of Flower's message that it travels as.
    """

    answer: Callable[..., Any]
    read: Callable[..., Any]
    carries: Callable[..., Any] = nothing
    returns: Callable[..., Any] = nothing
    trains: bool = False
    scores: bool = False
    audits: bool = False
    ends_run: bool = False
    sends_update: bool = False
    protection: str = ""
    cohort: tuple[str, ...] = ()
    first_round: int = 1
    message: Literal["train", "evaluate", "query"] = "query"

    @property
    def is_protected(self) -> bool:
        """Whether what is sent back is seen only within a sum."""
        return bool(self.protection)

    @property
    def is_seen_alone(self) -> bool:
        """Whether its reply shows the coordinator this site's own update or figures."""
        return (self.trains or self.scores or self.audits) and not self.is_protected

    @property
    def uses_examples(self) -> bool:
        """Whether a site uses its examples for it; then it carries an adapter, and its body is or holds an order."""
        return self.trains or self.scores or self.audits


def _of_masks(step: str, report: str, *, within: str = "site.secure_sum", **facts: Any) -> Kind:
    """A step of a secure sum."""
    return Kind(At(within, step), Body("wire.sum_orders", report), protection="secure_sum", **facts)


def _of_ciphers(step: str, returns: str, *, within: str = "site.encrypted_sum", **facts: Any) -> Kind:
    """A step of an encrypted sum, whose replies say nothing beside their tensors."""
    layout = At("wire.sum_orders", returns)
    return Kind(At(within, step), EMPTY, returns=layout, protection="he", **facts)


_INPUT: Mapping[str, Any] = {
    "within": "site.client",
    "trains": True,
    "sends_update": True,
    "carries": At("site.layouts", "model"),
}
KINDS: Mapping[str, Kind] = {
    TRAIN: Kind(
        At("site.client", "train"),
        At("coordinator.forms", "report"),
        carries=At("site.layouts", "linked_model"),
        returns=At("wire.orders", "trained_layout"),
        trains=True,
        sends_update=True,
        message="train",
    ),
    PERSONALIZE: Kind(
        At("site.client", "personalize"),
        At("coordinator.forms", "report"),
        carries=At("site.layouts", "model"),
        trains=True,
    ),
    EVALUATE: Kind(
        At("site.client", "score"),
        At("coordinator.forms", "scores"),
        carries=At("site.layouts", "whole"),
        scores=True,
        first_round=0,
        message="evaluate",
    ),
    LEAKAGE: Kind(
        At("site.leakage", "measure"),
        Body("coordinator.forms", "Leakage"),
        carries=At("site.layouts", "whole"),
        audits=True,
        first_round=0,
        message="evaluate",
    ),
    COUNTERSIGN: Kind(At("site.client", "countersign"), EMPTY, first_round=0, ends_run=True),
    "secure_sum.keys": _of_masks("advertise_keys", "SignedKeys", cohort=("terms", "cohort")),
    "secure_sum.shares": _of_masks("share_keys", "SharesReport", cohort=("keys",)),
    "secure_sum.accept": _of_masks("accept_shares", "AcceptReport", cohort=("arrived",)),
    "secure_sum.input": _of_masks(
        "train_masked", "InputReport", returns=At("wire.sum_orders", "input_layout"), cohort=("arrived",), **_INPUT
    ),
    "secure_sum.check": _of_masks("check_survivors", "CheckReport", cohort=("survivors",)),
    "secure_sum.unmask": _of_masks("reveal_shares", "UnmaskReport"),
    "he.weight": _of_ciphers("encrypt_weight", "weight_layout"),
    "he.input": _of_ciphers("train_encrypted", "update_layout", cohort=("clients",), **_INPUT),
    "he.open": _of_ciphers("open_sum", "open_layout", carries=At("wire.sum_orders", "carried_sum")),
}
"""Kind of request -> its record."""


def steps_of(protection: str) -> tuple[str, ...]:
    """The kinds of requests that make a round under ``privacy.protection``, in their order."""
    return tuple(name for name, kind in KINDS.items() if kind.protection == protection and protection) or (TRAIN,)


def kind_named(name: str) -> Kind:
    """The record of a kind.

    Raises:
        MessageError: There is no such kind.
    """
    if name not in KINDS:
        raise MessageError(unknown_choice("request", name, KINDS))
    return KINDS[name]
