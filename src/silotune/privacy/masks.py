"""Masks: a 256-bit seed becomes a keystream (AES-256 in counter mode) that is added in the ring."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from silotune.errors import ProtectionError
from silotune.privacy.ring import Integers

SEED_BYTES = 32
SEGMENT_BYTES = 1 << 21
"""Bytes of a segment, the part of a keystream under one nonce: each thread takes whole segments."""
PIECE_BYTES = 1 << 18
"""Keystream is made in pieces that stay in the processor's caches, and are few enough for Python."""
BLOCK_BYTES = 16
_NONCE_BYTES = 12
_ZERO_NONCE = bytes(_NONCE_BYTES)
ZEROS = memoryview(bytes(PIECE_BYTES))

Keystream = Callable[[bytes, int], CipherContext]
"""Makes the encryptor that turns zeros into one segment of a keystream, from the seed and the segment's number."""


def counter_mode(seed: bytes, segment: int) -> CipherContext:
    """AES-256 in counter mode; the counter's first 12 bytes are the segment's number, and the last 4 begin at 2."""
    return Cipher(algorithms.AES(seed), modes.CTR(_nonce(segment) + (2).to_bytes(4, "big"))).decryptor()


def counter_mode_of_gcm(seed: bytes, segment: int) -> CipherContext:
    """The same keystream out of AES-256-GCM, which keeps block 1 for a tag that nobody asks for (NIST SP 800-38D, 7.1).

    OpenSSL gives the wider AES instructions of newer processors (VAES) to GCM and not to the counter mode alone.
    """
    return Cipher(algorithms.AES(seed), modes.GCM(_nonce(segment))).decryptor()


def _nonce(segment: int) -> bytes:
    return segment.to_bytes(_NONCE_BYTES, "big")


@functools.cache
def fastest_keystream() -> Keystream:
    """Whichever of the two is faster on this processor, measured once in a millisecond; their bits are the same."""
    drawn = bytearray(PIECE_BYTES + BLOCK_BYTES)

    def seconds(keystream: Keystream) -> float:
        stream = keystream(bytes(SEED_BYTES), 0)
        began = time.perf_counter()
        stream.update_into(ZEROS, drawn)
        return time.perf_counter() - began

    plain, inside_gcm = (min(seconds(one) for _ in range(9)) for one in (counter_mode, counter_mode_of_gcm))
    return counter_mode if plain <= inside_gcm else counter_mode_of_gcm


def add_streams(arrays: Sequence[Integers], streams: Iterable[tuple[bytes, bool]]) -> None:
    """Adds the keystream of each seed to arrays in place, or subtracts it, each array modulo its own type's range.

    A seed is used for one stream only, so each counts its segments from zero. As many threads as torch may use here
    share the segments.

    Args:
        arrays: Contiguous arrays of little-endian unsigned integers, masked one after the other.
        streams: Seeds of 32 bytes, each with whether its mask is taken away instead.
    """
    seeds = list(streams)
    segments = list(enumerate(_segments(arrays)))
    threads = min(len(segments), torch.get_num_threads())
    with ThreadPoolExecutor(threads) as pool:
        helpers = [pool.submit(_add, segments[index::threads], seeds) for index in range(1, threads)]
        _add(segments[::threads], seeds)
        for helper in helpers:
            helper.result()


def _segments(arrays: Sequence[Integers]) -> list[list[Integers]]:
    """Views of at most a piece, in order, by the segment of the keystream that masks them."""
    segments: list[list[Integers]] = [[]]
    room = SEGMENT_BYTES
    for array in arrays:
        start = 0
        while start < array.size:
            part = array[start : start + min(room, PIECE_BYTES) // array.itemsize]
            segments[-1].append(part)
            start, room = start + part.size, room - part.nbytes
            if room < array.itemsize:
                segments.append([])
                room = SEGMENT_BYTES
    return segments


def _add(segments: Sequence[tuple[int, Sequence[Integers]]], seeds: Sequence[tuple[bytes, bool]]) -> None:
    """One thread's segments: each piece is fetched once for all keystreams."""
    keystream = fastest_keystream()
    drawn = bytearray(PIECE_BYTES + BLOCK_BYTES)
    for number, parts in segments:
        changes = [(keystream(seed, number), np.subtract if subtract else np.add) for seed, subtract in seeds]
        for part in parts:
            nothing, mask = ZEROS[: part.nbytes], np.frombuffer(drawn, part.dtype, part.size)
            for stream, change in changes:
                stream.update_into(nothing, drawn)
                change(part, mask, out=part)


def public_half(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: str) -> bytes:
    """256 bits that only the two owners of an X25519 pair can derive, for one purpose (HKDF with SHA-256).

    Raises:
        ProtectionError: The public key is not valid (a point of small order).
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtectionError("a peer's public key is not valid: the sum is not computed") from error
    return derived(secret, purpose)


def derived(secret: bytes, purpose: str) -> bytes:
    """A 256-bit key for one purpose."""
    return HKDF(algorithm=SHA256(), length=SEED_BYTES, salt=None, info=f"silotune-v1:{purpose}".encode()).derive(secret)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypts and authenticates one message (AES-256-GCM); a key is used for one message only."""
    return AESGCM(key).encrypt(_ZERO_NONCE, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """The inverse of ``seal``; None where it was sealed under another key or context, or changed."""
    try:
        return AESGCM(key).decrypt(_ZERO_NONCE, sealed, context)
    except InvalidTag:
        return None


def commitment(seed: bytes) -> str:
    """A site's commitment to its mask seed (SHA-256), made before anybody may know it, so that wrong shares show."""
    return hashlib.sha256(b"silotune-v1:mask-seed:" + seed).hexdigest()
