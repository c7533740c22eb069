"""What crosses the cut in split training, as messages: activations, gradients and steps, of real tokens only.

Three kinds of messages go from a client to the compute server, each with its reply: ``split.forward`` carries the
states of a batch's real tokens and what the server must know of its form, ``split.backward`` the gradients of what came
back, ``split.step`` the number of terms and the norms of the client's gradients. Every message is checked against the
layout that the receiver's own settings allow before anything is allocated from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field

from silotune.errors import MessageError, TrainingError
from silotune.federation.wire.messages import (
    Header,
    Layout,
    decode_reply,
    decode_request,
    encode,
    layout_of,
    read_body,
)
from silotune.methods.compress.formats import Format
from silotune.methods.compress.tokens import format_of
from silotune.models.elsewhere import Form, Turn
from silotune.settings.base import Section
from silotune.settings.split import Crossed
from silotune.structs import Reply, Request, Tensors

FORWARD, BACKWARD, STEP = "split.forward", "split.backward", "split.step"
VALUES, VISIBLE, POSITIONS, BEFORE, BEHIND, NORM = "values", "visible", "position_ids", "before", "behind", "norm"
MOST_TOKENS = 1 << 22
"""Most real tokens of a batch, and most places of its rows together, that a message may have."""

Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]


class FormBody(Section):
    """What ``split.forward`` says of its batch."""

    lengths: tuple[Count, ...]
    length: Count
    hides_padding: bool


class GradientBody(Section):
    """What ``split.backward`` says: of how many tokens, and whether the client wants their gradient back."""

    tokens: Count
    is_wanted: bool


class StepBody(Section):
    """What ``split.step`` says: over how many terms the gradients are summed, and how many norms come with it."""

    count: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    before: Count
    behind: Count


@dataclass(frozen=True)
class Codec:
    """How states become bytes.

    Attributes:
        compress: ``federation.split.compress``.
        width: Values of a token's state.
    """

    compress: Crossed
    width: int

    @property
    def _format(self) -> Format:
        return format_of(self.compress)

    def layout(self, tokens: int) -> Layout:
        """Of a message with the states of so many tokens."""
        return {VALUES: ("U8", (self._format.size(tokens * self.width, self.width),))}

    def packed(self, states: torch.Tensor) -> torch.Tensor:
        """States [tokens, width] as bytes; int8 and int4 have one scale a token and round to the nearest level.

        Raises:
            TrainingError: A value is not finite.
        """
        values = states.detach().float().cpu().reshape(-1)
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(
                "what crosses the cut is not finite: lower training.learning_rate, or use model.precision = 'float32'"
            )
        return self._format.encode(values, self.width, None)

    def opened(self, data: torch.Tensor, tokens: int) -> torch.Tensor:
        """The states [tokens, width] that bytes say.

        Raises:
            MessageError: A value is not finite.
        """
        values = self._format.decode(data, tokens * self.width, self.width)
        if not bool(torch.isfinite(values).all()):
            raise MessageError("states that crossed the cut are not finite")
        return values.view(tokens, self.width)

    def error(self, states: torch.Tensor, data: torch.Tensor) -> float:
        """Norm of what the bytes leave out over that of the states; 0 where nothing is compressed."""
        if self.compress == "none":
            return 0.0
        exact = states.detach().double().cpu()
        size = float(exact.norm())
        return float((self.opened(data, len(states)).double() - exact).norm()) / size if size else 0.0


@dataclass
class Tally:
    """Bytes and errors of what crossed in a round, by crossing; safe to use from several threads."""

    count: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def add(self, crossing: str, size: int) -> None:
        """Counts one message."""
        with self._lock:
            self.count[crossing] = self.count.get(crossing, 0) + 1
            self.sent[crossing] = self.sent.get(crossing, 0) + size

    def note(self, crossing: str, error: float) -> None:
        """Notes how much the compression of a message's states has left out."""
        with self._lock:
            self.errors.setdefault(crossing, []).append(error)

    def clear(self) -> None:
        """Forgets a round."""
        with self._lock:
            self.count, self.sent, self.errors = {}, {}, {}

    def bytes(self, *crossings: str) -> int:
        """Bytes of these crossings."""
        return sum(self.sent.get(name, 0) for name in crossings)

    def as_json(self) -> dict[str, Any]:
        """For the record: messages, bytes, and mean and largest relative error by crossing."""
        return {
            name: {"messages": self.count[name], "bytes": self.sent[name], **_spread(self.errors.get(name, ()))}
            for name in CROSSINGS
            if name in self.sent
        }


CROSSINGS = (
    "activations_up", "activations_down", "gradients_up", "gradients_down", "steps_up", "steps_down",
)  # fmt: skip
"""What crosses, in the order of a step; up is to the compute server."""
UP, DOWN = CROSSINGS[::2], CROSSINGS[1::2]


def _spread(errors: Any) -> dict[str, float]:
    """Mean and largest; summed in the order of size, as clients side by side come in any order."""
    ordered = sorted(errors)
    return {"error_mean": sum(ordered) / len(ordered), "error_largest": ordered[-1]} if ordered else {}


class OverMessages:
    """A client's link to the compute server: what crosses is encoded, sent, and what comes back is checked.

    Args:
        send: Carries a message to the server and its reply back.
        codec: How states are sent.
        tally: Counts what crosses.
    """

    def __init__(self, send: Callable[[bytes], bytes], codec: Codec, tally: Tally) -> None:
        self._send = send
        self._codec = codec
        self.tally = tally

    def __deepcopy__(self, memo: dict[int, Any]) -> OverMessages:
        """The same: it keeps nothing of a client."""
        return self

    def forward(self, turn: Turn, states: torch.Tensor, form: Form) -> torch.Tensor:
        """What the server's blocks make of states [tokens, width]."""
        values = self._codec.packed(states)
        body = {"lengths": list(form.lengths), "length": form.length, "hides_padding": form.hides_padding}
        tensors = {VALUES: values, **_of_form(form)}
        sent, data, reply = self._asked(FORWARD, turn, tensors, body, self._codec.layout(form.tokens))
        self._counted("activations", sent, len(data))
        self.tally.note("activations_up", self._codec.error(states, values))
        return self._codec.opened(reply.tensors[VALUES], form.tokens)

    def backward(self, turn: Turn, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        """The gradient of what was sent last, for that of what came back [tokens, width]; None if it is not wanted."""
        values, tokens = self._codec.packed(gradient), len(gradient)
        expected = self._codec.layout(tokens) if is_wanted else {}
        body = {"tokens": tokens, "is_wanted": is_wanted}
        sent, data, reply = self._asked(BACKWARD, turn, {VALUES: values}, body, expected)
        self._counted("gradients", sent, len(data))
        self.tally.note("gradients_up", self._codec.error(gradient, values))
        return self._codec.opened(reply.tensors[VALUES], tokens) if is_wanted else None

    def step(self, turn: Turn, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        """Has the server take its step; the norm of the whole gradient, where it is bounded as one."""
        body = {"count": count, "before": len(before), "behind": len(behind)}
        sent, data, reply = self._asked(STEP, turn, {BEFORE: before, BEHIND: behind}, body, {NORM: ("F32", (1,))})
        self._counted("steps", sent, len(data))
        norm = reply.tensors[NORM][0]
        return norm if norm >= 0 else None

    def _asked(
        self, kind: str, turn: Turn, tensors: Tensors, body: Mapping[str, Any], expected: Layout
    ) -> tuple[int, bytes, Reply]:
        """Bytes sent, the reply as it came, and the reply."""
        data = encode(Request(kind, turn.round_number, turn.client, tensors, body))
        came = self._send(data)
        reply = decode_reply(came, expected)
        if (reply.kind, reply.round_number, reply.client) != (kind, turn.round_number, turn.client):
            raise MessageError("the compute server's reply is to another message")
        read_body(Section, reply)
        return len(data), came, reply

    def _counted(self, what: str, sent: int, came: int) -> None:
        self.tally.add(f"{what}_up", sent)
        self.tally.add(f"{what}_down", came)


def _of_form(form: Form) -> Tensors:
    """Which ids see which, a bit each, and their positions, where the model's own do not do."""
    made: Tensors = {}
    if form.visible is not None:
        made[VISIBLE] = _bits(form.visible)
    if form.position_ids is not None:
        made[POSITIONS] = form.position_ids.to(torch.int32)
    return made


def _bits(visible: torch.Tensor) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.packbits(visible.cpu().reshape(-1).numpy()))


def _from_bits(data: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    import numpy as np

    flat = np.unpackbits(data.numpy(), count=rows * length * length)
    return torch.from_numpy(flat).bool().view(rows, length, length)


def read_crossing(data: bytes, codec: Codec) -> Request:
    """A client's message, checked against what the server's own settings allow.

    Raises:
        MessageError: Anything is not as expected.
    """
    return decode_request(data, lambda header, claimed: _expected(header, claimed, codec))


def _expected(header: Header, claimed: Layout, codec: Codec) -> Layout:
    """The layout of a message by what its header says."""
    shell = Request(header.kind, header.round_number, header.client, {}, header.body)
    if header.kind == FORWARD:
        form = read_body(FormBody, shell)
        rows, length = len(form.lengths), form.length
        if not form.lengths or any(count > length for count in form.lengths) or rows * length > MOST_TOKENS:
            raise MessageError("a batch that crosses the cut has a form that cannot be")
        optional: Layout = {
            VISIBLE: ("U8", (-(-rows * length * length // 8),)),
            POSITIONS: ("I32", (rows, length)),
        }
        return {
            **codec.layout(sum(form.lengths)),
            **{name: layout for name, layout in optional.items() if name in claimed},
        }
    if header.kind == BACKWARD:
        return codec.layout(read_body(GradientBody, shell).tokens)
    if header.kind == STEP:
        step = read_body(StepBody, shell)
        return {BEFORE: ("F32", (step.before,)), BEHIND: ("F32", (step.behind,))}
    raise MessageError(f"a compute server answers no message of the kind {header.kind!r}")


def form_of(request: Request, most_positions: int | None) -> Form:
    """The form of the batch in a ``split.forward``.

    Raises:
        MessageError: An id sees a later one or none, or has a position beyond the model's.
    """
    body = read_body(FormBody, request)
    visible, positions = request.tensors.get(VISIBLE), request.tensors.get(POSITIONS)
    seen = None if visible is None else _from_bits(visible, len(body.lengths), body.length)
    if most_positions is not None and body.length > most_positions and positions is None:
        raise MessageError(f"a batch of rows of {body.length} ids came, and the model has {most_positions} positions")
    if positions is not None and not bool(((positions >= 0) & (positions < (most_positions or MOST_TOKENS))).all()):
        raise MessageError("a batch that crosses the cut has positions beyond the model's")
    ids = None if positions is None else positions.long()
    return Form(body.lengths, body.length, body.hides_padding, seen, ids)


def answered(request: Request, tensors: Tensors) -> bytes:
    """The server's reply to a client's message."""
    layout_of(tensors)
    return encode(Reply(request.kind, request.round_number, request.client, tensors))
