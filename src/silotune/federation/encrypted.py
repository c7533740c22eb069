"""Collects a round's update as a sum of ciphertexts: weights, updates, and a site that opens the sum.

The coordinator never holds a key. A site decrypts the sum for it, so an honest coordinator sees what a secure sum
shows; one that cheats could have a single update opened, which ``secure_sum`` does not allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from silotune.errors import ProtectionError
from silotune.federation.encrypted_site import (
    CELLS,
    FIGURE_PACKING,
    FIGURES_NAME,
    NUM_FIGURES,
    PLAIN,
    SUM,
    EncryptOrder,
    OpenOrder,
    WeightOrder,
    open_layout,
    places,
    update_layout,
    weight_layout,
)
from silotune.federation.messages import Layout, layout_of
from silotune.federation.secure import Asking, Collector, Exchange, booked
from silotune.privacy.encryption import Adder, Array, Packing
from silotune.privacy.figures import from_integers
from silotune.privacy.ring import mean
from silotune.sections import PrivacySection
from silotune.settings import Section
from silotune.structs import ClientUpdate, Reply, Request, Tensors


def encrypted_sum(privacy: PrivacySection) -> Collector:
    """The collector of sums under homomorphic encryption."""

    def collect(asking: Asking) -> Iterator[ClientUpdate]:
        yield _EncryptedSum(asking, privacy).update()

    return collect


@dataclass
class _EncryptedSum:
    """One encrypted sum, from the weights to the opened update."""

    asking: Asking
    privacy: PrivacySection
    openers: list[str] = field(default_factory=list)

    def update(self) -> ClientUpdate:
        wire = Exchange(self.asking)
        weights, hidden = self._weights(wire), self._hidden()
        order = EncryptOrder(
            scheme=self.privacy.he_scheme,
            packing=self._packing().values,
            fraction=self.privacy.he_fraction,
            bound=self.privacy.bound,
            clients=int(weights[0]),
            num_examples=int(weights[1]),
            size=len(hidden),
            hidden=int(hidden.sum()),
            train=dict(self.asking.body),
        )
        cells, figures, plain = self._updates(wire, order)
        return self._opened(wire, order, {CELLS: cells, FIGURES_NAME: figures}, plain)

    def _packing(self) -> Packing:
        return Packing(self.privacy.he_scheme, self.privacy.he_packing if self.privacy.he_scheme == "bfv" else 1)

    def _hidden(self) -> Array:
        """Which values of an update travel encrypted."""
        return places({name: self.asking.weights[name] for name in self.asking.shape}, self.privacy.he_fraction)

    def _weights(self, wire: Exchange) -> Array:
        """How many clients there are, and their examples together."""
        total = Adder(FIGURE_PACKING)
        bodies = dict.fromkeys(self.asking.clients, WeightOrder())
        for name, _, reply in wire.phase("he.weight", bodies, Section):
            if self._fits(wire, reply, weight_layout(Request("he.weight", 0, name, {}))):
                total.add(reply.tensors[FIGURES_NAME].numpy())
                self.openers.append(name)
        self._check_enough(len(self.openers))
        return self._open(wire, {FIGURES_NAME: total.cells()}, size=0, num_figures=2)[FIGURES_NAME].numpy()

    def _updates(self, wire: Exchange, order: EncryptOrder) -> tuple[Array, Array, Array]:
        """Encrypted updates, figures and values in the clear, added up as they arrive."""
        values, figures = Adder(order.packed()), Adder(FIGURE_PACKING)
        plain = np.zeros(order.size - order.hidden, np.float64)
        body = order.model_dump(mode="json")
        expected = update_layout(Request("he.input", self.asking.number, "", self.asking.weights, body))
        present: list[str] = []
        asked = dict.fromkeys(self.openers, order)
        for name, _, reply in wire.phase("he.input", asked, Section, tensors=self.asking.weights):
            if not self._fits(wire, reply, expected):
                continue
            values.add(reply.tensors[CELLS].numpy())
            figures.add(reply.tensors[FIGURES_NAME].numpy())
            if PLAIN in reply.tensors:
                plain += reply.tensors[PLAIN].numpy()
            present.append(name)
            self.asking.notify("client_finished", {"round": self.asking.number, "client": name})
        self.openers = present
        self._check_enough(len(present))
        return values.cells(), figures.cells(), plain

    def _opened(self, wire: Exchange, order: EncryptOrder, cells: Mapping[str, Array], plain: Array) -> ClientUpdate:
        hidden = self._hidden()
        opened = self._open(wire, cells, size=order.hidden, num_figures=NUM_FIGURES)
        counted = opened[FIGURES_NAME].numpy()
        clients = int(counted[0])
        figures = from_integers(counted[1:].view("<u8"), clients)
        share = order.num_examples / figures["num_examples"]  # weights are shares of those who were there at first
        values = np.empty(len(hidden), np.float32)
        values[~hidden] = plain * share
        if order.scheme == "bfv":
            total = opened[SUM].numpy().astype(np.int64).view("<u8")
            values[hidden] = mean(total, figures["num_examples"], order.scale())
        else:
            values[hidden] = opened[SUM].numpy() * share
        return booked(self.asking, wire, values, figures, clients=clients)

    def _open(self, wire: Exchange, cells: Mapping[str, Array], *, size: int, num_figures: int) -> Tensors:
        """Asks one site after the other until one has decrypted the sum."""
        packing = self._packing()
        order = OpenOrder(scheme=packing.scheme, packing=packing.values, size=size, num_figures=num_figures)
        tensors = {name: torch.from_numpy(array) for name, array in cells.items()}
        for opener in self.openers:
            expected = open_layout(Request("he.open", 0, opener, {}, order.model_dump(mode="json")))
            for _, _, reply in wire.phase("he.open", {opener: order}, Section, tensors=tensors):
                if self._fits(wire, reply, expected):
                    return reply.tensors
        raise ProtectionError(f"round {self.asking.number}: no site has opened the sum; nothing of it was revealed")

    def _fits(self, wire: Exchange, reply: Reply, expected: Layout) -> bool:
        if layout_of(reply.tensors) == expected:
            return True
        wire.fail(reply.client, reply.kind, "its tensors are not those that were asked for")
        return False

    def _check_enough(self, count: int) -> None:
        if count < self.privacy.least_clients:
            raise ProtectionError(
                f"round {self.asking.number}: {count} clients are left for this sum, {self.privacy.least_clients} are "
                "needed: it stays closed and nothing of it was revealed"
            )
