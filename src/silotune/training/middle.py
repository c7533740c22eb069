"""The compute server's work in split training: its blocks forward and backward over states that clients send."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from silotune.errors import MessageError
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.elsewhere import Form
from silotune.models.split import Entry, Reached
from silotune.structs import Tensors
from silotune.training.batches import additive
from silotune.training.scores import autocast


class Middle:
    """The blocks between the clients' ones, with the graph of the last pass; gradients add up in the parameters.

    Args:
        part: What `models.split.server_part` made.
    """

    def __init__(self, part: Adapted) -> None:
        self.part = part
        self._entry = next(module for module in part.base.model.modules() if isinstance(module, Entry))
        self._came: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Values of a token's state."""
        return int(self.part.base.model.config.get_text_config().hidden_size)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained tensors."""
        return list(self.part.parameters.values())

    def read(self) -> Tensors:
        """Copies of the trained tensors."""
        return adapters.read(self.part)

    def write(self, tensors: Tensors) -> None:
        """Overwrites the trained tensors."""
        adapters.write(self.part, tensors)

    def forward(self, states: torch.Tensor, form: Form) -> torch.Tensor:
        """What the blocks make of the real tokens' states [tokens, width]; the graph is kept for one `backward`."""
        base = self.part.base
        came = states.to(device=base.device, dtype=base.model.dtype).requires_grad_()
        self.part.model.train()
        try:
            with torch.enable_grad(), autocast(self.part):
                hidden = self._entry.states = form.padded(came)
                nothing = torch.zeros_like(hidden, requires_grad=False)
                base.model.get_decoder()(inputs_embeds=nothing, use_cache=False, **self._around(form))
        except Reached as reached:
            with torch.enable_grad():
                self._came, self._made = came, form.unpadded(reached.states)
        finally:
            self._entry.states = None
            self.part.model.eval()
        assert self._made is not None
        return self._made.detach()

    def backward(self, gradient: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
        """The gradient of the last pass's input for that of its output [tokens, width]; None if it is not wanted.

        Raises:
            MessageError: There is no such pass, or it was of another number of tokens.
        """
        made, came = self._made, self._came
        if made is None or came is None:
            raise MessageError("gradients of a batch came that the server does not hold")
        if len(gradient) != len(made):
            raise MessageError(f"gradients of {len(gradient)} tokens came for a batch of {len(made)}")
        self._made = self._came = None
        made.backward(gradient.to(device=made.device, dtype=made.dtype))
        return came.grad if is_wanted else None

    def _around(self, form: Form) -> dict[str, torch.Tensor]:
        base = self.part.base
        given: dict[str, torch.Tensor] = {}
        if form.hides_padding:
            real = torch.arange(form.length)[None] < torch.tensor(form.lengths)[:, None]
            given["attention_mask"] = real.long().to(base.device)
        elif form.visible is not None:
            dtype = torch.bfloat16 if base.autocast else base.model.dtype
            given["attention_mask"] = additive(form.visible, dtype).unsqueeze(1).to(base.device)
        if form.position_ids is not None:
            given["position_ids"] = form.position_ids.to(base.device)
        return given


def joined(forms: Sequence[Form]) -> Form:
    """The batches of several clients as one: their rows below each other, as long as the longest."""
    length = max(form.length for form in forms)
    lengths = tuple(count for form in forms for count in form.lengths)
    has_own = any(form.visible is not None or form.position_ids is not None for form in forms)
    return Form(
        lengths,
        length,
        hides_padding=any(form.hides_padding for form in forms),
        visible=torch.cat([_visible(form, length) for form in forms]) if has_own else None,
        position_ids=torch.cat([_positions(form, length) for form in forms]) if has_own else None,
    )


def _visible(form: Form, length: int) -> torch.Tensor:
    """Which ids each id sees, in rows of this length; padding sees itself and what is before it."""
    made = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(form.lengths), 1, 1)
    if form.visible is not None:
        made[:, : form.length, : form.length] = form.visible
    return made


def _positions(form: Form, length: int) -> torch.Tensor:
    made = torch.arange(length).repeat(len(form.lengths), 1)
    if form.position_ids is not None:
        made[:, : form.length] = form.position_ids
    return made
