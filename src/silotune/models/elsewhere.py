"""The block that stands in a client's model for those that a compute server has, and what it tells of a batch.

What comes out of the blocks before it leaves over a link, and what comes back goes on into those behind it; in the
backward pass the gradients go the other way. The family's own code runs around it unchanged: embedding, masks,
positions, norm and head are where they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Form:
    """What a compute server must know of a batch besides the hidden states of its real tokens.

    Attributes:
        lengths: Real tokens of each row; a row begins with them.
        length: Tokens of a row with its padding.
        hides_padding: Whether the model was given a mask that hides padding, as classifiers are.
        visible: Which ids each id sees [rows, length, length]; None for plain causal attention.
        position_ids: Position of every id [rows, length]; None for 0, 1, 2, ...
    """

    lengths: tuple[int, ...]
    length: int
    hides_padding: bool = False
    visible: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens of all rows."""
        return sum(self.lengths)

    def places(self) -> torch.Tensor:
        """Flat places of the real tokens in [rows * length]."""
        return torch.cat([torch.arange(count) + row * self.length for row, count in enumerate(self.lengths)])

    def unpadded(self, hidden: torch.Tensor) -> torch.Tensor:
        """The real tokens' states [tokens, width] of [rows, length, width]."""
        return hidden.reshape(-1, hidden.shape[-1])[self.places().to(hidden.device)]

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """States [tokens, width] in their places [rows, length, width], zeros elsewhere."""
        whole = states.new_zeros(len(self.lengths) * self.length, states.shape[-1])
        whole[self.places().to(states.device)] = states
        return whole.view(len(self.lengths), self.length, -1)


@dataclass(frozen=True)
class Turn:
    """Whose local round it is; None of the fields is a place or a secret."""

    client: str = ""
    round_number: int = 0


class Link(Protocol):
    """How a client reaches the blocks that are elsewhere."""

    def forward(self, turn: Turn, states: torch.Tensor, form: Form) -> torch.Tensor:
        """What the server's blocks make of states [tokens, width]."""
        ...

    def backward(self, turn: Turn, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        """The gradient of what was sent last, for that of what came back [tokens, width]; None if it is not wanted."""
        ...

    def step(self, turn: Turn, count: int, before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor | None:
        """Has the server take its step with a gradient that is summed over ``count`` terms.

        Args:
            turn: Whose round it is.
            count: Terms of the client's losses since its last step.
            before: Norms of the client's mean gradients, of its tensors before the server's blocks.
            behind: The same behind them.

        Returns:
            The norm of the whole model's gradient; None where each party bounds its own.
        """
        ...


class Elsewhere(torch.nn.Module):
    """Stands in a client's model for the blocks that a compute server has.

    Args:
        link: How they are reached.
        before: Names of the client's trained tensors that are before these blocks.
    """

    def __init__(self, link: Link, before: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.link = link
        self.before = before
        self.turn = Turn()
        self.form: Form | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        """A second client's: over the same link, in a turn of its own."""
        return Elsewhere(self.link, self.before)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The hidden states behind the server's blocks [rows, length, width]; masks and the rest are the server's."""
        assert self.form is not None, "a batch's form is told before the model is called"
        # so that gradients come to the server's blocks also where nothing before them trains
        anchor = hidden_states.new_zeros(0, requires_grad=True)
        crossed: torch.Tensor = _Crossing.apply(hidden_states, anchor, self, self.form)
        return crossed


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, anchor: torch.Tensor, there: Elsewhere, form: Form) -> torch.Tensor:
        ctx.there, ctx.form = there, form
        made = there.link.forward(there.turn, form.unpadded(hidden.detach()), form)
        return form.padded(made.to(device=hidden.device, dtype=hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        there, form, (gradient,) = ctx.there, ctx.form, gradients
        is_wanted = ctx.needs_input_grad[0]
        made = there.link.backward(there.turn, form.unpadded(gradient), is_wanted=is_wanted)
        if made is None:
            return None, None, None, None
        return form.padded(made.to(device=gradient.device, dtype=gradient.dtype)), None, None, None


class Passing(torch.nn.Module):
    """Stands where a block of another party is, so that all blocks keep their numbers; lets everything through."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What came in."""
        return hidden_states


def row_lengths(positions: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """How many ids of each row matter: up to the last whose logits are needed, for none looks at a later one.

    Args:
        positions: Flat places of the needed logits [needed].
        shape: The ids' [rows, length].
    """
    lengths = torch.zeros(shape[0], dtype=torch.long)
    places = positions.cpu()
    lengths.scatter_reduce_(0, places // shape[1], places % shape[1] + 1, reduce="amax")
    return tuple(map(int, lengths))
