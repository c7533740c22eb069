"""What the requests and replies of protected sums hold, and the layouts of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from silotune import tensors as arithmetic
from silotune.federation.wire.messages import Layout, read_body
from silotune.federation.wire.signed_job import SignedJob, order_digest
from silotune.privacy.encryption import PARAMETERS, Array, Packing, encrypted_places
from silotune.privacy.figures import FIGURES
from silotune.privacy.ring import Scale
from silotune.privacy.secure_sum import stages
from silotune.privacy.secure_sum.sharing import FalseSharing, OpenShare, SignedSharing
from silotune.privacy.secure_sum.terms import Hex32, Hex64, SignedKeys, Terms
from silotune.record.plain_json import sha256
from silotune.settings.base import Fraction, Positive, Section
from silotune.settings.protections import HeScheme
from silotune.settings.sections import PrivacySection
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
    """What an owner sealed for one holder, the commitments to the two shares in it, and its signature over that."""

    text: SealedText
    seed: Hex32
    key: Hex32
    signature: Hex64

    def read(self) -> stages.Sealed:
        """With the text as bytes."""
        return stages.Sealed(bytes.fromhex(self.text), self.seed, self.key, self.signature)


def written(sealed: stages.Sealed) -> SealedShares:
    """As it travels."""
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
    train: dict[str, Any]


class CheckOrder(SumOrder):
    """Phase 5: whose inputs are in the sum; and who is not any more, with the proof that it has lied before."""

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
    """Answer of phase 3: the owners whose shares this site does not hold, with its signature under that."""

    complaints: dict[str, Hex64]


class GivenShares(Section):
    """The two shares that one holder was given."""

    seed: OpenShare
    key: OpenShare

    def read(self) -> tuple[bytes, bytes]:
        """As bytes: (of the seed, of the mask key)."""
        return bytes.fromhex(self.seed), bytes.fromhex(self.key)


class InputReport(Section):
    """Answer of phase 4, beside its tensors: what the holders that complain were given."""

    answers: dict[str, GivenShares] = {}


class CheckReport(Section):
    """Answer of phase 5."""

    signature: Hex64


class UnmaskReport(Section):
    """Answer of phase 6: shares by owner, of mask seeds or of mask keys."""

    seed: dict[str, OpenShare]
    key: dict[str, OpenShare]


def work_digest(order: Mapping[str, Any], tensors: Tensors) -> str:
    """SHA-256 of what a sum is made from: the ``train`` order, without its job, and the tensors that training begins
    with."""
    return sha256({"order": order_digest(order), "tensors": arithmetic.digest(tensors)})


def input_layout(request: Request) -> Layout:
    """What the tensors of an answer to ``secure_sum.input`` must be."""
    order = read_body(InputOrder, request)
    return {VALUES: (f"I{order.bits}", (order.size,)), FIGURES_NAME: ("I64", (len(FIGURES),))}


CELLS, PLAIN, SUM = "cells", "plain", "sum"


FIGURE_PACKING = Packing("bfv", 1)
"""Figures need whole slots, whatever the scheme of the values: sums of them may take 57 bits."""


class WeightOrder(SumOrder):
    """``he.weight`` has no settings."""


class EncryptOrder(SumOrder):
    """``he.input``: how to encrypt; all examples; values of an update, and the encrypted ones of them; the training."""

    scheme: HeScheme
    packing: Positive
    fraction: Fraction
    bound: float
    clients: Positive
    num_examples: Positive
    size: Positive
    hidden: Positive
    train: dict[str, Any]

    def packed(self) -> Packing:
        """How numbers lie in slots."""
        return Packing(self.scheme, self.packing)

    def scale(self) -> Scale:
        """Weights are shares of the cohort's examples, so that they sum to 1 at most."""
        return Scale(self.packed().levels(self.clients), self.bound, self.num_examples)


class OpenOrder(SumOrder):
    """``he.open``: what the ciphertexts hold."""

    scheme: HeScheme
    packing: Positive
    size: Annotated[int, Field(ge=0)]
    num_figures: Positive


def packing_of(privacy: PrivacySection) -> Packing:
    """How a run's settings say that numbers lie in slots."""
    settings = privacy.ciphertexts
    return Packing(settings.he_scheme, settings.packing if settings.he_scheme == "bfv" else 1)


def places(weights: Tensors, fraction: float) -> Array:
    """Which values of an update travel encrypted, bool [size]; from the model's tensors that are trained."""
    return encrypted_places([weights[name].reshape(-1).float().cpu().numpy() for name in sorted(weights)], fraction)


def weight_layout(request: Request) -> Layout:
    """Of an answer to ``he.weight``."""
    return {FIGURES_NAME: ("U8", (1, PARAMETERS["bfv"].cell_bytes))}


def update_layout(request: Request) -> Layout:
    """Of an answer to ``he.input``."""
    order = read_body(EncryptOrder, request)
    made: dict[str, tuple[str, tuple[int, ...]]] = {
        CELLS: ("U8", (order.packed().cells(order.hidden), PARAMETERS[order.scheme].cell_bytes)),
        FIGURES_NAME: ("U8", (1, PARAMETERS["bfv"].cell_bytes)),
    }
    return {**made, PLAIN: ("F32", (order.size - order.hidden,))} if order.fraction < 1 else made


def open_layout(request: Request) -> Layout:
    """Of an answer to ``he.open``."""
    order = read_body(OpenOrder, request)
    figures: dict[str, tuple[str, tuple[int, ...]]] = {FIGURES_NAME: ("I64", (order.num_figures,))}
    return {**figures, SUM: (_SUM_TYPES[order.scheme][1], (order.size,))} if order.size else figures


def sum_layout(request: Request) -> Layout:
    """Of the ciphertexts in an ``he.open`` request itself."""
    order = read_body(OpenOrder, request)
    figures: dict[str, tuple[str, tuple[int, ...]]] = {FIGURES_NAME: ("U8", (1, PARAMETERS["bfv"].cell_bytes))}
    if not order.size:
        return figures
    cells = Packing(order.scheme, order.packing).cells(order.size)
    return {**figures, CELLS: ("U8", (cells, PARAMETERS[order.scheme].cell_bytes))}


NUM_FIGURES = 1 + len(FIGURES)


_SUM_TYPES: dict[HeScheme, tuple[type[Any], str]] = {"bfv": (np.int32, "I32"), "ckks": (np.float32, "F32")}
