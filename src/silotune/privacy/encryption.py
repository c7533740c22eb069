"""Sums of ciphertexts: sites share one secret key, the coordinator adds what it cannot read (TenSEAL, SEAL).

BFV (Fan and Vercauteren 2012) sums integers exactly; several of them share a slot. CKKS (Cheon et al. 2017) sums real
numbers to about nine digits in larger ciphertexts. Both need additions only, so the smallest parameters do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from silotune.errors import ProtectionError, require
from silotune.settings.protections import HeScheme

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Parameters:
    """One row of the table of parameters.

    Attributes:
        degree: Of the polynomials, N.
        prime_bits: Of the primes of the coefficient modulus; the last one is in no ciphertext. At most 109 bits in all
            are 128-bit security for N = 4096 (Albrecht et al. 2018, the Homomorphic Encryption Standard, table 1).
        plain_modulus: Of BFV: a prime that is 1 modulo 2 N; 0 for CKKS.
        plain_bits: That a slot's signed sum may take.
        slots: Numbers in a ciphertext.
        scale_bits: Of CKKS: binary digits after the point.
        cell_bytes: Of an encoded ciphertext on the wire, filled up, so that sizes are known and say nothing.
        most_clients: Whose noise together surely leaves the sum readable. BFV: a fresh ciphertext's noise is below 21
            (6 standard deviations of 3.2, where SEAL cuts off, and rounding), and the sum of the noise must stay below
            q / (2 t) = 2**(72 - 59); 256 * 21 < 2**12.4.
    """

    degree: int
    prime_bits: tuple[int, ...]
    plain_modulus: int
    plain_bits: int
    slots: int
    scale_bits: int
    cell_bytes: int
    most_clients: int


PARAMETERS: Mapping[HeScheme, Parameters] = {
    "bfv": Parameters(4096, (36, 36, 37), 288230376151130113, 57, 4096, 0, 90_112, 256),
    "ckks": Parameters(4096, (54, 55), 0, 0, 2048, 40, 63_488, 256),
}
"""Scheme -> parameters of 128-bit security for sums."""


@dataclass(frozen=True)
class Packing:
    """How numbers lie in slots.

    Attributes:
        scheme: Name in ``PARAMETERS``.
        values: Numbers a slot: BFV takes several, CKKS one.
    """

    scheme: HeScheme
    values: int

    @property
    def bits(self) -> int:
        """Of one number's signed sum, in BFV."""
        return PARAMETERS[self.scheme].plain_bits // self.values

    def levels(self, clients: int) -> int:
        """The largest magnitude of the clients' sum before rounding, so that no number runs into the next one.

        Client i sends at most w_i * levels + 1 with weights that sum to 1, so all together at most levels + clients,
        which is below 2**(bits - 1). Of CKKS, whose numbers are no integers, 1.

        Raises:
            ProtectionError: There is no room, or the noise of so many clients is not proved to be small enough.
        """
        most, is_exact = PARAMETERS[self.scheme].most_clients, PARAMETERS[self.scheme].plain_bits > 0
        found = (1 << (self.bits - 1)) - 1 - clients if is_exact else 1
        if clients > most or found < 1:
            raise ProtectionError(f"{clients} clients are too many for privacy.protection = 'he': at most {most}")
        return found

    def cells(self, size: int) -> int:
        """Ciphertexts that so many numbers take."""
        return -(-size // (PARAMETERS[self.scheme].slots * self.values))


def new_key(scheme: HeScheme) -> bytes:
    """A fresh secret key for all sites of a federation: TenSEAL's context with it, and nothing that is not needed."""
    return _saved(_context(scheme), secret=True)


def _context(scheme: HeScheme) -> Any:
    tenseal, chosen = _tenseal(), PARAMETERS[scheme]
    context = tenseal.context(
        tenseal.SCHEME_TYPE[scheme.upper()],
        poly_modulus_degree=chosen.degree,
        plain_modulus=chosen.plain_modulus or None,
        coeff_mod_bit_sizes=list(chosen.prime_bits),
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    if chosen.scale_bits:
        context.global_scale = 2**chosen.scale_bits
    return context


def _saved(context: Any, *, secret: bool) -> bytes:
    kept = dict.fromkeys(("save_public_key", "save_galois_keys", "save_relin_keys"), False)
    return bytes(context.serialize(save_secret_key=secret, **kept))


def encrypt(numbers: Array, packing: Packing, key: bytes) -> Array:
    """Numbers as ciphertexts.

    Args:
        numbers: int64 [size] for BFV, each within ``Packing.levels``; float64 [size] for CKKS.
        packing: Scheme, and numbers a slot.
        key: Secret, of the sites.

    Returns:
        uint8 [cells, cell_bytes]: each a length of 4 bytes, a ciphertext, zeros.
    """
    tenseal, chosen = _tenseal(), PARAMETERS[packing.scheme]
    context = tenseal.context_from(key)
    vector = _vectors(packing.scheme)[0]
    slots = _packed(numbers, packing) if packing.scheme == "bfv" else numbers
    cells = np.zeros((packing.cells(len(numbers)), chosen.cell_bytes), np.uint8)
    for place in range(len(cells)):
        part = slots[place * chosen.slots : (place + 1) * chosen.slots]
        padded = np.zeros(chosen.slots, part.dtype)
        padded[: len(part)] = part
        _put(cells[place], vector(context, padded.tolist()).serialize())
    return cells


class Adder:
    """Adds up clients' ciphertexts as they arrive; it has the scheme's parameters and no key of theirs."""

    def __init__(self, packing: Packing) -> None:
        self._read = _vectors(packing.scheme)[1]
        self._context = _tenseal().context_from(_saved(_context(packing.scheme), secret=False))
        self._parameters = PARAMETERS[packing.scheme]
        self._sums: list[Any] = []

    def read(self, cells: Array) -> list[Any]:
        """One client's ciphertexts, from uint8 [cells, cell_bytes]; what this gives can be added to any other.

        Raises:
            ProtectionError: They are none of these parameters.
        """
        vectors = [_read(self._read, self._context, cell) for cell in cells]
        if not all(map(self._is_fresh, vectors)):
            raise ProtectionError("a ciphertext is not one that was made with the agreed parameters")
        return vectors

    def _is_fresh(self, vector: Any) -> bool:
        """Whether a vector is as ``encrypt`` makes it: full, of one ciphertext, at the first level and the scale."""
        chosen, parts = self._parameters, vector.ciphertext()
        shapes = {(part.size(), part.coeff_modulus_size(), part.poly_modulus_degree(), part.scale) for part in parts}
        wanted = (2, len(chosen.prime_bits) - 1, chosen.degree, 2.0**chosen.scale_bits)
        return len(parts) == 1 and vector.size() == chosen.slots and shapes == {wanted}

    def add(self, vectors: list[Any]) -> None:
        """Adds one client's ciphertexts, as ``read`` gave them."""
        if not self._sums:
            self._sums = list(vectors)
            return
        for total, vector in zip(self._sums, vectors, strict=True):
            total += vector

    def cells(self) -> Array:
        """The sums so far, encoded as the clients' ciphertexts are."""
        made = np.zeros((len(self._sums), self._parameters.cell_bytes), np.uint8)
        for cell, total in zip(made, self._sums, strict=True):
            _put(cell, total.serialize())
        return made


def decrypt(cells: Array, size: int, packing: Packing, key: bytes) -> Array:
    """The numbers in ciphertexts: int64 [size] for BFV, exactly; float64 [size] for CKKS.

    Raises:
        ProtectionError: They are no ciphertexts of these parameters.
    """
    context, read = _tenseal().context_from(key), _vectors(packing.scheme)[1]
    parts = [np.array(_read(read, context, cell).decrypt()) for cell in cells]
    slots = np.concatenate(parts) if parts else np.zeros(0)
    return _unpacked(slots, size, packing) if packing.scheme == "bfv" else slots[:size].astype(np.float64)


def _packed(numbers: Array, packing: Packing) -> Array:
    """int64 [size] as one number a slot: the sum of x_k * 2**(bits * k), with signed x_k."""
    count = -(-len(numbers) // packing.values)
    padded = np.zeros(count * packing.values, np.int64)
    padded[: len(numbers)] = numbers
    columns = padded.reshape(count, packing.values)
    made = columns[:, -1].copy()
    for place in range(packing.values - 2, -1, -1):
        made = (made << packing.bits) + columns[:, place]
    return made


def _unpacked(slots: Array, size: int, packing: Packing) -> Array:
    """The inverse, of a sum: digits around zero, so that a negative one borrows from none."""
    rest = slots.astype(np.int64)
    columns = np.empty((len(rest), packing.values), np.int64)
    half = 1 << (packing.bits - 1)
    for place in range(packing.values):
        columns[:, place] = ((rest + half) & (2 * half - 1)) - half
        rest = (rest - columns[:, place]) >> packing.bits
    return columns.reshape(-1)[:size]


def _put(cell: Array, encoded: bytes) -> None:
    if len(encoded) + 4 > len(cell):
        raise ProtectionError(f"a ciphertext takes {len(encoded)} bytes, more than its cell of {len(cell)}")
    cell[:4] = np.frombuffer(len(encoded).to_bytes(4, "little"), np.uint8)
    cell[4 : 4 + len(encoded)] = np.frombuffer(encoded, np.uint8)


def _read(read: Any, context: Any, cell: Array) -> Any:
    length = int.from_bytes(cell[:4].tobytes(), "little")
    if not 0 < length <= len(cell) - 4:
        raise ProtectionError("a ciphertext's length cannot be")
    try:
        return read(context, cell[4 : 4 + length].tobytes())
    except (ValueError, RuntimeError) as error:
        raise ProtectionError("a ciphertext does not decode to one of the agreed parameters") from error


def _vectors(scheme: HeScheme) -> tuple[Any, Any]:
    tenseal = _tenseal()
    return getattr(tenseal, f"{scheme}_vector"), getattr(tenseal, f"{scheme}_vector_from")


def _tenseal() -> ModuleType:
    return require("tenseal", extra="he")


def encrypted_places(weights: Sequence[Array], fraction: float) -> Array:
    """Which values travel encrypted: of every tensor the given fraction of largest magnitude, at least one.

    Sites and coordinator find the same places from the model that both have, so none are sent. The others travel in
    the clear and can leak what the update says of single examples.

    Args:
        weights: The received model's tensors, each flat.
        fraction: Of every tensor's values; 1 for all.

    Returns:
        bool [size] over all tensors, one after the other.
    """
    if fraction == 1:
        return np.ones(sum(map(len, weights)), bool)
    marks = []
    for tensor in weights:
        mark = np.zeros(len(tensor), bool)
        kept = min(len(tensor), max(1, round(fraction * len(tensor))))
        mark[np.argsort(-np.abs(tensor.astype(np.float64)), kind="stable")[:kept]] = True
        marks.append(mark)
    return np.concatenate(marks) if marks else np.zeros(0, bool)
