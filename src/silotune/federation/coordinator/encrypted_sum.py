"""Collects a round's update as a sum of ciphertexts: weights, updates, and a site that opens the sum.

The coordinator never holds a key. A site decrypts the sum for it, so an honest coordinator sees what a secure sum
shows; one that cheats could have a single update opened, which ``secure_sum`` does not allow. Values that honest sites
cannot have sent are refused. The refusal names a site where its own part is visible, and no site where only the sum
is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.errors import ProtectionError
from silotune.federation.coordinator.exchange import Asking, Collector, Exchange, booked, order_in
from silotune.federation.wire.messages import Layout, layout_of
from silotune.federation.wire.sum_orders import (
    CELLS,
    FIGURES_NAME,
    NUM_FIGURES,
    SUM,
    EncryptOrder,
    OpenOrder,
    WeightOrder,
    open_layout,
    update_layout,
    weight_layout,
)
from silotune.privacy.encryption import Adder, Array
from silotune.privacy.figures import Limits, from_integers, impossible
from silotune.privacy.ring import mean
from silotune.settings.base import Section
from silotune.settings.sections import PrivacySection
from silotune.structs import ClientUpdate, Reply, Request, Tensors

FLOAT32 = 1e-6
"""Relative error that a float32 number may have after one or two products."""
AGREEING = 2
"""How many sites must open a sum to the same values before a site that opened it to others is booked as failed."""
Opened = TypeVar("Opened")


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
        clients, num_examples = self._weights(wire)
        order = EncryptOrder(
            packing=self.privacy.ciphertexts.packing,
            bound=self.privacy.sums.bound,
            clients=clients,
            num_examples=num_examples,
            size=sum(self.asking.weights[name].numel() for name in self.asking.shape),
            train=order_in(self.asking),
        )
        cells, figures = self._updates(wire, order)
        opened = partial(self._mean_in, order)
        added = {CELLS: cells, FIGURES_NAME: figures}
        values, counted = self._open(wire, added, opened, size=order.size, num_figures=NUM_FIGURES)
        return booked(self.asking, wire, values, counted, clients=len(self.openers))

    def _weights(self, wire: Exchange) -> tuple[int, int]:
        """How many clients there are, and how many examples they have together."""
        total = Adder()
        bodies = dict.fromkeys(self.asking.clients, WeightOrder())
        for name, _, reply in wire.phase("he.weight", bodies, Section):
            read = self._read(wire, reply, weight_layout(Request("he.weight", 0, name, {})), {FIGURES_NAME: total})
            if read is not None:
                total.add(read[FIGURES_NAME])
                self.openers.append(name)
        self._check_enough(len(self.openers))
        return self._open(wire, {FIGURES_NAME: total.cells()}, self._weight_in, size=0, num_figures=2)

    def _weight_in(self, opened: Tensors) -> tuple[int, int]:
        """Clients and examples that an opened sum of weights stands for."""
        clients, num_examples = map(int, opened[FIGURES_NAME].tolist())
        self._check_count(clients)
        most = clients * self.privacy.sums.max_examples
        if not clients <= num_examples <= most:
            raise impossible(
                f"{clients} sites hold {num_examples} examples, and may hold {clients} to {most} under "
                f"privacy.protection.max_examples = {self.privacy.sums.max_examples}"
            )
        return clients, num_examples

    def _updates(self, wire: Exchange, order: EncryptOrder) -> tuple[Array, Array]:
        """Encrypted updates and figures, added up as they arrive."""
        values, figures = Adder(), Adder()
        body = order.model_dump(mode="json")
        expected = update_layout(Request("he.input", self.asking.number, "", self.asking.weights, body))
        present: list[str] = []
        asked = dict.fromkeys(self.openers, order)
        for name, _, reply in wire.phase("he.input", asked, Section, tensors=self.asking.weights):
            read = self._read(wire, reply, expected, {CELLS: values, FIGURES_NAME: figures})
            if read is None:
                continue
            values.add(read[CELLS])
            figures.add(read[FIGURES_NAME])
            present.append(name)
            self.asking.notify("client_finished", {"round": self.asking.number, "client": name})
        self.openers = present
        self._check_enough(len(present))
        return values.cells(), figures.cells()

    def _mean_in(self, order: EncryptOrder, opened: Tensors) -> tuple[Array, dict[str, Any]]:
        """The mean update and the figures that an opened sum stands for."""
        counted = opened[FIGURES_NAME].numpy()
        self._check_count(int(counted[0]))
        clients, is_whole = len(self.openers), len(self.openers) == order.clients
        figures = from_integers(counted[1:].view("<u8"), Limits(clients, self.privacy.sums.max_examples, order.size))
        examples = figures["num_examples"]
        if examples > order.num_examples or (is_whole and examples < order.num_examples):
            raise impossible(f"{examples} examples are in it, {order.num_examples} were said to be in all")
        total = opened[SUM].numpy().astype(np.int64).view("<u8")
        values = mean(total, examples, order.scale())
        error = order.scale().error_bound(clients, examples)
        largest, most = float(np.abs(values).max(initial=0.0)), order.bound * (1 + FLOAT32) + error
        if largest > most:
            raise impossible(f"a value of the mean update is {largest:.6g}, {most:.6g} at most")
        return values, figures

    def _open(
        self,
        wire: Exchange,
        cells: Mapping[str, Array],
        read: Callable[[Tensors], Opened],
        *,
        size: int,
        num_figures: int,
    ) -> Opened:
        """Asks one site after the other to decrypt the sum, until a result is possible.

        If the first site's result is impossible, either that site lies or the sum itself is impossible. Then the
        result that two sites agree on counts, and sites with another result are booked as failed.
        """
        order = OpenOrder(packing=self.privacy.ciphertexts.packing, size=size, num_figures=num_figures)
        tensors = {name: torch.from_numpy(array) for name, array in cells.items()}
        said: dict[str, str] = {}
        first: ProtectionError | None = None
        for opener in self.openers:
            for reply in self._decrypted(wire, opener, order, tensors):
                found, error = _tried(read, reply.tensors)
                if found is not None and not said:
                    return found
                said[opener], first = arithmetic.digest(reply.tensors), first or error
                if list(said.values()).count(said[opener]) < AGREEING:
                    continue
                for name in said:
                    if said[name] != said[opener]:
                        wire.fail(name, reply.kind, "it opened the sum to something else than others did")
                if found is not None:
                    return found
                raise ProtectionError(f"round {self.asking.number}: {error}")
        why = first or "no site has opened the sum; nothing of it was revealed"
        raise ProtectionError(f"round {self.asking.number}: {why}")

    def _decrypted(self, wire: Exchange, opener: str, order: OpenOrder, tensors: Tensors) -> Iterator[Reply]:
        expected = open_layout(Request("he.open", 0, opener, {}, order.model_dump(mode="json")))
        for _, _, reply in wire.phase("he.open", {opener: order}, Section, tensors=tensors):
            if self._fits(wire, reply, expected):
                yield reply

    def _read(
        self, wire: Exchange, reply: Reply, expected: Layout, adders: Mapping[str, Adder]
    ) -> dict[str, list[Any]] | None:
        """A site's ciphertexts by name, all of them ready to be added; None for a site that was booked as failed."""
        if not self._fits(wire, reply, expected):
            return None
        try:
            return {name: adder.read(reply.tensors[name].numpy()) for name, adder in adders.items()}
        except ProtectionError as error:
            wire.fail(reply.client, reply.kind, str(error))
            return None

    def _fits(self, wire: Exchange, reply: Reply, expected: Layout) -> bool:
        if layout_of(reply.tensors) == expected:
            return True
        wire.fail(reply.client, reply.kind, "its tensors are not those that were asked for")
        return False

    def _check_count(self, clients: int) -> None:
        """Every site counts itself in the sum; the coordinator knows how many it has added up."""
        if clients != len(self.openers):
            raise impossible(f"{clients} sites count themselves in it, {len(self.openers)} have sent their part")

    def _check_enough(self, count: int) -> None:
        if count < self.privacy.sums.least_clients:
            raise ProtectionError(
                f"round {self.asking.number}: {count} clients are left for this sum, {self.privacy.sums.least_clients} "
                "are needed: it stays closed and nothing of it was revealed"
            )


def _tried(read: Callable[[Tensors], Opened], tensors: Tensors) -> tuple[Opened | None, ProtectionError | None]:
    """What an opened sum stands for, or why such a sum is impossible."""
    try:
        return read(tensors), None
    except ProtectionError as error:
        return None, error
