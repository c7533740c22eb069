from __future__ import annotations

import errno
from pathlib import Path

import pytest

from silotune.errors import RunFolderError, SignatureError
from silotune.record.signatures import new_key, normal_public, private_bytes, read_key, verify, write_secret


def test_a_key_there_and_back(tmp_path: Path) -> None:
    key = new_key()
    write_secret(tmp_path / "keys" / "signing.key", private_bytes(key))
    place = tmp_path / "keys" / "signing.key"
    assert place.stat().st_mode & 0o777 == 0o600
    back = read_key(place)
    assert back.public == key.public == normal_public(key.public + " somebody@somewhere\n")
    assert verify(key.public, "audit", b"text", back.sign("audit", b"text"))
    with pytest.raises(RunFolderError):
        write_secret(place, b"again")


def test_a_secret_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("silotune.record.signatures.os.fsync", full)
        with pytest.raises(RunFolderError, match="no space left"):
            write_secret(tmp_path / "audit.key", b"secret")
    assert list(tmp_path.iterdir()) == []
    write_secret(tmp_path / "audit.key", b"secret")
    assert [place.name for place in tmp_path.iterdir()] == ["audit.key"]


def test_a_signature_is_for_one_key_one_purpose_and_one_text() -> None:
    key = new_key()
    signature = key.sign("audit", b"text")
    assert not verify(new_key().public, "audit", b"text", signature)
    assert not verify(key.public, "reply", b"text", signature)
    assert not verify(key.public, "audit", b"other", signature)
    for broken in ("", "äö", signature[:-4], signature + "!"):
        assert not verify(key.public, "audit", b"text", broken)
    assert not verify("ssh-ed25519 AAAA", "audit", b"text", signature)


def test_a_secret_is_shown_nowhere() -> None:
    key = new_key()
    assert repr(key) == str(key) == f"SigningKey({key.public})"


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    place = tmp_path / "signing.key"
    write_secret(place, b"-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
    with pytest.raises(SignatureError, match="not an Ed25519 private key"):
        read_key(place)
    place.chmod(0o640)
    with pytest.raises(SignatureError, match="may be read by others: chmod 600"):
        read_key(place)
    for line in ("", "ssh-rsa AAAA", "ssh-ed25519", "ecdsa-sha2-nistp384 AAAA"):
        with pytest.raises(SignatureError, match="not an Ed25519 public key"):
            normal_public(line)
