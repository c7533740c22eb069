"""Masks: a 256-bit seed becomes a keystream (AES-256 in counter mode) that is added in the ring."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silotune.errors import ProtectionError
from silotune.privacy.ring import Integers

SEED_BYTES = 32
PIECE_BYTES = 1 << 19
"""Keystream is made in pieces that stay in the processor's caches, and are few enough for Python."""
_BLOCK_BYTES = 16
_ZERO_COUNTER = bytes(_BLOCK_BYTES)
_ZERO_NONCE = bytes(12)


def add_streams(arrays: Sequence[Integers], streams: Iterable[tuple[bytes, bool]]) -> None:
    """Adds the keystream of each seed to arrays in place, or subtracts it, each array modulo its own type's range.

    A seed is used for one stream only, so the counter begins at zero.

    Args:
        arrays: Contiguous arrays of little-endian unsigned integers, masked one after the other.
        streams: Seeds of 32 bytes, each with whether its mask is taken away instead.
    """
    longest = min(max((array.nbytes for array in arrays), default=0), PIECE_BYTES)
    zeros, drawn = memoryview(bytes(longest)), bytearray(longest + _BLOCK_BYTES)  # for all seeds: fresh pages cost time
    for seed, subtract in streams:
        stream = Cipher(algorithms.AES(seed), modes.CTR(_ZERO_COUNTER)).encryptor()
        change: Any = np.subtract if subtract else np.add
        for array in arrays:
            step = PIECE_BYTES // array.itemsize
            for start in range(0, array.size, step):
                part = array[start : start + step]
                stream.update_into(zeros[: part.nbytes], drawn)
                change(part, np.frombuffer(drawn, array.dtype, part.size), out=part)


def public_half(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: str) -> bytes:
    """256 bits that only the two owners of an X25519 pair can derive, for one purpose (HKDF with SHA-256).

    Raises:
        ProtectionError: The public key is not one (a point of small order).
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtectionError("a peer's public key is not one: the sum is not computed") from error
    return derived(secret, purpose)


def derived(secret: bytes, purpose: str) -> bytes:
    """A 256-bit key for one purpose."""
    return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=None, info=f"silotune-v1:{purpose}".encode()).derive(secret)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypts and authenticates one message (AES-256-GCM); a key is used for one message only."""
    return AESGCM(key).encrypt(_ZERO_NONCE, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The inverse of ``seal``.

    Raises:
        ProtectionError: It was sealed under another key or context, or changed.
    """
    try:
        return AESGCM(key).decrypt(_ZERO_NONCE, sealed, context)
    except InvalidTag as error:
        raise ProtectionError("a share is not from its alleged sender in this session: nothing is revealed") from error


def commitment(seed: bytes) -> str:
    """What a site says of its mask seed before anybody may know it, so that a wrong share is noticed (SHA-256)."""
    return hashlib.sha256(b"silotune-v1:mask-seed:" + seed).hexdigest()
