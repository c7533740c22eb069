"""A decoder's last layer, for the needed positions only.

Nothing reads what the last layer makes at other positions: it needs keys and values everywhere, but queries,
attention, output projection and MLP only where a logit is wanted, in closed-ended tasks at one position in thirty. The
layer's own code does both: it is called once up to where it hands its keys and values to a cache, and again with the
hidden states of the needed positions alone, and a cache that answers with those keys and values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES = ("past_key_values", "layer_past")
"""The names that decoder layers have for the cache that they are given."""


def last_layer(model: PreTrainedModel) -> torch.nn.Module | None:
    """The last of a decoder's layers; None where it has no keys and values of its own to hand to a cache."""
    body = model.get_decoder()
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    borrows = getattr(model.config.get_text_config(), "num_kv_shared_layers", None)
    if borrows or not isinstance(layers, torch.nn.ModuleList):
        return None
    return layers[-1] if _cache_name(type(layers[-1])) else None


@contextmanager
def needed_only(layer: torch.nn.Module, positions: torch.Tensor, shape: torch.Size) -> Iterator[None]:
    """Inside the block, the layer's output is right at ``positions`` and zero elsewhere.

    A layer that attends without handing keys and values to a cache does all of its work, as does any layer where more
    than half of the longest row is needed.

    Args:
        layer: What `last_layer` found.
        positions: Flat places in the input [needed], in any order, some perhaps several times.
        shape: The input ids' [rows, length].
    """
    needed = _Needed(positions, shape)
    if needed.most * 2 > shape[1]:
        yield
        return
    held = vars(layer).get("forward")
    vars(layer)["forward"] = _shortened(type(layer), layer.forward, needed)
    try:
        yield
    finally:
        if held is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = held


class _HasKeys(Exception):  # noqa: N818 - it ends a call early and is no error
    """A layer has handed over its keys and values."""


class _Keys(DynamicCache):
    """Takes a layer's keys and values and ends the call; the layer's next call gets them, whatever it hands over."""

    def __init__(self, before: DynamicCache | None) -> None:
        super().__init__()
        self._before = before
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all positions [rows, heads, all, width]."""
        if self.held is not None:
            return self.held
        own = key_states, value_states
        self.held = own if self._before is None else self._before.update(*own, layer_idx, *args, **kwargs)
        raise _HasKeys


class _Needed:
    """The needed positions as columns of each row, filled up to one number a row with the row's first column."""

    def __init__(self, positions: torch.Tensor, shape: torch.Size) -> None:
        self._shape = shape
        self._flat = positions.unique()
        self._row = self._flat // shape[1]
        counts = torch.bincount(self._row, minlength=shape[0])
        self.most = int(counts.max())
        self._slot = torch.arange(len(self._flat), device=positions.device) - (counts.cumsum(0) - counts)[self._row]
        self.columns = torch.zeros(shape[0], self.most, dtype=torch.long, device=positions.device)
        self.columns[self._row, self._slot] = self._flat % shape[1]

    def select(self, value: Any) -> Any:
        """Cuts a layer's arguments (hidden states, places, rotations, masks) to the needed part; leaves any other
        whole."""
        if isinstance(value, tuple):
            return tuple(map(self.select, value))
        rows, length = self._shape
        each = torch.arange(rows, device=self.columns.device)[:, None]
        if not isinstance(value, torch.Tensor) or value.dim() not in (2, 3, 4):
            return value
        is_mask = value.dim() == 4  # [rows or 1, heads or 1, length, keys]
        if value.shape[2 if is_mask else 1] != length:
            return value
        whole = value.expand(rows, *value.shape[1:])
        return whole[each, :, self.columns].transpose(1, 2) if is_mask else whole[each, self.columns]

    def causal(self, num_keys: int) -> torch.Tensor:
        """Which keys each needed position sees [rows, 1, needed, keys]."""
        own = self.columns[:, None, :, None] + num_keys - self._shape[1]
        return torch.arange(num_keys, device=own.device) <= own

    def spread(self, made: torch.Tensor) -> torch.Tensor:
        """A layer's output at the needed positions [rows, needed, width], put in its places [rows, length, width]."""
        rows, length = self._shape
        everywhere = made.new_zeros(rows * length, made.shape[-1])
        return everywhere.index_put((self._flat,), made[self._row, self._slot]).view(rows, length, -1)


def _shortened(kind: type, forward: Callable[..., torch.Tensor], needed: _Needed) -> Callable[..., torch.Tensor]:
    """The forward of a layer of this kind, for the needed positions."""
    name = _cache_name(kind)

    def instead(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = {**dict(zip(_positional(kind), args, strict=False)), **kwargs}
        keys = _Keys(given.get(name))
        try:
            return forward(**{**given, name: keys})
        except _HasKeys:
            assert keys.held is not None
        if not needed.most:
            return torch.zeros_like(given["hidden_states"])
        chosen = {key: needed.select(value) for key, value in given.items()}
        if chosen.get("attention_mask") is None:  # plain causal attention
            chosen["attention_mask"] = needed.causal(keys.held[0].shape[2])
        return needed.spread(forward(**{**chosen, name: keys}))

    return instead


@functools.cache
def _positional(kind: type) -> tuple[str, ...]:
    """What a layer calls its arguments, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _cache_name(kind: type) -> str:
    """What a layer calls its cache; empty where it takes none."""
    return next((name for name in CACHES if name in _positional(kind)), "")
