"""What every protected sum is collected with: what a round asks, the exchanges, and the one row of an opened sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.errors import MessageError
from silotune.federation.wire.orders import Order
from silotune.federation.wire.signed_job import JOB
from silotune.privacy.secure_sum.sharing import FalseSharing
from silotune.settings.base import Section
from silotune.structs import ClientUpdate, Failure, Observer, Reply, Request, Tensors

EVERYBODY = "(sum)"
"""Stands in place of a client's name in the rows of a run folder where only the sum is known."""

RELEASE = "release"
"""Field of the row of a noised sum: what was released, as a ledger counts it."""

SigningKeys: TypeAlias = Mapping[str, Sequence[str]]
"""Client -> the public keys that it may sign with, in OpenSSH's format; the coordinator does not check the signatures
of a client that is not named here. In a run in one process none is named, because this program makes all the keys
itself."""

_Report = TypeVar("_Report", bound=Section)


class Exclusion(Section):
    """Why a client is no longer asked.

    Attributes:
        round_number: In which round it was found.
        reason: What it did, in one line.
        proof: Evidence that is shown to the other clients if they had helped to open the sum in which the client lied.
        is_lasting: Whether the client has lied for certain; then it is left out for the rest of the run, not only of
            this round.
    """

    round_number: int
    reason: str
    proof: FalseSharing | None = None
    is_lasting: bool = True


def lasting(excluded: Mapping[str, Any]) -> dict[str, Any]:
    """The exclusions that hold for the next rounds, too."""
    return {name: why for name, why in excluded.items() if why["is_lasting"]}


class Book(Protocol):
    """Where a round's rows and failures are written, and who is to be left out of what follows."""

    rows: list[dict[str, Any]]
    excluded: dict[str, Any]

    def fail(self, failure: Failure, notify: Observer) -> None:
        """A client gave no usable reply."""

    def blame(self, failure: Failure, notify: Observer) -> None:
        """A client's reply cannot be used; the audit trail records that, too."""


@dataclass(frozen=True)
class Asking:
    """A round as its collector gets it.

    Attributes:
        number: Of the round.
        clients: Who is asked.
        weights: Adapter tensors that are sent.
        shape: Tensors with the names and shapes of an update.
        body: Of a ``train`` request.
        send: Carries requests, gives replies and failures as they arrive.
        book: Keeps rows and failures.
        notify: Told of events.
        excluded: Clients that are no longer asked, with their ``Exclusion`` in plain JSON. They stay in the cohort, as
            clients that do not answer do, so that the sum without them has the same bits in both cases.
    """

    number: int
    clients: tuple[str, ...]
    weights: Tensors
    shape: Tensors
    body: Mapping[str, Any]
    send: Callable[[Mapping[str, Request]], Iterator[Reply | Failure]]
    book: Book
    notify: Observer
    excluded: Mapping[str, Any] = field(default_factory=dict)


def order_in(asking: Asking) -> Order:
    """The order to train, without the job, which a sum's messages carry beside it."""
    return Order.model_validate({name: value for name, value in asking.body.items() if name != JOB})


Collector: TypeAlias = Callable[[Asking], Iterator[ClientUpdate]]
"""Asks a round's clients and yields what is to be aggregated, as it arrives."""


@dataclass
class Exchange:
    """One round's exchanges of one kind of protection; counts what they take."""

    asking: Asking
    bytes_down: int = 0
    bytes_up: int = 0

    def phase(
        self, kind: str, bodies: Mapping[str, Section], report: type[_Report], *, tensors: Tensors | None = None
    ) -> Iterator[tuple[str, _Report, Reply]]:
        """Sends one request a client; yields the valid answers as they arrive, and books the rest as failures."""
        number, beside = self.asking.number, {JOB: self.asking.body[JOB]} if JOB in self.asking.body else {}
        requests = {
            name: Request(kind, number, name, tensors or {}, {**body.model_dump(mode="json", exclude={JOB}), **beside})
            for name, body in bodies.items()
        }
        waiting = set(requests)
        for reply in self.asking.send(requests):
            if isinstance(reply, Failure):
                self.asking.book.fail(reply, self.asking.notify)
                continue
            self.bytes_down += reply.bytes_down
            self.bytes_up += reply.bytes_up
            try:
                if (reply.kind, reply.round_number) != (kind, number) or reply.client not in waiting:
                    raise MessageError(f"a reply answers no request of round {number}")
                if not isinstance(reply.read, report):
                    raise MessageError(f"a reply to {kind} holds no {report.__name__}")
            except MessageError as error:
                self.fail(reply.client if reply.client in requests else "unknown", kind, str(error))
                continue
            waiting.remove(reply.client)
            yield reply.client, reply.read, reply

    def has(self, client: str, stage: str, fault: str | None) -> bool:
        """Books a client whose answer has a fault; says whether it has one."""
        if fault is not None:
            self.fail(client, stage, fault)
        return fault is not None

    def fail(self, client: str, stage: str, reason: str) -> None:
        """Books a client whose answer cannot be used."""
        self.asking.book.blame(Failure(client, self.asking.number, stage, reason), self.asking.notify)


def booked(
    asking: Asking, wire: Exchange, values: np.ndarray[Any, Any], figures: dict[str, Any], *, clients: int
) -> ClientUpdate:
    """Writes the one row of an opened sum, tells of values that were cut off, and gives the update of all clients.

    Args:
        asking: The round.
        wire: Its exchanges.
        values: Weighted mean of the updates, float32 [size].
        figures: Sums of what the clients report; ``clipped`` among them.
        clients: How many clients' updates are in the sum.
    """
    clipped = figures.pop("clipped")
    figures.pop("weight")
    row = {"round": asking.number, "client": EVERYBODY, **figures, "clients_in_sum": clients, "clipped": clipped}
    asking.book.rows.append({**row, "bytes_up": wire.bytes_up, "bytes_down": wire.bytes_down})
    asking.notify("sum_opened", row)
    if clipped:
        share = clipped / (clients * max(1, len(values)))
        asking.notify(
            "note",
            {
                "text": f"round {asking.number}: {clipped} values ({share:.2%}) were beyond "
                "privacy.protection.bound and cut off: raise it"
            },
        )
    delta = arithmetic.unflatten(torch.from_numpy(values), asking.shape)
    return ClientUpdate(EVERYBODY, delta, figures["num_examples"], figures["loss"] or 0.0, figures["steps"])
