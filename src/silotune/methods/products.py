"""The mean of the clients' products BA, which the product of their mean factors is not, and rules that keep it.

Averaging A and B apart gives mean(B) mean(A); what the clients learnt is mean(B A). ``Products`` watches the updates on
their way into an aggregate and measures how far the two are apart. A ``Fold`` puts the mean product itself into the
global model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch

from silotune import lora
from silotune.methods.schedule import AdapterParts
from silotune.structs import ClientUpdate, Tensors
from silotune.tensors import all_finite

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""B [out, any] and A [any, in]."""
Weigh: TypeAlias = Callable[[ClientUpdate], float]
"""What an update counts."""

LARGEST_EXACT = 2**27
"""Values of all modules' products together up to which they are summed as they are (0.5 GiB); above it the error is
estimated from ``PROBES`` random directions, so that the sums stay near the size of an update."""
PROBES = 64
FLOAT32_ROUNDING = 2e-7
"""Share of a product below which a singular value is no more than its factors' rounding."""


class Products:
    """Sums of the clients' products over one round.

    Args:
        weights: The global model that the round began with.
        parts: What is sent in the round.
        weigh: What an update counts in the means.
        keep: Keep the clients' factors too, as a ``Fold`` needs them. Their memory grows with the clients until a
            module's stack is as large as its product, and no further.
    """

    def __init__(self, weights: Tensors, parts: AdapterParts, *, weigh: Weigh, keep: bool = False) -> None:
        self._weights = weights
        self._weigh = weigh
        names = lora.modules(weights)
        self._is_known = not any(parts.is_personal(name + end) for name in names for end in (lora.A, lora.B))
        self._modules = names if self._is_known else []
        sizes = [weights[name + lora.B].shape[0] * weights[name + lora.A].shape[1] for name in self._modules]
        self._is_exact = sum(sizes) <= LARGEST_EXACT
        self._sums: dict[str, torch.Tensor] = {}  # module -> [out, in], or [out, PROBES]
        self._stacks: dict[str, list[Pair]] | None = {name: [] for name in self._modules} if keep else None
        self._deltas: Tensors = {}  # of the factors, summed at the adapter's rank
        self._weight = 0.0

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The updates one by one, filled up to the adapter's rank; each is added to the sums on its way."""
        rank = lora.rank_of(self._weights)
        for update in updates:
            if self._modules and all_finite(update.delta):
                self._add(update)
            yield replace(update, delta=lora.padded(update.delta, rank))
            del update  # otherwise it would stay in memory until the next one arrives

    def mean(self, module: str) -> Pair:
        """The mean product of a module as a pair whose rank is the sum of the clients' (float64)."""
        assert self._stacks is not None, "the factors were not kept"
        pairs = self._stacks[module]
        return torch.cat([b for b, _ in pairs], dim=1) / self._weight, torch.cat([a for _, a in pairs])

    def error(self, folded: Tensors | None = None) -> float | None:
        """How far a global model is from the mean of the clients' products: ||mean(BA) - new|| / ||mean(BA)||.

        Frobenius norms over all LoRA modules together. ``new`` is mean(B) mean(A), whatever the aggregation rule and
        the server step make of the updates; of a folded model, the product of its factors and its residual's growth.

        Args:
            folded: The global model that a fold gave.

        Returns:
            None where there are no products: no LoRA, no update, or a factor that stays with the clients.
        """
        if not self._modules or self._weight == 0:
            return None
        after = self._averaged() if folded is None else folded
        off = size = 0.0
        old, new = lora.residuals(self._weights), lora.residuals(after)
        for name in self._modules:
            mean = self._sums[name].double() / self._weight
            made = self._seen(after[name + lora.B].double(), after[name + lora.A].double())
            for pair, sign in ((new.get(name), 1), (old.get(name), -1)):
                if pair is not None:
                    made += sign * self._seen(pair[0].double(), pair[1].double())
            off += float((mean - made).square().sum())
            size += float(mean.square().sum())
        ratio = math.sqrt(off / size) if size else 0.0
        return ratio if math.isfinite(ratio) else None

    def _averaged(self) -> Tensors:
        """The global model's factors moved by the mean delta."""
        mean = {name: total / self._weight for name, total in self._deltas.items()}
        return {name: tensor + mean[name] if name in mean else tensor for name, tensor in self._weights.items()}

    def _add(self, update: ClientUpdate) -> None:
        rank, weight = lora.rank_of(update.delta), self._weigh(update)
        names = [name + end for name in self._modules for end in (lora.B, lora.A) if name + end in update.delta]
        filled = lora.padded({name: update.delta[name] for name in names}, lora.rank_of(self._weights))
        for name, delta in filled.items():
            self._deltas.setdefault(name, torch.zeros_like(delta)).add_(delta, alpha=weight)
        for name in self._modules:
            b, a = (self._after(update, name + end, rank) for end in (lora.B, lora.A))
            seen = self._seen(b, a)
            total = self._sums.setdefault(name, torch.zeros_like(seen))
            total.add_(seen, alpha=weight)
            if self._stacks is not None:
                _push(self._stacks[name], (b.double() * weight, a.double()))
        self._weight += weight

    def _after(self, update: ClientUpdate, name: str, rank: int | None) -> torch.Tensor:
        """A client's factor after its round: what it was sent and what it learnt."""
        received = lora.cut({name: self._weights[name]}, rank)[name]
        return received + update.delta[name] if name in update.delta else received

    def _seen(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """b a, or what it does to the probes (whose squares have the expected sum of the product's squares)."""
        if self._is_exact:
            return b @ a
        probes = torch.randn(a.shape[1], PROBES, generator=torch.Generator().manual_seed(0))  # the same at every call
        return b @ (a @ probes.to(a.dtype) / math.sqrt(PROBES))


def _push(stack: list[Pair], pair: Pair) -> None:
    """Adds a pair; a stack with more rows than its product has is shortened to the product's own rank."""
    stack.append(pair)
    rows, most = sum(a.shape[0] for _, a in stack), min(pair[0].shape[0], pair[1].shape[1])
    if rows > 2 * most:
        stack[:] = [lora.compressed(torch.cat([b for b, _ in stack], dim=1), torch.cat([a for _, a in stack]))]


Fold: TypeAlias = Callable[[Tensors, Products, int], Tensors]
"""``fold(weights, products, seed)``: the model after the server step, the round's products and a seed of the round,
to the global model."""


def into_residual(weights: Tensors, products: Products, seed: int) -> Tensors:
    """residual += mean(BA) - B A: the factors go on as averaged, and nothing is lost (FedEx-LoRA, Singhal et al. 2025).

    The addition has rank (clients - 1) x rank at most, as a covariance has.
    """
    result = lora.without_residuals(weights)
    old = lora.residuals(weights)
    for name in lora.modules(weights):
        b, a = weights[name + lora.B].double(), weights[name + lora.A].double()
        mean_b, mean_a = products.mean(name)
        floor = FLOAT32_ROUNDING * float(torch.linalg.matrix_norm(mean_b @ mean_a))
        rest = lora.compressed(torch.cat([mean_b, -b], dim=1), torch.cat([mean_a, a]), floor=floor)
        _put(result, name, _joined(old.get(name), rest), like=weights[name + lora.A])
    return result


def into_base(weights: Tensors, products: Products, seed: int) -> Tensors:
    """residual += mean(BA), the stack of the clients' factors; A is drawn anew, B is zero (FLoRA, Wang et al. 2024)."""
    result = lora.without_residuals(weights)
    old = lora.residuals(weights)
    generator = torch.Generator().manual_seed(seed)
    for name in lora.modules(weights):
        a = weights[name + lora.A]
        mean = products.mean(name)
        floor = FLOAT32_ROUNDING * float(torch.linalg.matrix_norm(mean[0] @ mean[1]))
        _put(result, name, _joined(old.get(name), lora.compressed(*mean, floor=floor)), like=a)
        bound = 1 / math.sqrt(a.shape[1])  # as peft draws it: Kaiming's uniform distribution with a = sqrt(5)
        result[name + lora.A] = torch.empty_like(a).uniform_(-bound, bound, generator=generator)
        result[name + lora.B] = torch.zeros_like(weights[name + lora.B])
    return result


def into_factors(weights: Tensors, products: Products, seed: int) -> Tensors:
    """B A = the best approximation of mean(BA) of the adapter's rank; its first columns serve lower ranks.

    FlexLoRA (Bai et al. 2024): exact where the mean has no higher rank.
    """
    result = dict(weights)
    for name in lora.modules(weights):
        like = weights[name + lora.A]
        b, a = lora.compressed(*products.mean(name), rank=like.shape[0])
        pair = lora.padded({name + lora.B: b, name + lora.A: a}, like.shape[0])
        result.update({end: tensor.to(like.dtype) for end, tensor in pair.items()})
    return result


def _joined(old: Pair | None, new: Pair) -> Pair:
    if old is None:
        return new
    b, a = torch.cat([old[0].double(), new[0]], dim=1), torch.cat([old[1].double(), new[1]])
    return lora.compressed(b, a) if a.shape[0] > min(b.shape[0], a.shape[1]) else (b, a)


def _put(result: Tensors, module: str, pair: Pair, *, like: torch.Tensor) -> None:
    if pair[1].shape[0]:
        result[module + lora.RESIDUAL_B] = pair[0].to(like.dtype).contiguous()
        result[module + lora.RESIDUAL_A] = pair[1].to(like.dtype).contiguous()
