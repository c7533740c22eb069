"""Ed25519 keys and signatures: made, kept in OpenSSH's format with mode 0600, and checked.

A public key stands in files and messages as OpenSSH's one line without a comment, ``ssh-ed25519 AAAA...``.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.errors import SignatureError
from silotune.record.files import explained, temporary_beside

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_CACHED_KEYS = 1024
_PREFIX = b"silotune-v1:"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and its public line; its ``repr`` does not show the secret."""

    private: Ed25519PrivateKey
    public: str

    def sign(self, purpose: str, message: bytes) -> str:
        """The signature of a message as base64.

        Args:
            purpose: What is signed, such as ``"audit"``: a signature for one purpose does not count for another.
            message: The bytes.
        """
        return base64.b64encode(self.private.sign(_framed(purpose, message))).decode()

    def __repr__(self) -> str:
        return f"SigningKey({self.public})"


def new_key() -> SigningKey:
    """A fresh key from the operating system's generator."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return _key(Ed25519PrivateKey.generate())


def read_key(path: Path) -> SigningKey:
    """The private key in an OpenSSH file that nobody but its owner may read.

    Raises:
        SignatureError: It is no Ed25519 key, others may read the file, or it cannot be read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    content = read_secret(path)
    try:
        private = load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise SignatureError(f"{str(path)!r} is not an Ed25519 private key in OpenSSH's format without a passphrase")
    return _key(private)


def private_bytes(key: SigningKey) -> bytes:
    """The private key as an OpenSSH file's content."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def write_secret(path: Path, content: bytes) -> None:
    """Writes a new file that only its owner may read (mode 0600 from its first byte on), whole or not at all.

    Raises:
        RunFolderError: It is there already, or cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_secret(path: Path) -> bytes:
    """What a file holds that nobody but its owner may read.

    Raises:
        SignatureError: Others may read it, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise SignatureError(f"{str(path)!r} may be read by others: chmod 600 it")
            return file.read()
    except OSError as error:
        raise SignatureError(
            f"cannot read the key {str(path)!r}: {error.strerror or error}; put it back where it belongs"
        ) from None


def check_secrets(folder: Path) -> None:
    """Looks at every key in a kit's folder, whatever it is for, before anything is started with them.

    Raises:
        SignatureError: Others may read one, or one cannot be read.
    """
    for path in sorted(folder.glob("*.key")):
        read_secret(path)


def verify(public: str, purpose: str, message: bytes, signature: str) -> bool:
    """True when ``signature`` is that of ``message`` by the owner of ``public`` for this purpose."""
    from cryptography.exceptions import InvalidSignature

    try:
        key = _public(public)
        key.verify(base64.b64decode(signature, validate=True), _framed(purpose, message))
    except (InvalidSignature, ValueError, SignatureError):
        return False
    return True


def normal_public(text: str) -> str:
    """A public key's line without a comment, in the one form that is compared.

    Raises:
        SignatureError: It is no Ed25519 public key in OpenSSH's format.
    """
    words = text.split()
    line = " ".join(words[:2])
    _public(line)
    return line


def raw_public(line: str) -> bytes:
    """The 32 bytes of a public key.

    Raises:
        SignatureError: It is no Ed25519 public key in OpenSSH's format.
    """
    return _public(line).public_bytes_raw()


def _key(private: Ed25519PrivateKey) -> SigningKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return SigningKey(private, line)


@lru_cache(_CACHED_KEYS)
def _public(line: str) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{line[:40]!r} is not an Ed25519 public key: expected 'ssh-ed25519 AAAA...'")
    return key


def _framed(purpose: str, message: bytes) -> bytes:
    return _PREFIX + purpose.encode() + b"\x00" + message
