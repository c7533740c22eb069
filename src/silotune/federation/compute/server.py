"""The compute server of split training: it keeps the blocks between the clients' ones, and trains them.

It sees the states and gradients of every token at both cuts: whoever runs it can read the text (docs/split.md). How
clients share its part is a schedule: in turns, each on what the last one left (``serial``) or each on a copy of its own
(``hierarchical``); or together, in one pass over the batches of all (``client-batch``).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from silotune.errors import FederationError, MessageError
from silotune.federation.wire.crossings import (
    BACKWARD,
    BEFORE,
    BEHIND,
    DOWN,
    FORWARD,
    NORM,
    STEP,
    UP,
    VALUES,
    Codec,
    GradientBody,
    StepBody,
    Tally,
    answered,
    form_of,
    read_crossing,
)
from silotune.federation.wire.messages import read_body
from silotune.methods.optimizers import clip, learning_rate, optimizer_of
from silotune.models.elsewhere import Form
from silotune.models.threads import operation_threads
from silotune.seeds import derive
from silotune.settings.sections import TrainingSection
from silotune.settings.split import SplitSchedule, SplitSection
from silotune.structs import ClientUpdate, Request, Tensors
from silotune.tensors import subtract
from silotune.training.local import averaged, norms_of
from silotune.training.middle import Middle, joined

ALONE = torch.tensor([-1.0])
"""The norm in a reply to a step after which each party bounds its own gradient."""


@dataclass
class Part:
    """The server's part of a model, and how it trains.

    Attributes:
        middle: Its blocks.
        training: The run's ``[training]`` section.
        rounds: Of the run.
        seed: Of the run: dropout in these blocks draws from seeds of the server's own.
        optimizer: Of the round, or of a client's turn in it.
        passes: Forward passes of it.
    """

    middle: Middle
    training: TrainingSection
    rounds: int
    seed: int
    optimizer: torch.optim.Optimizer | None = None
    passes: int = 0

    def begin(self, tensors: Tensors, round_number: int) -> None:
        """Sets the part to these tensors, with a new optimiser."""
        self.middle.write(tensors)
        rate = learning_rate(self.training, round_number, self.rounds)
        self.optimizer = optimizer_of(self.training, self.middle.part.parameters, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.passes = 0

    def forward(self, states: torch.Tensor, form: Form, *, round_number: int, client: str) -> torch.Tensor:
        """A pass over a batch; what is drawn in it depends on the server's seed, round, client and pass alone."""
        self.passes += 1
        seed = derive(self.seed, "split", round_number=round_number, client=f"{client}#{self.passes}")
        with self._drawing(seed):
            return self.middle.forward(states, form)

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        if not self.middle.part.draws_randomly:
            yield
            return
        device = self.middle.part.base.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def step(self, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        """An optimiser step with the gradients summed over ``count`` terms; the norm of the whole model's gradient."""
        averaged(self.middle.part, count)
        own = norms_of(self.middle.part, self.middle.part.parameters)
        norm = torch.linalg.vector_norm(torch.cat([before, own, behind])) if self.training.clip_norm else None
        self._move(norm)
        return norm

    def step_alone(self, count: int) -> None:
        """The same, with the gradient of this part bounded by itself."""
        averaged(self.middle.part, count)
        self._move(None)

    def _move(self, norm: torch.Tensor | None) -> None:
        assert self.optimizer is not None
        clip(self.middle.parameters, self.training.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Schedule(ABC):
    """How the clients of a round share the server's part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.start: Tensors = {}
        self.number = 0

    def begin(self, number: int, tensors: Tensors, clients: Sequence[str]) -> None:
        """A round begins, perhaps again, with these tensors of the server's and these clients."""
        self.number, self.start = number, tensors

    @abstractmethod
    def forward(self, client: str, states: torch.Tensor, form: Form) -> torch.Tensor:
        """What the blocks make of a client's states [tokens, width]."""

    @abstractmethod
    def backward(self, client: str, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        """The gradient of a client's last states [tokens, width]; None if it is not wanted."""

    @abstractmethod
    def step(self, client: str, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        """A step after a client's batches; the norm of the whole gradient, None where each party bounds its own."""

    @abstractmethod
    def leave(self, client: str, *, is_done: bool) -> None:
        """A client's round is over: done, or broken off."""

    def beside(self, client: str) -> Tensors:
        """What a client's update has of the server's part: its change of the tensors."""
        return {}

    @abstractmethod
    def end(self) -> Tensors:
        """The server's tensors after the round; empty where they come from the updates."""


class InTurns(Schedule):
    """Client after client: each goes on from what the last one left. Of one that breaks off nothing stays."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._now: Tensors = {}
        self._turn = ""

    def begin(self, number: int, tensors: Tensors, clients: Sequence[str]) -> None:
        super().begin(number, tensors, clients)
        self._now, self._turn = tensors, ""

    def forward(self, client: str, states: torch.Tensor, form: Form) -> torch.Tensor:
        if client != self._turn:
            self._turn = client
            self.part.begin(self._from(), self.number)
        return self.part.forward(states, form, round_number=self.number, client=client)

    def backward(self, client: str, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        self._check(client)
        return self.part.middle.backward(gradient, is_wanted=is_wanted)

    def step(self, client: str, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        self._check(client)
        return self.part.step(count, before, behind)

    def leave(self, client: str, *, is_done: bool) -> None:
        if is_done and client == self._turn:
            self._kept(client, self.part.middle.read())
        self._turn = ""

    def end(self) -> Tensors:
        return self._now

    def _from(self) -> Tensors:
        return self._now

    def _kept(self, client: str, tensors: Tensors) -> None:
        self._now = tensors

    def _check(self, client: str) -> None:
        if client != self._turn:
            raise MessageError(f"it is not the turn of client {client!r}: a turn begins with a batch")


class OnCopies(InTurns):
    """A copy of the server's part for each client, averaged as the clients' own parts are: FedAvg of the whole."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._ends: dict[str, Tensors] = {}

    def begin(self, number: int, tensors: Tensors, clients: Sequence[str]) -> None:
        super().begin(number, tensors, clients)
        self._ends = {}

    def beside(self, client: str) -> Tensors:
        return subtract(self._ends.pop(client), self.start)

    def end(self) -> Tensors:
        return {}

    def _from(self) -> Tensors:
        return self.start

    def _kept(self, client: str, tensors: Tensors) -> None:
        self._ends[client] = tensors


class Together(Schedule):
    """All clients of a round at once: the server waits for the batch of each, and computes them in one pass.

    A client that leaves is waited for no more. The order of the clients in a pass is that of the round.
    """

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._meeting = threading.Condition()
        self._clients: list[str] = []
        self._given: dict[str, tuple[str, Any]] = {}
        self._made: dict[str, Any] = {}
        self._tokens: dict[str, int] = {}
        self._threads = torch.get_num_threads()

    def begin(self, number: int, tensors: Tensors, clients: Sequence[str]) -> None:
        super().begin(number, tensors, clients)
        self._clients, self._given, self._made = list(clients), {}, {}
        self.part.begin(tensors, number)

    def forward(self, client: str, states: torch.Tensor, form: Form) -> torch.Tensor:
        made: torch.Tensor = self._met(client, FORWARD, (states, form))
        return made

    def backward(self, client: str, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        made: torch.Tensor | None = self._met(client, BACKWARD, (gradient, is_wanted))
        return made

    def step(self, client: str, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        self._met(client, STEP, count)
        return None

    def leave(self, client: str, *, is_done: bool) -> None:
        with self._meeting:
            if client in self._clients:
                self._clients.remove(client)
                self._given.pop(client, None)
                self._work_if_all_came()

    def end(self) -> Tensors:
        return self.part.middle.read()

    def _met(self, client: str, kind: str, given: Any) -> Any:
        """Waits until every client has given what is next, and gives this one its share of what was made of it."""
        with self._meeting:
            if client not in self._clients:
                raise MessageError(f"client {client!r} takes no part in this round")
            self._given[client] = (kind, given)
            self._work_if_all_came()
            self._meeting.wait_for(lambda: client in self._made)
            made = self._made.pop(client)
        if isinstance(made, Exception):
            raise FederationError(f"the compute server's pass over all clients' batches failed: {made}") from made
        return made

    def _work_if_all_came(self) -> None:
        if not self._clients or self._given.keys() != set(self._clients):
            return
        given = {client: self._given[client] for client in self._clients}
        self._given = {}
        made: Mapping[str, Any]
        try:
            with operation_threads(self._threads):
                made = self._worked(given)
        except Exception as error:  # noqa: BLE001 - every client that waits is told
            made = dict.fromkeys(given, error)
        self._made.update(made)
        self._meeting.notify_all()

    def _worked(self, given: Mapping[str, tuple[str, Any]]) -> Mapping[str, Any]:
        kinds = {kind for kind, _ in given.values()}
        if len(kinds) > 1:
            raise MessageError("the clients of a round are not at the same point of a step")
        return _TOGETHER[kinds.pop()](self, {client: value for client, (_, value) in given.items()})

    def _forward(self, batches: Mapping[str, tuple[torch.Tensor, Form]]) -> Mapping[str, Any]:
        self._tokens = {client: form.tokens for client, (_, form) in batches.items()}
        states = torch.cat([states for states, _ in batches.values()])
        form = joined([form for _, form in batches.values()])
        return self._parted(self.part.forward(states, form, round_number=self.number, client="all"))

    def _backward(self, gradients: Mapping[str, tuple[torch.Tensor, bool]]) -> Mapping[str, Any]:
        for client, (gradient, _) in gradients.items():
            if len(gradient) != self._tokens.get(client):
                raise MessageError(f"gradients of {len(gradient)} tokens came that are not those of the last batch")
        width = self.part.middle.width
        nothing = {client: torch.zeros(count, width) for client, count in self._tokens.items()}  # of who has left
        given = {**nothing, **{client: gradient for client, (gradient, _) in gradients.items()}}
        are_wanted = {client: is_wanted for client, (_, is_wanted) in gradients.items()}
        made = self.part.middle.backward(torch.cat(list(given.values())), is_wanted=any(are_wanted.values()))
        parts = {} if made is None else self._parted(made)
        return {client: parts[client] if is_wanted else None for client, is_wanted in are_wanted.items()}

    def _parted(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each client's share of the states of the last pass."""
        return dict(zip(self._tokens, torch.split(states, list(self._tokens.values())), strict=True))

    def _step(self, counts: Mapping[str, int]) -> Mapping[str, Any]:
        self.part.step_alone(sum(counts.values()))
        return dict.fromkeys(counts)


_TOGETHER: Mapping[str, Callable[[Together, Any], Mapping[str, Any]]] = {
    FORWARD: Together._forward,
    BACKWARD: Together._backward,
    STEP: Together._step,
}
"""Kind of message -> what is made for each client of what all clients gave, in their order."""

SCHEDULES: Mapping[SplitSchedule, type[Schedule]] = {
    "serial": InTurns,
    "client-batch": Together,
    "hierarchical": OnCopies,
}
"""``federation.split.schedule`` -> how the clients of a round share the server's part."""


class ComputeServer:
    """The compute server as its clients and the coordinator see it.

    Args:
        part: The blocks that it has, and how they train.
        split: The run's ``[federation.split]``.
        tally: Counts what crosses.
    """

    def __init__(self, part: Part, split: SplitSection, tally: Tally) -> None:
        self._schedule = SCHEDULES[split.schedule](part)
        self._codec = Codec(split.compress, part.middle.width)
        self._tally = tally
        self._names = tuple(part.middle.part.parameters)
        self._most_positions = part.middle.part.base.context_length

    @property
    def codec(self) -> Codec:
        """How states cross."""
        return self._codec

    def begin(self, number: int, weights: Tensors, clients: Sequence[str]) -> None:
        """A round begins, or begins again, from the global model's tensors."""
        self._tally.clear()
        self._schedule.begin(number, {name: weights[name] for name in self._names}, clients)

    def completed(self, update: ClientUpdate) -> ClientUpdate:
        """A client's update with what the server's part has moved for it alone, if anything."""
        own = self._schedule.beside(update.client)
        return replace(update, delta={**update.delta, **own}) if own else update

    def end(self) -> Tensors:
        """The server's tensors after the round; empty where they are in the updates."""
        return self._schedule.end()

    def figures(self) -> dict[str, Any]:
        """Messages, bytes and errors of the round by crossing."""
        return self._tally.as_json()

    def bytes_up(self) -> int:
        """Bytes that clients sent to this server in the round."""
        return self._tally.bytes(*UP)

    def bytes_down(self) -> int:
        """Bytes that it sent to them."""
        return self._tally.bytes(*DOWN)

    def leave(self, client: str, *, is_done: bool) -> None:
        """A client's round is over: done, or broken off."""
        self._schedule.leave(client, is_done=is_done)

    def answer(self, data: bytes) -> bytes:
        """The reply to a client's message.

        Raises:
            MessageError: It is not one that this server expects now.
        """
        request = read_crossing(data, self._codec)
        if request.round_number != self._schedule.number:
            raise MessageError(
                f"a batch of round {request.round_number} came, and this is round {self._schedule.number}"
            )
        return answered(request, _ANSWERS[request.kind](self, request))

    def _forward(self, request: Request) -> Tensors:
        form = form_of(request, self._most_positions)
        states = self._codec.opened(request.tensors[VALUES], form.tokens)
        made = self._schedule.forward(request.client, states, form)
        return {VALUES: self._packed(made, "activations_down")}

    def _backward(self, request: Request) -> Tensors:
        body = read_body(GradientBody, request)
        gradient = self._codec.opened(request.tensors[VALUES], body.tokens)
        made = self._schedule.backward(request.client, gradient, is_wanted=body.is_wanted)
        return {} if made is None else {VALUES: self._packed(made, "gradients_down")}

    def _packed(self, states: torch.Tensor, crossing: str) -> torch.Tensor:
        """States as bytes; how much their compression leaves out is noted."""
        values = self._codec.packed(states)
        self._tally.note(crossing, self._codec.error(states, values))
        return values

    def _step(self, request: Request) -> Tensors:
        body, tensors = read_body(StepBody, request), request.tensors
        norm = self._schedule.step(request.client, body.count, tensors[BEFORE], tensors[BEHIND])
        return {NORM: ALONE if norm is None else norm.reshape(1).float().cpu()}


_ANSWERS: Mapping[str, Callable[[ComputeServer, Request], Tensors]] = {
    FORWARD: ComputeServer._forward,
    BACKWARD: ComputeServer._backward,
    STEP: ComputeServer._step,
}
"""Kind of message -> the tensors of its reply."""
