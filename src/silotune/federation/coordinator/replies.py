"""What comes in during one round: believed replies are counted, updates handed on, failures kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from silotune.federation.coordinator import audit as audit_trail
from silotune.federation.coordinator.audit import Audit
from silotune.federation.wire.messages import TrainReport
from silotune.methods.aggregate import CONTROL
from silotune.structs import ClientUpdate, Failure, Observer, Reply, Tensors
from silotune.tensors import put_under, scale, taken_from, without


@dataclass
class Incoming:
    """What comes in during one round; each update is handed on and forgotten.

    ``seconds`` is the time on the simulated clock; ``excluded`` says who is to be left out when the round is done
    again, and why; ``still`` names the clients whose updates hold zeros alone.
    """

    number: int
    clients: tuple[str, ...]
    staleness_exponent: float | None = None
    audit: Audit | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float | None = None
    excluded: dict[str, Any] = field(default_factory=dict)
    still: list[str] = field(default_factory=list)

    def watched(self, updates: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The updates as they come, with a look at which of them move nothing."""
        for update in updates:
            if not any(bool(tensor.any()) for tensor in update.delta.values()):
                self.still.append(update.client)
            yield update
            del update  # or it would live on until the next one is there

    def is_still(self) -> bool:
        """Whether none of the round's updates moves anything."""
        return 0 < len(self.rows) == len(self.still)

    def updates(self, replies: Iterator[Reply | Failure], notify: Observer) -> Iterator[ClientUpdate]:
        for reply in replies:
            if isinstance(reply, Failure):
                self.fail(reply, notify)
                continue
            report = reply.read
            assert isinstance(report, TrainReport), reply.kind
            told = report.model_dump(exclude=None if report.epsilon is not None else {"epsilon"})
            row = {"round": self.number, "client": reply.client, **told}
            staleness = self.number - reply.round_number
            if reply.simulated_seconds is not None:
                row["simulated_seconds"] = self.seconds = reply.simulated_seconds
            if self.staleness_exponent is not None:
                row["staleness"] = staleness
            self.rows.append({**row, "bytes_up": reply.bytes_up, "bytes_down": reply.bytes_down})
            notify("client_finished", row)
            factor = (1 + staleness) ** -(self.staleness_exponent or 0.0)
            delta = reply.tensors if factor == 1 else _aged(reply.tensors, factor)
            yield ClientUpdate(reply.client, delta, report.num_examples, report.loss, report.steps)
            del reply, delta  # or they would live on until the next one is there

    def blame(self, failure: Failure, notify: Observer) -> None:
        """Books a client whose reply was believed, but cannot be used; the audit trail records that, too."""
        audit_trail.fails(self.audit, failure)
        self.fail(failure, notify)

    def fail(self, failure: Failure, notify: Observer) -> None:
        """A client gave no usable reply."""
        self.failures.append(failure)
        if failure.simulated_seconds is not None:
            self.seconds = failure.simulated_seconds
        notify("client_failed", {"client": failure.client, "round": self.number, "reason": failure.reason})

    def usable(self) -> int:
        """Clients whose update is in the aggregate; a protected sum has one row for several."""
        return sum(int(row.get("clients_in_sum", 1)) for row in self.rows)

    def total(self, name: str) -> int:
        return sum(int(row[name]) for row in self.rows)

    def bytes_down(self) -> int:
        """Bytes of all requests, those to clients that failed included."""
        return self.total("bytes_down") + sum(failure.bytes_down for failure in self.failures)

    def bytes_up(self) -> int:
        return self.total("bytes_up") + sum(failure.bytes_up for failure in self.failures)

    def taking_part(self) -> tuple[str, ...]:
        """Clients that were asked; in an asynchronous round, which offers work to all, those that replied or failed."""
        if self.staleness_exponent is None:
            return self.clients
        return tuple([*(row["client"] for row in self.rows), *(failure.client for failure in self.failures)])

    def joules(self) -> float | None:
        """What all clients used; None where a client does not know what it used."""
        known = [row["joules"] for row in self.rows]
        return None if None in known else sum(known)

    def mean_loss(self) -> float | None:
        known = [row for row in self.rows if row["loss"] is not None]
        weight = sum(int(row["num_examples"]) for row in known)
        return sum(row["loss"] * row["num_examples"] for row in known) / weight if weight else None


def _aged(tensors: Tensors, factor: float) -> Tensors:
    """Scales a late update down; the change of a control stays as its client has made it (SCAFFOLD)."""
    return {**scale(without(CONTROL, tensors), factor), **put_under(CONTROL, taken_from(CONTROL, tensors))}
