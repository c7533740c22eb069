"""Data types that every layer shares: tensors by name, examples, requests, replies, states and records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "dict[str, torch.Tensor]"
JSON: TypeAlias = "None | bool | int | float | str | list[Any] | dict[str, Any]"
Row: TypeAlias = "dict[str, Any]"
Observer: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""Called as ``observer(event, fields)`` while a run goes on; must not change anything."""
Pair: TypeAlias = "tuple[str, str]"
"""A turn of a chat, as (role, content)."""
TOOLS = "tools"
"""Role of a turn before all others whose content is the JSON of the tools that the assistant may call."""


class Turn(tuple[str, str]):
    """A turn that says more than its role and content: a ``Pair`` all the same.

    Attributes:
        more: JSON of what a chat template shows of it beside these, such as ``tool_calls``; empty for nothing.
        is_learnt: Whether an assistant's turn is learnt; False where it is only read.
    """

    more: str
    is_learnt: bool

    def __new__(cls, pair: Pair, more: str = "", *, is_learnt: bool = True) -> Turn:
        """The pair with what it says besides."""
        made = super().__new__(cls, pair)
        made.more, made.is_learnt = more, is_learnt
        return made

    def __eq__(self, other: object) -> bool:
        """Whether both say the same; one that is only read says no less."""
        return super().__eq__(other) and self.more == getattr(other, "more", "")

    def __ne__(self, other: object) -> bool:
        """Not ``==``: a tuple has its own."""
        return not self == other

    def __hash__(self) -> int:
        """As that of a pair."""
        return super().__hash__()

    def __repr__(self) -> str:
        """All that it says: a digest of examples is made of this."""
        return f"Turn({super().__repr__()}, {self.more!r}, is_learnt={self.is_learnt})"


def more_of(turn: Pair) -> str:
    """What a turn says beside its role and content, as JSON; empty for nothing."""
    return turn.more if isinstance(turn, Turn) else ""


def is_learnt(turn: Pair) -> bool:
    """Whether a turn is the assistant's, and not only read."""
    return turn[0] == "assistant" and (turn.is_learnt if isinstance(turn, Turn) else True)


def as_messages(turns: Iterable[Pair]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Turns as a chat template takes them: the messages, and the tools; None where there are none."""
    tools, messages = None, []
    for turn in turns:
        if turn[0] == TOOLS:
            tools = json.loads(turn[1])
        else:
            messages.append({"role": turn[0], "content": turn[1], **json.loads(more_of(turn) or "{}")})
    return messages, tools


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised example, still as text.

    Attributes:
        messages: Turns before the answer as (role, content), some of them a ``Turn``; roles are system, user,
            assistant, tool, and before all others ``TOOLS``.
        answer: The text to be produced.
        options: The closed set that ``answer`` is one of; empty for open answers.
        label: Index of ``answer`` in ``options``; -1 for open answers.
        fields: Values that a partition may use, such as ``label``, ``subject`` or ``source``.
        rejected: The worse of two answers, where ``answer`` is the preferred one; empty where there is no pair.
        wanted: Whether a single answer that was judged is a good one; None where nothing was judged.
        text: The row's own words without the prompt's wording: the columns that the prompt shows, in its order;
            empty where there is no such prompt.
        shorten: Where in the last turn's content columns stand that alone are cut while anything is left of them, as
            (start, end).
        calls: What the answer says besides, as ``Turn.more``: its calls of tools.
    """

    messages: tuple[Pair, ...]
    answer: str
    options: tuple[str, ...] = ()
    label: int = -1
    fields: Mapping[str, str] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    rejected: str = ""
    wanted: bool | None = None
    calls: str = field(default="", repr=False)
    shorten: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @property
    def is_document(self) -> bool:
        """Whether this is plain text: ``answer`` is all of it, and there is no prompt."""
        return not self.messages


@dataclass(frozen=True, slots=True)
class Request:
    """What a coordinator asks of one client: kind (such as ``train``), adapter tensors, and a body of plain JSON.

    ``wire`` is what travels instead of ``tensors`` where a link compresses them; the client unpacks it to ``tensors``.
    ``head`` is the signed end of the coordinator's audit trail at that time; empty where none is kept.
    """

    kind: str
    round_number: int
    client: str
    tensors: Tensors
    body: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""
    wire: Tensors | None = None

    def as_sent(self) -> Request:
        """The request with the tensors that travel."""
        return self if self.wire is None else replace(self, tensors=self.wire, wire=None)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client sends back: for ``train`` the adapter delta, its weight and metrics.

    ``simulated_seconds`` is when it arrived, since the run began, where a simulated clock runs.
    ``signature`` is the site's, where it has a key; ``digest`` is that of the tensors as they travelled, where the
    reply is signed. ``read`` is the checked body, once the coordinator believes the reply.
    """

    kind: str
    round_number: int
    client: str
    tensors: Tensors
    body: Mapping[str, Any] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    signature: str = ""
    digest: str = ""
    simulated_seconds: float | None = None
    read: Any = None


BUDGET = "privacy"
"""Stage of a failure where the client refused because its privacy budget does not allow the round."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A client that gave no usable reply: where, when, and why in one line without any of its text.

    ``bytes_down`` is the size of the request that was sent all the same, ``bytes_up`` that of a reply that could not
    be used; ``simulated_seconds`` is when the wait for it ended, where a simulated clock runs;
    ``rule`` is the rule of the site's policy that refused, empty for other failures.
    """

    client: str
    round_number: int
    stage: str
    reason: str
    bytes_down: int = 0
    bytes_up: int = 0
    rule: str = ""
    simulated_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU time over all cores, and energy; None where it is not known."""

    core_seconds: float = 0.0
    joules: float | None = 0.0

    def __add__(self, other: Spent) -> Spent:
        known = self.joules is not None and other.joules is not None
        return Spent(
            self.core_seconds + other.core_seconds,
            (self.joules or 0.0) + (other.joules or 0.0) if known else None,
        )

    def __sub__(self, other: Spent) -> Spent:
        known = self.joules is not None and other.joules is not None
        return Spent(
            self.core_seconds - other.core_seconds,
            (self.joules or 0.0) - (other.joules or 0.0) if known else None,
        )

    def __truediv__(self, parts: int) -> Spent:
        return Spent(self.core_seconds / parts, None if self.joules is None else self.joules / parts)


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """One client's contribution to an aggregate.

    Attributes:
        client: Its name.
        delta: Trained minus received adapter tensors, and what else a method sends beside them.
        num_examples: Examples behind it.
        loss: Mean training loss of its round; None where the client withholds it.
        steps: Optimiser steps behind it.
        weight: What it counts in a weighted mean, not negative; None for its examples.
    """

    client: str
    delta: Tensors
    num_examples: int
    loss: float | None = 0.0
    steps: int = 1
    weight: float | None = None

    @property
    def counts(self) -> float:
        """Its weight, before the weights of a round are scaled to sum to one."""
        return self.num_examples if self.weight is None else self.weight


@dataclass(frozen=True, slots=True)
class SiteState:
    """What a client keeps between rounds, in groups; one part of the code owns each group.

    Attributes:
        optimizer: Moments of the local optimiser, as ``moment/parameter``.
        control: The client's control of every trained tensor (SCAFFOLD, FedDyn).
        received: What its link received last, where requests carry changes to it.
        residual: What its link left out of the last update, where updates are compressed.
        own: Its own model's tensors, by their names in the adapter.
        pending: A reply on its way, where a simulated clock runs.
        data: Plain values: entries of its privacy ledger, and what a pending reply says.
    """

    optimizer: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)
    received: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)
    pending: Tensors = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def groups(self) -> dict[str, Tensors]:
        """The groups that hold tensors, by name."""
        names = ("optimizer", "control", "received", "residual", "own", "pending")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept."""
        return not self.groups() and not self.data


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the coordinator keeps between rounds; with the sites' states it is a whole checkpoint.

    Attributes:
        round_number: Rounds completed.
        weights: Adapter tensors of the global model.
        memory: The server step's own tensors (momentum, second moments).
        best_round: Round with the best selection metric so far, 0 before any.
        best_metric: That metric; None before any.
        best_weights: Adapter tensors of that round; empty when not kept.
        seconds: Wall seconds spent by all sessions of the run up to here.
        bytes_up: Encoded bytes of all replies so far.
        bytes_down: Encoded bytes of all requests so far.
        joules: Spent so far by clients and coordinator; None where some of it is not known.
        stopped: Why the run ended before its last round; empty otherwise.
        held: Adapter tensors that ``holders`` received last, where requests carry changes to them; else empty.
        holders: Clients that answered the last round, and so hold these tensors.
        simulated_seconds: By a simulated clock, since the run began; 0 without one.
        privacy: What differential privacy keeps: the largest epsilon so far, entries of the ledger, the clip bound.
        excluded: Clients that are no longer asked because they have lied in a protected sum, and why.
    """

    round_number: int
    weights: Tensors
    memory: Tensors = field(default_factory=dict)
    best_round: int = 0
    best_metric: float | None = None
    best_weights: Tensors = field(default_factory=dict)
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    joules: float | None = 0.0
    stopped: str = ""
    held: Tensors = field(default_factory=dict)
    holders: tuple[str, ...] = ()
    simulated_seconds: float = 0.0
    privacy: Mapping[str, Any] = field(default_factory=dict)
    excluded: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of a run's metrics: the round, what was measured, and what it cost.

    ``crossings`` says what went between clients and a compute server, which trains a part of the model.
    """

    round_number: int
    metrics: Mapping[str, Any]
    clients: tuple[str, ...]
    failures: tuple[Failure, ...]
    train_loss: float | None
    train_seconds: float
    evaluate_seconds: float
    bytes_up: int
    bytes_down: int
    cost: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float | None = None
    aggregation_error: float | None = None
    simulated_seconds: float | None = None
    crossings: Mapping[str, Any] = field(default_factory=dict)
