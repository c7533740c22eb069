"""Sums of ciphertexts decrypt to the plain sum, exactly; the coordinator cannot decrypt anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.errors import ProtectionError
from silotune.privacy.encryption import (
    MOST_CLIENTS,
    PLAIN_BITS,
    PLAIN_MODULUS,
    PRIME_BITS,
    SLOTS,
    Adder,
    Packing,
    _context,
    _packed,
    _saved,
    _unpacked,
    decrypt,
    encrypt,
    new_key,
)

tenseal = pytest.importorskip("tenseal")


@pytest.fixture(scope="module")
def key() -> bytes:
    return new_key()


@pytest.mark.parametrize("values", [1, 2, 3, 4])
def test_sums_of_the_largest_values_are_exact(key: bytes, values: int) -> None:
    packing, clients = Packing(values), 4
    most = packing.levels(clients) // clients + 1
    drawn = np.random.default_rng(values)
    inputs = [drawn.integers(-most, most + 1, 5000) for _ in range(clients)]
    for vector in inputs:
        vector[:2] = (most, -most)
    total = Adder()
    for vector in inputs:
        total.add(total.read(encrypt(vector, packing, key)))
    np.testing.assert_array_equal(decrypt(total.cells(), 5000, packing, key), sum(inputs))


@settings(max_examples=20)
@given(
    values=st.integers(1, 4),
    numbers=st.lists(st.integers(-8191, 8191), min_size=1, max_size=9),
    copies=st.integers(1, 9),
)
def test_packed_numbers_do_not_run_into_each_other(values: int, numbers: list[int], copies: int) -> None:
    packing = Packing(values)
    small = np.fix(np.array(numbers) / copies).astype(np.int64)  # towards 0: the sum stays within the bounds
    slots = _packed(small, packing) * copies
    np.testing.assert_array_equal(_unpacked(slots, len(numbers), packing), small * copies)


def test_packing_by_hand() -> None:
    packing = Packing(3)
    assert packing.bits == 19 and packing.levels(10) == 2**18 - 1 - 10
    assert _packed(np.array([1, -2, 3, 4]), packing).tolist() == [1 - 2 * 2**19 + 3 * 2**38, 4]
    assert packing.cells(4096 * 3) == 1 and packing.cells(4096 * 3 + 1) == 2
    with pytest.raises(ProtectionError, match="257 clients are too many"):
        packing.levels(257)


def test_parameters_are_of_128_bits_and_leave_room() -> None:
    """SEAL refuses parameters below 128 bits itself; the noise of most clients stays below q / (2 t)."""
    assert SLOTS == 4096 and sum(PRIME_BITS) <= 109
    _context()
    assert PLAIN_MODULUS % (2 * SLOTS) == 1
    assert 3 * (1 << (PLAIN_BITS - 1)) < 2 * PLAIN_MODULUS
    assert 2 ** (sum(PRIME_BITS[:-1]) - 0.1) > MOST_CLIENTS * 21 * 2 * PLAIN_MODULUS


def test_the_coordinator_cannot_decrypt(key: bytes) -> None:
    packing = Packing(3)
    cells = encrypt(np.arange(10), packing, key)
    total = Adder()
    total.add(total.read(cells))
    with pytest.raises(ValueError, match="secret_key"):
        total._sums[0].decrypt()
    assert not total._context.has_secret_key()
    for other in (new_key(), _saved(_context(), secret=True)):
        assert (decrypt(cells, 10, packing, other) != np.arange(10)).all()


def test_ciphertexts_look_like_noise_and_never_repeat(key: bytes) -> None:
    packing = Packing(3)
    one, other = (encrypt(np.zeros(10, np.int64), packing, key)[0] for _ in range(2))
    assert (one[1000:80000] == other[1000:80000]).mean() < 0.02
    assert not one[-1000:].any() and len(one) <= 2 * 4 * 3 * 4096  # filled up; at most twice float32


def test_broken_ciphertexts_are_refused(key: bytes) -> None:
    packing = Packing(3)
    cells = encrypt(np.arange(10), packing, key)
    for wrong in (np.zeros_like(cells), np.full_like(cells, 255)):
        with pytest.raises(ProtectionError, match="length is not one"):
            Adder().read(wrong)
    cells[0, 4:200] = 7
    with pytest.raises(ProtectionError, match="does not decode"):
        Adder().read(cells)
