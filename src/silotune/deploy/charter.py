"""The charter: a federation's agreement as a file, which each institution signs and runs name by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from silotune.config import parsed_toml, validated
from silotune.deploy.kits import CHARTER_SIGNATURES, Name
from silotune.errors import ConfigError, KitError, SignatureError
from silotune.record.files import read_document, write_json
from silotune.record.plain_json import canonical
from silotune.record.signatures import SigningKey, verify
from silotune.settings.base import Section


class Charter(Section):
    """``charter.toml``: who owns the result, who may use it, for what, until when."""

    title: str
    federation: Name
    parties: tuple[Name, ...] = Field(min_length=1, description="who must sign")
    owner: str = Field(description="who owns the resulting adapter")
    users: tuple[str, ...] = Field(description="who may use it")
    purpose: str = Field(description="for what")
    until: date = Field(description="last day on which it may be used and runs may name this charter")
    terms: str = Field("", description="anything else, in words")


class CharterSignature(Section):
    """One institution's signature of the exact bytes of the charter."""

    party: str
    key: str
    time: str
    signature: str


@dataclass(frozen=True)
class SignedCharter:
    """A charter, its hash, who signed with which key, and who has not yet."""

    charter: Charter
    sha256: str
    signed: Mapping[str, str]
    missing: tuple[str, ...]


def read_charter(path: Path) -> tuple[Charter, str]:
    """The charter in a file, and the SHA-256 of the file, as ``sha256sum`` prints it.

    Raises:
        ConfigError: The file is missing or broken, or holds faults (all of them are listed).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    try:
        document = parsed_toml(content.decode())
    except ValueError as error:  # also text that is not UTF-8
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return validated(Charter, document, source=str(path), is_named=True), hashlib.sha256(content).hexdigest()


def sign_charter(path: Path, key: SigningKey, *, party: str) -> SignedCharter:
    """Adds a party's signature to ``charter.signatures.json`` beside the charter.

    Raises:
        KitError: The charter does not name this party.
    """
    charter, digest = read_charter(path)
    if party not in charter.parties:
        raise KitError(f"{party!r} is not a party of the charter: name one of {', '.join(charter.parties)}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    signature = key.sign("charter", _message(digest, party, now))
    made = CharterSignature(party=party, key=key.public, time=now, signature=signature)
    kept = [item for item in _signatures(path) if item.party != party]
    rows = [item.model_dump() for item in (*kept, made)]
    write_json(path.with_name(CHARTER_SIGNATURES), rows)
    return verify_charter(path)


def verify_charter(path: Path, *, keys: Mapping[str, Sequence[str]] | None = None) -> SignedCharter:
    """Checks every signature.

    Args:
        path: ``charter.toml``.
        keys: Party -> its own public keys; None accepts any key, so that the caller must compare the keys in the
            result.

    Raises:
        SignatureError: A signature does not fit the charter as it is now, or is by a key that is not the party's.
    """
    charter, digest = read_charter(path)
    signed: dict[str, str] = {}
    for item in _signatures(path):
        if keys is not None and item.key not in keys.get(item.party, ()):
            raise SignatureError(f"the charter is signed for {item.party!r} with a key that is not its own")
        if not verify(item.key, "charter", _message(digest, item.party, item.time), item.signature):
            raise SignatureError(f"{item.party!r} did not sign this charter: it was changed afterwards")
        signed[item.party] = item.key
    return SignedCharter(charter, digest, signed, tuple(name for name in charter.parties if name not in signed))


def _signatures(path: Path) -> list[CharterSignature]:
    place = path.with_name(CHARTER_SIGNATURES)
    if not place.is_file():
        return []
    rows: Any = read_document(place, SignatureError)
    try:
        return [CharterSignature.model_validate(row) for row in rows]
    except (ValidationError, TypeError):
        raise SignatureError(f"{str(place)!r} is not a list of signatures: it was changed") from None


def _message(digest: str, party: str, when: str) -> bytes:
    return canonical({"charter": digest, "party": party, "time": when})
