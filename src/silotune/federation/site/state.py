"""A client's own tensors beside the global model's: what its site keeps, and how an adapter is made whole from both."""

from __future__ import annotations

from collections.abc import Mapping

from silotune import lora
from silotune.errors import MessageError
from silotune.structs import SiteState, Tensors

PREFIX = "personal/"


def own_tensors(state: SiteState) -> Tensors:
    """A client's personal tensors, by their names in the adapter; empty before it has any."""
    return {name[len(PREFIX) :]: tensor for name, tensor in state.tensors.items() if name.startswith(PREFIX)}


def without_own(state: SiteState) -> SiteState:
    """The rest of what a client keeps, such as its optimiser's moments."""
    return SiteState({name: value for name, value in state.tensors.items() if not name.startswith(PREFIX)}, state.data)


def with_own(state: SiteState, own: Tensors) -> SiteState:
    """What a client keeps, with these personal tensors."""
    return SiteState({**without_own(state).tensors, **{PREFIX + name: own[name] for name in own}}, state.data)


def completed(request: Tensors, like: Mapping[str, object], *, initial: Tensors, own: Tensors) -> Tensors:
    """The adapter that a client works with, at the resident model's rank, residuals included.

    Args:
        request: What the coordinator sent, at the client's rank.
        like: The resident model's trained tensors; only their names count.
        initial: First values, drawn from the run's seed: they stand in for what is never sent.
        own: Personal tensors, which are used where the coordinator sent none.

    Raises:
        MessageError: A tensor is in none of them.
    """
    sent = lora.without_residuals(request)
    rest = {name: own.get(name, initial.get(name)) for name in like if name not in sent}
    missing = [name for name, tensor in rest.items() if tensor is None]
    if missing:
        raise MessageError(f"adapter tensor {missing[0]!r} was neither sent nor is it known to the client")
    found = {name: tensor for name, tensor in rest.items() if tensor is not None}
    full = lora.rank_of(initial or sent)
    whole = lora.padded({**lora.cut(found, lora.rank_of(sent)), **sent}, full)
    return {**whole, **{name: tensor for name, tensor in request.items() if lora.is_residual(name)}}
