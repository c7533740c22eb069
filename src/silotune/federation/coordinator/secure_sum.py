"""Collects a round's update as a secure sum: the coordinator's six exchanges, of which one trains.

The result is one update for all clients together. Its delta is their weighted mean, so every method that uses only
the mean of updates works on it. A client that lies is found, booked under its name and left out, where
it can be told which one it is; the others go on where the threshold allows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from silotune import tensors as arithmetic
from silotune.errors import ProtectionError
from silotune.federation.coordinator.exchange import (
    RELEASE,
    Asking,
    Collector,
    Exchange,
    Exclusion,
    SigningKeys,
    booked,
    order_in,
)
from silotune.federation.wire.messages import Layout, layout_of
from silotune.federation.wire.sum_orders import (
    FIGURES_NAME,
    VALUES,
    AcceptOrder,
    AcceptReport,
    CheckOrder,
    CheckReport,
    InputOrder,
    InputReport,
    KeysOrder,
    SharesOrder,
    SharesReport,
    UnmaskOrder,
    UnmaskReport,
    work_digest,
    written,
)
from silotune.privacy.accountant import spend_of
from silotune.privacy.distributed import largest_noised
from silotune.privacy.figures import FIGURES, Limits, from_integers, impossible
from silotune.privacy.ring import RINGS, Integers, largest_of, mean, signed
from silotune.privacy.secure_sum import coordinator as protocol
from silotune.privacy.secure_sum.sharing import FalseSharing, Secret, SignedSharing
from silotune.privacy.secure_sum.stages import Sealed
from silotune.privacy.secure_sum.terms import NoiseTerms, SignedKeys, Terms
from silotune.record.signatures import raw_public
from silotune.settings.privacy import Distributed
from silotune.settings.sections import PrivacySection
from silotune.structs import ClientUpdate, Failure

COARSE = 0.25
"""A note warns where the error of rounding is above this share of the largest value of a sum."""


def secure_sum(privacy: PrivacySection, keys: SigningKeys) -> Collector:
    """The collector of the protocol in ``privacy/secure_sum``; ``keys`` are those that clients sign with."""
    known = {name: tuple(raw_public(line) for line in lines) for name, lines in keys.items()}

    def collect(asking: Asking) -> Iterator[ClientUpdate]:
        yield _Sum(asking, terms_of(privacy, asking), known).update()

    return collect


def terms_of(privacy: PrivacySection, asking: Asking) -> Terms:
    """The terms of a round's sum, under a fresh random name.

    Raises:
        ProtectionError: The round has fewer clients than a sum may be over.
    """
    if len(asking.clients) < privacy.sums.least_clients:
        raise ProtectionError(
            f"round {asking.number} has {len(asking.clients)} clients, least_clients = {privacy.sums.least_clients}"
        )
    return Terms(
        session=secrets.token_hex(16),
        round_number=asking.number,
        cohort=tuple(sorted(asking.clients)),
        threshold=privacy.masks.threshold,
        bits=privacy.masks.ring_bits,
        bound=privacy.sums.bound,
        max_examples=privacy.sums.max_examples,
        size=arithmetic.count(asking.shape),
        work=work_digest(order_in(asking), asking.weights),
        noise=_noise(privacy),
    )


def _noise(privacy: PrivacySection) -> NoiseTerms | None:
    dp = privacy.dp
    if not isinstance(dp, Distributed) or dp.noise_multiplier is None:
        return None
    return NoiseTerms(multiplier=dp.noise_multiplier, clip_norm=dp.clip_norm, colluding=dp.colluding)


@dataclass
class _Sum:
    """One secure sum, from the first exchange to the last."""

    asking: Asking
    terms: Terms
    known: Mapping[str, Sequence[bytes]]
    sharings: dict[str, SignedSharing] = field(default_factory=dict)
    answers: dict[str, dict[str, tuple[bytes, bytes]]] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)

    def update(self) -> ClientUpdate:
        """All phases in their order; too few clients at any of them end the sum with nothing opened."""
        wire = Exchange(self.asking)
        parties = self._keys(wire)
        complaints = self._complaints(wire, parties, self._shares(wire, parties))
        agreed = self._agreed(wire, parties, complaints)
        sums = self._inputs(wire, parties, agreed, complaints)
        signatures = self._signatures(wire, parties, agreed.arrived)
        revealed = self._revealed(wire, parties, agreed, signatures)
        self._unmask(sums, parties, agreed, revealed)
        return self._opened(sums, wire)

    def _keys(self, wire: Exchange) -> protocol.Circle:
        self._leave_out()
        kind, keys = "secure_sum.keys", dict[str, SignedKeys]()
        asked = [name for name in self.asking.clients if name not in self.asking.excluded]
        for name, report, _ in wire.phase(kind, dict.fromkeys(asked, KeysOrder(terms=self.terms)), SignedKeys):
            if not wire.has(name, kind, protocol.fault_of_keys(self.terms, name, report, self._known(name))):
                keys[name] = report
        self._check_enough(keys, "advertised keys")
        return protocol.circle(self.terms, keys)

    def _leave_out(self) -> None:
        for name in self.asking.clients:
            if name in self.asking.excluded:
                why = Exclusion.model_validate(self.asking.excluded[name])
                reason = f"it is asked no more since round {why.round_number}: {why.reason}"
                self.asking.book.fail(Failure(name, self.asking.number, "secure_sum", reason), self.asking.notify)

    def _shares(self, wire: Exchange, parties: protocol.Circle) -> dict[str, dict[str, Sealed]]:
        kind, order = "secure_sum.shares", SharesOrder(keys=dict(parties.keys))
        sealed: dict[str, dict[str, Sealed]] = {}
        for name, report, _ in wire.phase(kind, dict.fromkeys(parties.keys, order), SharesReport):
            texts = {peer: one.read() for peer, one in report.shares.items()}
            fault = protocol.fault_of_sharing(parties, name, texts, report.sharing, self._known(name))
            if not wire.has(name, kind, fault):
                sealed[name], self.sharings[name] = texts, report.sharing
        self._check_enough(sealed, "sent shares")
        return sealed

    def _complaints(
        self, wire: Exchange, parties: protocol.Circle, sealed: Mapping[str, Mapping[str, Sealed]]
    ) -> dict[str, Mapping[str, str]]:
        """Each site that has opened its shares -> the owners whose shares it could not open, and its signatures."""
        kind, arrived = "secure_sum.accept", tuple(sorted(sealed))
        bodies = {
            name: AcceptOrder(arrived=arrived, shares={owner: written(one) for owner, one in relayed.items()})
            for name, relayed in protocol.routed(sealed).items()
        }
        found: dict[str, Mapping[str, str]] = {}
        for name, report, _ in wire.phase(kind, bodies, AcceptReport):
            known, sent = self._known(name), bodies[name].shares
            fault = protocol.fault_of_complaints(parties, name, report.complaints, known, sent=sent)
            if not wire.has(name, kind, fault):
                found[name] = report.complaints
        self._check_enough(found, "opened their shares")
        return found

    def _agreed(
        self, wire: Exchange, parties: protocol.Circle, complaints: Mapping[str, Mapping[str, str]]
    ) -> protocol.Agreed:
        """The sites that share masks, without those that have lied to other sites, or about them."""
        agreed = protocol.after_complaints(parties, complaints)
        for name in agreed.liars:
            wire.fail(name, "secure_sum.accept", "it is in dispute over shares with more sites than may lie")
        if agreed.disputes:
            said = "; ".join(f"{holder!r} cannot open those of {owner!r}" for owner, holder in agreed.disputes)
            text = f"round {self.asking.number}: sites disagree over shares, one of each pair lies: {said}"
            self.asking.notify("note", {"text": text})
        self._check_enough(agreed.arrived, "share masks")
        return agreed

    def _inputs(
        self,
        wire: Exchange,
        parties: protocol.Circle,
        agreed: protocol.Agreed,
        complaints: Mapping[str, Mapping[str, str]],
    ) -> list[Integers]:
        """Masked inputs, added up as they arrive; memory does not grow with the clients."""
        bits = self.terms.bits
        sums = [np.zeros(self.terms.size, RINGS[bits]), np.zeros(len(FIGURES), RINGS[64])]
        order = InputOrder(bits=bits, size=self.terms.size, arrived=agreed.arrived, train=order_in(self.asking))
        against = {name: agreed.against(name) for name in agreed.arrived}
        bodies = {
            name: order.model_copy(update={"complaints": {holder: complaints[holder][name] for holder in holders}})
            for name, holders in against.items()
        }
        expected: Layout = {VALUES: (f"I{bits}", (self.terms.size,)), FIGURES_NAME: ("I64", (len(FIGURES),))}
        for name, report, reply in wire.phase("secure_sum.input", bodies, InputReport, tensors=self.asking.weights):
            answers = {holder: one.read() for holder, one in report.answers.items()}
            fault = protocol.fault_of_answers(parties, name, answers, self.sharings[name], asked=against[name])
            if fault is not None:
                self._exclude(name, Exclusion(round_number=self.asking.number, reason=fault))
            if layout_of(reply.tensors) != expected:
                fault = "its tensors are not those of a masked input"
            if wire.has(name, reply.kind, fault):
                continue
            for total, tensor in zip(sums, (reply.tensors[VALUES], reply.tensors[FIGURES_NAME]), strict=True):
                total += tensor.numpy().view(total.dtype)
            self.survivors.append(name)
            self.answers[name] = answers
            self.asking.notify("client_finished", {"round": self.asking.number, "client": name})
        self._check_enough(self.survivors, "sent their input")
        return sums

    def _signatures(self, wire: Exchange, parties: protocol.Circle, arrived: Sequence[str]) -> dict[str, str]:
        kind, lists = "secure_sum.check", {"arrived": arrived, "survivors": self.survivors}
        order, signatures = CheckOrder(survivors=tuple(sorted(self.survivors)), liars=self._proofs()), dict[str, str]()
        for name, report, _ in wire.phase(kind, dict.fromkeys(self.survivors, order), CheckReport):
            fault = protocol.fault_of_signature(parties, report.signature, self._known(name), **lists)
            if not wire.has(name, kind, fault):
                signatures[name] = report.signature
        self._check_enough(signatures, "signed the list of inputs")
        return signatures

    def _proofs(self) -> dict[str, FalseSharing]:
        """The proofs against clients that lied in a sum of this round which the others have helped to open."""
        known = {name: Exclusion.model_validate(why) for name, why in self.asking.excluded.items()}
        now = {name: why.proof for name, why in known.items() if why.round_number == self.asking.number}
        return {name: proof for name, proof in now.items() if proof is not None}

    def _revealed(
        self, wire: Exchange, parties: protocol.Circle, agreed: protocol.Agreed, signatures: Mapping[str, str]
    ) -> dict[str, protocol.Revealed]:
        """The shares that were revealed as they should be."""
        kind = "secure_sum.unmask"
        bodies = dict.fromkeys(signatures, UnmaskOrder(signatures=signatures))
        revealed = {name: _shares_in(report) for name, report, _ in wire.phase(kind, bodies, UnmaskReport)}
        expected = protocol.to_reveal(agreed, self.survivors, holders=tuple(revealed))
        fitting, wrong = protocol.fitting(parties, self.sharings, revealed, expected=expected)
        for name in wrong:
            wire.fail(name, kind, "it has revealed other shares than those that it was given and asked for")
        return protocol.with_answers(fitting, self.answers)

    def _unmask(
        self,
        sums: Sequence[Integers],
        parties: protocol.Circle,
        agreed: protocol.Agreed,
        revealed: Mapping[str, protocol.Revealed],
    ) -> None:
        """Takes the masks off; whoever is found to have made that impossible is left out of what follows."""
        number, alive = self.asking.number, self.survivors
        try:
            protocol.unmask(sums, parties, self.sharings, arrived=agreed.arrived, survivors=alive, revealed=revealed)
        except protocol.FalseSharesError as error:
            self.asking.book.blame(Failure(error.owner, number, "secure_sum.shares", str(error)), self.asking.notify)
            self._exclude(error.owner, Exclusion(round_number=number, reason=str(error), proof=error.proof))
            raise ProtectionError(f"round {number}: {error}: the sum stays closed") from error
        except protocol.FewSharesError as error:
            if error.owner not in alive and error.owner in {owner for owner, _ in agreed.disputes}:
                reason = "another site says that it cannot open this site's shares, and this site has not answered"
                self._exclude(error.owner, Exclusion(round_number=number, reason=reason, is_lasting=False))
            raise ProtectionError(f"round {number}: {error}: the sum stays closed") from error

    def _exclude(self, client: str, why: Exclusion) -> None:
        self.asking.book.excluded.setdefault(client, why.model_dump(mode="json"))

    def _opened(self, sums: Sequence[Integers], wire: Exchange) -> ClientUpdate:
        clients, noise = len(self.survivors), self.terms.noise
        limits = Limits(clients, self.terms.max_examples, self.terms.size, is_capped=noise is not None)
        figures = from_integers(sums[1], limits)
        self._check_possible(sums[0], figures["weight"])
        values = mean(sums[0], figures["weight"], self.terms.scale())
        if noise is not None:
            figures[RELEASE] = asdict(spend_of(self.terms.shared_noise(noise), clients))
        else:
            self._tell_if_coarse(values, figures["weight"])
        return booked(self.asking, wire, values, figures, clients=clients)

    def _check_possible(self, total: Integers, weight: int) -> None:
        """Raises ``ProtectionError`` where no honest clients' updates can have this sum."""
        clients, noise, found = len(self.survivors), self.terms.noise, largest_of(total)
        if noise is None:
            most = self.terms.scale().largest_sum(clients, weight)
        else:
            most, norm = largest_noised(self.terms.shared_noise(noise), clients, self.terms.size)
            if (long := float(np.linalg.norm(signed(total).astype(np.float64)))) > norm:
                raise impossible(f"its norm is {long:.4g} integers, {norm:.4g} at most with all the noise")
        if found > most:
            unit = self.terms.scale().factor(1) * weight
            raise impossible(f"a value of the mean update is {found / unit:.6g}, {most / unit:.6g} at most")

    def _known(self, name: str) -> Sequence[bytes]:
        return self.known.get(name, ())

    def _tell_if_coarse(self, values: np.ndarray[Any, Any], weight: int) -> None:
        """An alarm where rounding to the ring's integers is as large as what is summed."""
        error, largest = self.terms.scale().error_bound(len(self.survivors), weight), float(np.abs(values).max())
        if error > COARSE * largest:
            text = (
                f"round {self.asking.number}: rounding in the ring changes a value by up to {error:.2g}, and the "
                f"largest value of the mean update is {largest:.2g}: lower max_examples to the largest site's, "
                "lower bound, or raise ring_bits, of privacy.protection"
            )
            self.asking.notify("note", {"text": text})

    def _check_enough(self, left: Mapping[str, Any] | Sequence[str], what: str) -> None:
        needed = self.terms.needed
        if len(left) < needed:
            raise ProtectionError(
                f"round {self.asking.number}: {len(left)} of {len(self.terms.cohort)} clients {what}, {needed} are "
                "needed: the sum stays closed and nothing of it was revealed"
            )


def _shares_in(report: UnmaskReport) -> protocol.Revealed:
    """Owner -> (which of its secrets, the revealed share)."""
    of_seed: dict[str, tuple[Secret, bytes]] = {
        owner: ("seed", bytes.fromhex(text)) for owner, text in report.seed.items()
    }
    return {**of_seed, **{owner: ("key", bytes.fromhex(text)) for owner, text in report.key.items()}}
