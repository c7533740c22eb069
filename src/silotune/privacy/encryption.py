"""Sums of ciphertexts: sites share one secret key, the coordinator adds what it cannot read (TenSEAL, SEAL).

BFV (Fan and Vercauteren 2012) sums integers exactly, and several of them share a slot. Only additions are needed, so
the smallest parameters do.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from silotune.errors import ProtectionError, require

Array: TypeAlias = "np.ndarray[Any, Any]"

SLOTS = 4096
"""Degree of the polynomials, N; a ciphertext holds as many numbers."""
PRIME_BITS = (36, 36, 37)
"""Bits of the primes of the coefficient modulus; the last one is in no ciphertext. At most 109 bits in all are 128-bit
security for N = 4096 (Albrecht et al. 2018, the Homomorphic Encryption Standard, table 1)."""
PLAIN_MODULUS = 288230376151130113
"""A prime that is 1 modulo 2 N."""
PLAIN_BITS = 57
"""Bits that a slot's signed sum may take."""
CELL_BYTES = 90_112
"""Bytes of an encoded ciphertext on the wire, filled up, so that its size is known beforehand and reveals nothing."""
MOST_CLIENTS = 256
"""The most clients whose noise together surely leaves the sum readable: a fresh ciphertext's noise is below 21 (6
standard deviations of 3.2, where SEAL cuts off, and rounding), and the sum of the noise must stay below q / (2 t) =
2**(72 - 59); 256 * 21 < 2**12.4."""


@dataclass(frozen=True)
class Packing:
    """How numbers lie in slots.

    Attributes:
        values: Numbers a slot.
    """

    values: int

    @property
    def bits(self) -> int:
        """Bits that the signed sum of one number may take."""
        return PLAIN_BITS // self.values

    def levels(self, clients: int) -> int:
        """The largest magnitude of the clients' sum before rounding, so that no number runs into the next one.

        Client i sends at most w_i * levels + 1 with weights that sum to 1, so all together at most levels + clients,
        which is below 2**(bits - 1).

        Raises:
            ProtectionError: There is no room, or the noise of so many clients is not proved to be small enough.
        """
        found = (1 << (self.bits - 1)) - 1 - clients
        if clients > MOST_CLIENTS or found < 1:
            raise ProtectionError(
                f"{clients} clients are too many for privacy.protection = 'he': at most {MOST_CLIENTS}"
            )
        return found

    def cells(self, size: int) -> int:
        """Ciphertexts that so many numbers take."""
        return -(-size // (SLOTS * self.values))


def new_key() -> bytes:
    """A fresh secret key for all sites of a federation: TenSEAL's context with it, and nothing that is not needed."""
    return _saved(_context(), secret=True)


def _context() -> Any:
    tenseal = _tenseal()
    return tenseal.context(
        tenseal.SCHEME_TYPE.BFV,
        poly_modulus_degree=SLOTS,
        plain_modulus=PLAIN_MODULUS,
        coeff_mod_bit_sizes=list(PRIME_BITS),
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )


def _saved(context: Any, *, secret: bool) -> bytes:
    kept = dict.fromkeys(("save_public_key", "save_galois_keys", "save_relin_keys"), False)
    return bytes(context.serialize(save_secret_key=secret, **kept))


def encrypt(numbers: Array, packing: Packing, key: bytes) -> Array:
    """Numbers as ciphertexts.

    Args:
        numbers: int64 [size], each within ``Packing.levels``.
        packing: Numbers a slot.
        key: Secret, of the sites.

    Returns:
        uint8 [cells, cell_bytes]: each a length of 4 bytes, a ciphertext, zeros.
    """
    tenseal = _tenseal()
    context = tenseal.context_from(key)
    slots = _packed(numbers, packing)
    cells = np.zeros((packing.cells(len(numbers)), CELL_BYTES), np.uint8)
    for place in range(len(cells)):
        part = slots[place * SLOTS : (place + 1) * SLOTS]
        padded = np.zeros(SLOTS, part.dtype)
        padded[: len(part)] = part
        _put(cells[place], tenseal.bfv_vector(context, padded.tolist()).serialize())
    return cells


class Adder:
    """Adds up clients' ciphertexts as they arrive; it has the scheme's parameters and no key of theirs."""

    def __init__(self) -> None:
        self._context = _tenseal().context_from(_saved(_context(), secret=False))
        self._sums: list[Any] = []

    def read(self, cells: Array) -> list[Any]:
        """One client's ciphertexts, from uint8 [cells, cell_bytes]; what this gives can be added to any other.

        Raises:
            ProtectionError: They were not made with these parameters.
        """
        vectors = [_read(self._context, cell) for cell in cells]
        if not all(map(_is_fresh, vectors)):
            raise ProtectionError("a ciphertext is not one that was made with the agreed parameters")
        return vectors

    def add(self, vectors: list[Any]) -> None:
        """Adds one client's ciphertexts, as ``read`` gave them."""
        if not self._sums:
            self._sums = list(vectors)
            return
        for total, vector in zip(self._sums, vectors, strict=True):
            total += vector

    def cells(self) -> Array:
        """The sums so far, encoded as the clients' ciphertexts are."""
        made = np.zeros((len(self._sums), CELL_BYTES), np.uint8)
        for cell, total in zip(made, self._sums, strict=True):
            _put(cell, total.serialize())
        return made


def decrypt(cells: Array, size: int, packing: Packing, key: bytes) -> Array:
    """The numbers in ciphertexts, exactly: int64 [size].

    Raises:
        ProtectionError: They are not ciphertexts made with these parameters.
    """
    context = _tenseal().context_from(key)
    parts = [np.array(_read(context, cell).decrypt()) for cell in cells]
    return _unpacked(np.concatenate(parts) if parts else np.zeros(0), size, packing)


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


def _is_fresh(vector: Any) -> bool:
    """Whether a vector is as ``encrypt`` makes it: full, of one ciphertext, at the first level."""
    parts = vector.ciphertext()
    shapes = {(part.size(), part.coeff_modulus_size(), part.poly_modulus_degree(), part.scale) for part in parts}
    return len(parts) == 1 and vector.size() == SLOTS and shapes == {(2, len(PRIME_BITS) - 1, SLOTS, 1.0)}


def _read(context: Any, cell: Array) -> Any:
    length = int.from_bytes(cell[:4].tobytes(), "little")
    if not 0 < length <= len(cell) - 4:
        raise ProtectionError("a ciphertext's length is not one that its cell can hold")
    try:
        return _tenseal().bfv_vector_from(context, cell[4 : 4 + length].tobytes())
    except (ValueError, RuntimeError) as error:
        raise ProtectionError("a ciphertext does not decode to one of the agreed parameters") from error


def _tenseal() -> ModuleType:
    return require("tenseal", extra="he")
