"""Collects a round's update as a secure sum: the coordinator's five exchanges, of which one trains.

What comes out is one update for all clients together: its delta is their weighted mean, so every method that uses its
updates in no other way works on it as on theirs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from silotune import tensors as arithmetic
from silotune.errors import MessageError, ProtectionError
from silotune.federation.jobs import JOB
from silotune.federation.messages import Layout, layout_of, read_body
from silotune.federation.noised_sum import spend_of
from silotune.federation.secure_site import (
    FIGURES_NAME,
    VALUES,
    CheckOrder,
    CheckReport,
    InputOrder,
    KeysOrder,
    SharesOrder,
    SharesReport,
    UnmaskOrder,
    UnmaskReport,
    work_digest,
)
from silotune.privacy.figures import FIGURES, from_integers
from silotune.privacy.ring import RINGS, Integers, mean
from silotune.privacy.secure_sum import coordinator as protocol
from silotune.privacy.secure_sum.terms import NoiseTerms, SignedKeys, Terms, all_holders, roster_digest, safe_degree
from silotune.sections import PrivacySection
from silotune.settings import Section
from silotune.structs import ClientUpdate, Failure, Observer, Reply, Request, Tensors

EVERYBODY = "(sum)"
"""Stands for a client's name in the rows of a run folder, where only the sum is known."""

COARSE = 0.25
"""Share of the largest value of a sum above which the error of rounding is told."""

RELEASE = "release"
"""Field of the row of a noised sum: what was released, as a ledger counts it."""

_Report = TypeVar("_Report", bound=Section)


class Book(Protocol):
    """Where a round's rows and failures are written."""

    rows: list[dict[str, Any]]

    def fail(self, failure: Failure, notify: Observer) -> None:
        """A client gave no usable reply."""


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
    """

    number: int
    clients: tuple[str, ...]
    weights: Tensors
    shape: Tensors
    body: Mapping[str, Any]
    send: Callable[[Mapping[str, Request]], Iterator[Reply | Failure]]
    book: Book
    notify: Observer


Collector: TypeAlias = Callable[[Asking], Iterator[ClientUpdate]]
"""Asks a round's clients and yields what is to be aggregated, as it arrives."""


def secure_sum(privacy: PrivacySection) -> Collector:
    """The collector of the protocol in ``privacy/secure_sum``."""

    def collect(asking: Asking) -> Iterator[ClientUpdate]:
        yield _Sum(asking, terms_of(privacy, asking)).update()

    return collect


def terms_of(privacy: PrivacySection, asking: Asking) -> Terms:
    """The terms of a round's sum, under a fresh random name.

    Raises:
        ProtectionError: The round has fewer clients than a sum may be over.
    """
    if len(asking.clients) < privacy.least_clients:
        raise ProtectionError(
            f"round {asking.number} has {len(asking.clients)} clients, privacy.least_clients = {privacy.least_clients}"
        )
    return Terms(
        session=secrets.token_hex(16),
        round_number=asking.number,
        cohort=tuple(sorted(asking.clients)),
        threshold=privacy.threshold,
        degree=max(1, safe_degree(len(asking.clients), privacy.threshold)),
        bits=privacy.ring_bits,
        bound=privacy.bound,
        max_examples=privacy.max_examples,
        size=arithmetic.count(asking.shape),
        work=work_digest(asking.body, asking.weights),
        noise=_noise(privacy),
    )


def _noise(privacy: PrivacySection) -> NoiseTerms | None:
    if privacy.dp != "distributed" or privacy.noise_multiplier is None:
        return None
    return NoiseTerms(multiplier=privacy.noise_multiplier, clip_norm=privacy.clip_norm, colluding=privacy.colluding)


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
                answer = read_body(report, reply)
            except MessageError as error:
                self.fail(reply.client if reply.client in requests else "unknown", kind, str(error))
                continue
            waiting.remove(reply.client)
            yield reply.client, answer, reply

    def fail(self, client: str, stage: str, reason: str) -> None:
        """Books a client whose answer cannot be used."""
        self.asking.book.fail(Failure(client, self.asking.number, stage, reason), self.asking.notify)


@dataclass
class _Sum:
    """One secure sum, from the first exchange to the last."""

    asking: Asking
    terms: Terms
    keys: dict[str, SignedKeys] = field(default_factory=dict)
    commitments: dict[str, str] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)

    def update(self) -> ClientUpdate:
        """All phases in their order; too few clients at any of them end the sum with nothing opened."""
        wire = Exchange(self.asking)
        bodies = {name: KeysOrder(terms=self.terms) for name in self.asking.clients}
        self.keys = {name: keys for name, keys, _ in wire.phase("secure_sum.keys", bodies, SignedKeys)}
        self._check_enough(self.keys, "advertised keys")
        sealed = self._shares(wire)
        sums = self._inputs(wire, protocol.routed(sealed))
        signatures = self._signatures(wire)
        protocol.unmask(
            sums,
            self.terms,
            self.keys,
            commitments=self.commitments,
            survivors=self.survivors,
            revealed=self._revealed(wire, signatures),
        )
        return self._opened(sums, wire)

    def _shares(self, wire: Exchange) -> dict[str, dict[str, bytes]]:
        order = SharesOrder(keys=self.keys)
        sealed: dict[str, dict[str, bytes]] = {}
        for name, report, _ in wire.phase("secure_sum.shares", dict.fromkeys(self.keys, order), SharesReport):
            sealed[name] = {peer: bytes.fromhex(text) for peer, text in report.shares.items()}
            self.commitments[name] = report.commitment
        self._check_enough(sealed, "sent shares")
        return sealed

    def _inputs(self, wire: Exchange, routed: Mapping[str, Mapping[str, bytes]]) -> list[Integers]:
        """Masked inputs, added up as they arrive; memory does not grow with the clients."""
        arrived, bits = tuple(sorted(routed)), self.terms.bits
        sums = [np.zeros(self.terms.size, RINGS[bits]), np.zeros(len(FIGURES), RINGS[64])]
        bodies = {
            name: InputOrder(
                bits=bits,
                size=self.terms.size,
                arrived=arrived,
                shares={peer: text.hex() for peer, text in texts.items()},
                train=dict(self.asking.body),
            )
            for name, texts in routed.items()
        }
        expected: Layout = {VALUES: (f"I{bits}", (self.terms.size,)), FIGURES_NAME: ("I64", (len(FIGURES),))}
        for name, _, reply in wire.phase("secure_sum.input", bodies, Section, tensors=self.asking.weights):
            if layout_of(reply.tensors) != expected:
                wire.fail(name, reply.kind, "its tensors are not those of a masked input")
                continue
            for total, tensor in zip(sums, (reply.tensors[VALUES], reply.tensors[FIGURES_NAME]), strict=True):
                total += tensor.numpy().view(total.dtype)
            self.survivors.append(name)
            self.asking.notify("client_finished", {"round": self.asking.number, "client": name})
        self._check_enough(self.survivors, "sent their input")
        return sums

    def _signatures(self, wire: Exchange) -> dict[str, str]:
        order = CheckOrder(survivors=tuple(sorted(self.survivors)))
        answers = wire.phase("secure_sum.check", dict.fromkeys(self.survivors, order), CheckReport)
        signatures = {name: report.signature for name, report, _ in answers}
        self._check_enough(signatures, "signed the list of inputs")
        return signatures

    def _revealed(self, wire: Exchange, signatures: Mapping[str, str]) -> dict[str, dict[str, tuple[str, bytes]]]:
        with_shares = all_holders(tuple(self.keys), roster_digest(self.terms, self.keys), self.terms.degree)
        bodies = {
            name: UnmaskOrder(signatures={peer: signatures[peer] for peer in with_shares[name] if peer in signatures})
            for name in signatures
        }
        return {
            name: {
                owner: (kind, bytes.fromhex(text))
                for kind, texts in (("seed", report.seed), ("key", report.key))
                for owner, text in texts.items()
            }
            for name, report, _ in wire.phase("secure_sum.unmask", bodies, UnmaskReport)
        }

    def _opened(self, sums: Sequence[Integers], wire: Exchange) -> ClientUpdate:
        figures = from_integers(sums[1], len(self.survivors))
        values = mean(sums[0], figures["weight"], self.terms.scale())
        if self.terms.noise is not None:
            noise = self.terms.shared_noise(self.terms.noise)
            figures[RELEASE] = asdict(spend_of(noise, len(self.survivors)))
        else:
            self._tell_if_coarse(values, figures["weight"])
        return booked(self.asking, wire, values, figures, clients=len(self.survivors))

    def _tell_if_coarse(self, values: np.ndarray[Any, Any], weight: int) -> None:
        """An alarm where rounding to the ring's integers is as large as what is summed."""
        error, largest = self.terms.scale().error_bound(len(self.survivors), weight), float(np.abs(values).max())
        if error > COARSE * largest:
            text = (
                f"round {self.asking.number}: rounding in the ring changes a value by up to {error:.2g}, and the "
                f"largest value of the mean update is {largest:.2g}: lower privacy.max_examples to the largest site's, "
                "lower privacy.bound, or raise privacy.ring_bits"
            )
            self.asking.notify("note", {"text": text})

    def _check_enough(self, left: Mapping[str, Any] | Sequence[str], what: str) -> None:
        needed = self.terms.needed(len(self.terms.cohort))
        if len(left) < needed:
            raise ProtectionError(
                f"round {self.asking.number}: {len(left)} of {len(self.terms.cohort)} clients {what}, {needed} are "
                "needed: the sum stays closed and nothing of it was revealed"
            )


def booked(
    asking: Asking, wire: Exchange, values: np.ndarray[Any, Any], figures: dict[str, Any], *, clients: int
) -> ClientUpdate:
    """Writes the one row of an opened sum, tells of values that were cut off, and gives the update of all clients.

    Args:
        asking: The round.
        wire: Its exchanges.
        values: Weighted mean of the updates, float32 [size].
        figures: Sums of what the clients report; ``clipped`` among them.
        clients: Whose update is in the sum.
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
                "text": f"round {asking.number}: {clipped} values ({share:.2%}) were beyond privacy.bound and cut off: "
                "raise it"
            },
        )
    delta = arithmetic.unflatten(torch.from_numpy(values), asking.shape)
    return ClientUpdate(EVERYBODY, delta, figures["num_examples"], figures["loss"] or 0.0, figures["steps"])
