"""Cuts a causal language model with its adapter between clients and a compute server, along its list of blocks.

A client has embedding, the first blocks, the last blocks, norm and head; the server has the blocks between. Neither
part is written anew: each is the family's own model, in which the other party's blocks are replaced by ones that pass
everything through, so that masks, positions and windows are the family's own, and tensors keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from silotune.errors import ModelError
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.elsewhere import Elsewhere, Link, Passing
from silotune.settings.split import SplitSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: Mapping[str, str] = {
    "cohere": "layers",
    "gemma": "layers",
    "gemma2": "layers",
    "gemma3_text": "layers",
    "glm": "layers",
    "glm4": "layers",
    "gpt2": "h",
    "gpt_neox": "layers",
    "granite": "layers",
    "llama": "layers",
    "mistral": "layers",
    "olmo2": "layers",
    "phi": "layers",
    "phi3": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "smollm3": "layers",
    "stablelm": "layers",
    "starcoder2": "layers",
}
"""``model_type`` -> where its decoder keeps the list of blocks. Every one is tested: the parts together give the whole
model's losses and gradients, to the bit."""


@dataclass(frozen=True)
class Cut:
    """Where a model is cut.

    Attributes:
        blocks: In all.
        first: Blocks before the server's.
        last: Blocks behind them.
        before: Names of the adapter's tensors before the server's blocks, in their order.
        between: Names of those in the server's blocks.
        behind: Names of those behind them.
    """

    blocks: int
    first: int
    last: int
    before: tuple[str, ...]
    between: tuple[str, ...]
    behind: tuple[str, ...]

    @property
    def at_client(self) -> frozenset[str]:
        """Names of the adapter's tensors that a client has."""
        return frozenset((*self.before, *self.behind))


def cut_of(adapted: Adapted, section: SplitSection) -> Cut:
    """Where a model with its adapter is cut.

    Raises:
        ModelError: The model's family cannot be cut, no block is left for the server, or the adapter has no tensor in
            the server's blocks.
    """
    blocks = blocks_of(adapted.base.model, adapted.base.name)
    if section.first + section.last >= len(blocks):
        raise ModelError(
            f"federation.split.first = {section.first} and last = {section.last} leave no block for the compute "
            f"server: {adapted.base.name!r} has {len(blocks)} blocks; take at most {len(blocks) - 1} together"
        )
    served = {
        id(parameter)
        for block in blocks[section.first : len(blocks) - section.last]
        for parameter in block.parameters()
    }
    behind = {id(parameter) for block in blocks[len(blocks) - section.last :] for parameter in block.parameters()}
    behind |= {id(parameter) for module in _ends(adapted.base) for parameter in module.parameters()}
    where: dict[str, list[str]] = {"before": [], "between": [], "behind": []}
    for name, parameter in adapted.parameters.items():
        place = "between" if id(parameter) in served else "behind" if id(parameter) in behind else "before"
        where[place].append(name)
    if not where["between"]:
        raise ModelError(
            "federation.split: the adapter has no tensor in the compute server's blocks "
            f"{section.first} to {len(blocks) - section.last - 1}, so there is nothing to train there: widen "
            "adapter.targets"
        )
    parts = {place: tuple(names) for place, names in where.items()}
    return Cut(len(blocks), section.first, section.last, **parts)


def _ends(base: Any) -> list[torch.nn.Module]:
    """Modules that stand behind all blocks: the output head, or a classifier's."""
    output = base.model.get_output_embeddings()
    heads = [base.model.get_submodule(name) for name in base.head]
    return [*heads, *([] if output is None or output is base.model.get_input_embeddings() else [output])]


def blocks_of(model: PreTrainedModel, name: str) -> torch.nn.ModuleList:
    """A model's list of blocks.

    Raises:
        ModelError: Its family is none that can be cut.
    """
    family = model.config.get_text_config().model_type
    if family not in FAMILIES:
        raise ModelError(
            f"federation.split: {name!r} is of the family {family!r}, which cannot be cut here; those that can: "
            f"{', '.join(FAMILIES)}"
        )
    found = getattr(model.get_decoder(), FAMILIES[family])
    assert isinstance(found, torch.nn.ModuleList), family
    return found


@dataclass(frozen=True)
class Shares:
    """What each party has of a base model.

    Attributes:
        client: Values at a client: embedding, its blocks, norm and head; a tied head counts once.
        server: Values at the compute server.
        client_work: The client's share of the multiplications for a token; looking up an embedding takes none.
    """

    client: int
    server: int
    client_work: float


def shares_of(adapted: Adapted, section: SplitSection) -> Shares:
    """What each party has of a base model, its adapter not counted."""
    cut = cut_of(adapted, section)
    model = adapted.base.model
    trained = {id(parameter) for parameter in adapted.parameters.values()}

    def values(*modules: torch.nn.Module) -> int:
        found = {id(each): each.numel() for module in modules for each in module.parameters()}
        return sum(count for key, count in found.items() if key not in trained)

    blocks = list(blocks_of(model, adapted.base.name))
    whole, server = values(model), values(*blocks[cut.first : cut.blocks - cut.last])
    heads = values(*_ends(adapted.base)) if _ends(adapted.base) else values(model.get_input_embeddings())
    work = values(*blocks) + heads
    return Shares(whole - server, server, (work - server) / work)


def client_part(adapted: Adapted, section: SplitSection, link: Link) -> Adapted:
    """The client's part of a model: in place of the server's blocks it has the link.

    Frozen tensors are shared with the given model; what trains is copied. What all prompts begin with is not computed
    once for a batch: its keys and values in the server's blocks would have to cross, too.
    """
    cut = cut_of(adapted, section)
    part = adapters.replicate(adapted)
    blocks = blocks_of(part.base.model, part.base.name)
    for number in range(cut.first, cut.blocks - cut.last):
        blocks[number] = Elsewhere(link, frozenset(cut.before)) if number == cut.first else Passing()
    own = cut.at_client if section.train == "both" else ()
    return _with(part, own, fast=replace(part.fast, prefix=False))


def server_part(adapted: Adapted, section: SplitSection) -> Adapted:
    """The server's part: in place of the clients' blocks it has an entry for their states, and an exit."""
    cut = cut_of(adapted, section)
    part = adapters.replicate(adapted)
    blocks = blocks_of(part.base.model, part.base.name)
    for number in (*range(cut.first), *range(cut.blocks - cut.last, cut.blocks)):
        blocks[number] = Passing()
    blocks[cut.first - 1] = Entry()
    blocks[cut.blocks - cut.last] = Exit()
    return _with(part, frozenset(cut.between))


def _with(part: Adapted, names: Any, **changes: Any) -> Adapted:
    """The part with these of the adapter's tensors; the others do not train in it."""
    for name, parameter in part.parameters.items():
        parameter.requires_grad_(name in names)
    parameters = {name: parameter for name, parameter in part.parameters.items() if name in names}
    start = {name: tensor for name, tensor in part.start.items() if name in names}
    return replace(part, parameters=parameters, start=start, **changes)


class Entry(torch.nn.Module):
    """Stands before the server's blocks, and hands them the states that came from clients."""

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """What came from clients, whatever comes in."""
        return self.states


class Reached(Exception):  # noqa: N818 - it ends a call early and is no error
    """The server's blocks have been passed."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


class Exit(torch.nn.Module):
    """Stands behind the server's blocks, and ends the call with what they have made."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never returns."""
        raise Reached(hidden_states)
