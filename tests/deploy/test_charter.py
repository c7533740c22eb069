from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from silotune.deploy.charter import sign_charter, verify_charter
from silotune.errors import ConfigError, KitError, SignatureError
from silotune.record.signatures import new_key

TEXT = """
title = "Four banks, one adapter"
federation = "four-banks"
parties = ["bank-a", "bank-b"]
owner = "the parties together"
users = ["the parties"]
purpose = "classify financial news"
until = 2027-12-31
"""
A, B = new_key(), new_key()
KEYS = {"bank-a": (A.public,), "bank-b": (B.public,)}


@pytest.fixture
def charter(tmp_path: Path) -> Path:
    (tmp_path / "charter.toml").write_text(TEXT)
    return tmp_path / "charter.toml"


def test_each_party_signs_and_all_can_verify(charter: Path) -> None:
    assert verify_charter(charter, keys=KEYS).missing == ("bank-a", "bank-b")
    assert sign_charter(charter, A, party="bank-a").missing == ("bank-b",)
    made = sign_charter(charter, B, party="bank-b")
    assert made == verify_charter(charter, keys=KEYS)
    assert made.missing == () and made.signed == {"bank-a": A.public, "bank-b": B.public}
    assert made.sha256 == hashlib.sha256(charter.read_bytes()).hexdigest()
    assert sign_charter(charter, A, party="bank-a").missing == ()  # again is no fault


def test_a_charter_that_was_changed_is_not_signed(charter: Path) -> None:
    sign_charter(charter, A, party="bank-a")
    charter.write_text(TEXT.replace("2027", "2097"))
    with pytest.raises(SignatureError, match="'bank-a' did not sign this charter: it was changed afterwards"):
        verify_charter(charter)


def test_a_key_that_is_not_the_party_s(charter: Path) -> None:
    sign_charter(charter, new_key(), party="bank-a")
    assert verify_charter(charter).missing == ("bank-b",)
    with pytest.raises(SignatureError, match="with a key that is not its own"):
        verify_charter(charter, keys=KEYS)
    charter.with_name("charter.signatures.json").write_text('[{"party": "bank-a"}]')
    with pytest.raises(SignatureError, match="is not a list of signatures"):
        verify_charter(charter)


def test_faults_of_a_charter(charter: Path) -> None:
    with pytest.raises(KitError, match="'bank-z' is not a party of the charter: name one of bank-a, bank-b"):
        sign_charter(charter, A, party="bank-z")
    charter.write_text(TEXT.replace("owner", "ownr"))
    with pytest.raises(ConfigError, match="did you mean 'owner'"):
        verify_charter(charter)
    charter.write_text("not toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        verify_charter(charter)
