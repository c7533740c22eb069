"""What the requests and replies of protected sums hold, and the layouts of their tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from silotune import tensors as arithmetic
from silotune.federation.wire.messages import Header, Layout, read_body
from silotune.federation.wire.orders import Order
from silotune.federation.wire.signed_job import JOB, SignedJob
from silotune.privacy.encryption import CELL_BYTES, Packing
from silotune.privacy.figures import FIGURES
from silotune.privacy.ring import Scale
from silotune.privacy.secure_sum import stages
from silotune.privacy.secure_sum.sharing import FalseSharing, OpenShare, SignedSharing
from silotune.privacy.secure_sum.terms import Hex32, Hex64, SignedKeys, Terms
from silotune.record.plain_json import sha256
from silotune.settings.base import Positive, Section
from silotune.settings.sections import FederationSection
from silotune.structs import Request, Tensors

SealedText = Annotated[str, Field(pattern="^([0-9a-f]{2}){82}$")]


VALUES, FIGURES_NAME = "values", "figures"


class SumOrder(Section):
    """What the body of every request of a protected sum may hold: the job that its submitter signed."""

    job: SignedJob | None = None


class KeysOrder(SumOrder):
    """Phase 1: the terms."""

    terms: Terms


class SharesOrder(SumOrder):
    """Phase 2: everybody's keys."""

    keys: dict[str, SignedKeys]


class SealedShares(Section):
    """What an owner sealed for one holder, the commitments to the two shares in it, and the owner's signature."""

    text: SealedText
    seed: Hex32
    key: Hex32
    signature: Hex64

    def read(self) -> stages.Sealed:
        """The same with the text as bytes."""
        return stages.Sealed(bytes.fromhex(self.text), self.seed, self.key, self.signature)


def written(sealed: stages.Sealed) -> SealedShares:
    """The sealed shares as they travel."""
    return SealedShares(text=sealed.text.hex(), seed=sealed.seed, key=sealed.key, signature=sealed.signature)


class AcceptOrder(SumOrder):
    """Phase 3: who sent shares, and their shares for this site."""

    arrived: tuple[str, ...]
    shares: dict[str, SealedShares]


class InputOrder(SumOrder):
    """Phase 4: ring and size of the input, with whom masks are shared, complaints of this site, a ``train`` order."""

    bits: Literal[16, 32, 64]
    size: Positive
    arrived: tuple[str, ...]
    complaints: dict[str, Hex64] = {}
    train: Order


class CheckOrder(SumOrder):
    """Phase 5: whose inputs are in the sum, and proofs that clients which are left out now have lied before."""

    survivors: tuple[str, ...]
    liars: dict[str, FalseSharing] = {}


class UnmaskOrder(SumOrder):
    """Phase 6: who has signed that list."""

    signatures: dict[str, Hex64]


class SharesReport(Section):
    """Answer of phase 2: sealed shares by holder, and what this site says of them."""

    shares: dict[str, SealedShares]
    sharing: SignedSharing


class AcceptReport(Section):
    """Answer of phase 3: the owners whose shares this site does not hold, with its signature of each complaint."""

    complaints: dict[str, Hex64]


class GivenShares(Section):
    """The two shares that one holder was given."""

    seed: OpenShare
    key: OpenShare

    def read(self) -> tuple[bytes, bytes]:
        """As bytes: (of the seed, of the mask key)."""
        return bytes.fromhex(self.seed), bytes.fromhex(self.key)


class InputReport(Section):
    """Answer of phase 4, beside its tensors: the shares that the holders which complain were given."""

    answers: dict[str, GivenShares] = {}


class CheckReport(Section):
    """Answer of phase 5."""

    signature: Hex64


class UnmaskReport(Section):
    """Answer of phase 6: shares by owner, of mask seeds or of mask keys."""

    seed: dict[str, OpenShare]
    key: dict[str, OpenShare]


def work_digest(order: Order, tensors: Tensors) -> str:
    """SHA-256 of what a sum is made from: the order to train, without its job, and the tensors that training begins
    with."""
    said = order.model_dump(mode="json", exclude={JOB})
    return sha256({"order": said, "tensors": arithmetic.digest(tensors)})


def input_layout(request: Request, federation: FederationSection | None = None) -> Layout:
    """What the tensors of an answer to ``secure_sum.input`` must be."""
    order = read_body(InputOrder, request)
    return {VALUES: (f"I{order.bits}", (order.size,)), FIGURES_NAME: ("I64", (len(FIGURES),))}


CELLS, SUM = "cells", "sum"


FIGURE_PACKING = Packing(1)
"""Figures need whole slots, however the values are packed: sums of them may take 57 bits."""


class WeightOrder(SumOrder):
    """``he.weight`` has no settings."""


class EncryptOrder(SumOrder):
    """``he.input``: how to encrypt, numbers of clients, of all examples and of values, and the order to train."""

    packing: Positive
    bound: float
    clients: Positive
    num_examples: Positive
    size: Positive
    train: Order

    def packed(self) -> Packing:
        """How numbers lie in slots."""
        return Packing(self.packing)

    def scale(self) -> Scale:
        """Weights are shares of the cohort's examples, so that they sum to 1 at most."""
        return Scale(self.packed().levels(self.clients), self.bound, self.num_examples)


class OpenOrder(SumOrder):
    """``he.open``: what the ciphertexts hold."""

    packing: Positive
    size: Annotated[int, Field(ge=0)]
    num_figures: Positive


def weight_layout(request: Request, federation: FederationSection | None = None) -> Layout:
    """The layout of an answer to ``he.weight``."""
    return {FIGURES_NAME: ("U8", (1, CELL_BYTES))}


def update_layout(request: Request, federation: FederationSection | None = None) -> Layout:
    """The layout of an answer to ``he.input``."""
    order = read_body(EncryptOrder, request)
    return {
        CELLS: ("U8", (order.packed().cells(order.size), CELL_BYTES)),
        FIGURES_NAME: ("U8", (1, CELL_BYTES)),
    }


def open_layout(request: Request, federation: FederationSection | None = None) -> Layout:
    """The layout of an answer to ``he.open``."""
    order = read_body(OpenOrder, request)
    figures: dict[str, tuple[str, tuple[int, ...]]] = {FIGURES_NAME: ("I64", (order.num_figures,))}
    return {**figures, SUM: ("I32", (order.size,))} if order.size else figures


def carried_sum(known: object, header: Header, claimed: Layout) -> Layout:
    """The layout of the ciphertexts in an ``he.open`` request; the body says how many there are."""
    order = read_body(OpenOrder, Request(header.kind, header.round_number, header.client, {}, header.body))
    figures: dict[str, tuple[str, tuple[int, ...]]] = {FIGURES_NAME: ("U8", (1, CELL_BYTES))}
    if not order.size:
        return figures
    cells = Packing(order.packing).cells(order.size)
    return {**figures, CELLS: ("U8", (cells, CELL_BYTES))}


NUM_FIGURES = 1 + len(FIGURES)
