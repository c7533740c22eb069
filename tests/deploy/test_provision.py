"""Provisioning: kits hold what they must and nothing of another's, and members come and go."""

from __future__ import annotations

import json
import re
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509

from silotune.deploy import kits
from silotune.deploy.kits import (
    CoordinatorKit,
    Kit,
    SiteKit,
    SubmitterKit,
    check_kit,
    coordinator_settings,
    read_kit,
    replace_members,
    unpack,
)
from silotune.deploy.provision import (
    add_site,
    add_submitter,
    make_request,
    provision,
    revoke,
    rotate_coordinator,
    rotate_site,
)
from silotune.errors import ConfigError, KitError, RunFolderError, SignatureError
from silotune.federation.site.policy import Policy, read_policy
from silotune.privacy.encryption import Adder, Packing, decrypt, encrypt
from silotune.record.signatures import read_key

PLAN = """
name = "four-banks"
[coordinator]
host = "fed.example.org"
names = ["127.0.0.1", "localhost"]
[sites.bank-a]
contact = "a@example.org"
[sites.bank-b]
"""
SECRET = "PRIVATE KEY"


def plan_in(folder: Path, text: str = PLAN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "federation.toml").write_text(text)
    return folder / "federation.toml"


def unpacked(archive: Path, folder: Path) -> Kit:
    unpack(archive, folder)
    return read_kit(folder / archive.stem)


@pytest.fixture
def office(tmp_path: Path) -> Path:
    provision(plan_in(tmp_path), tmp_path / "out")
    return tmp_path / "out"


def test_kits_are_whole_and_closed_to_others(office: Path, tmp_path: Path) -> None:
    archives = sorted((office / "kits").iterdir())
    assert [path.name for path in archives] == [
        f"four-banks-{name}.tar" for name in ("bank-a", "bank-b", "coordinator", "researcher")
    ]
    for archive in archives:
        assert archive.stat().st_mode & 0o777 == 0o600
        kit = unpacked(archive, tmp_path / "kits")
        assert check_kit(kit.folder) == []
        for key in kit.folder.glob("*.key"):
            assert key.stat().st_mode & 0o777 == 0o600
        assert set(kit.members().active()) == {"bank-a", "bank-b"}
        kinds = {"coordinator": CoordinatorKit, "researcher": SubmitterKit}
        assert isinstance(kit.settings, kinds.get(archive.stem.removeprefix("four-banks-"), SiteKit))
        words = "submit CONFIG --as ." if isinstance(kit.settings, SubmitterKit) else "start ."
        assert words in kit.path("README.md").read_text()
        for text in (path for path in kit.folder.iterdir() if path.suffix in (".toml", ".md", ".service")):
            assert not re.search(r"{\w*}", text.read_text()), f"{text.name} has a place that nothing filled"
    assert (office / "authority").stat().st_mode & 0o777 == 0o700


def test_the_key_of_encrypted_sums_is_the_sites_alone(tmp_path: Path) -> None:
    """Neither a file of the coordinator's kit nor what it computes with opens what a site encrypts."""
    pytest.importorskip("tenseal")
    provision(plan_in(tmp_path, PLAN.replace("[coordinator]", "he = true\n[coordinator]", 1)), tmp_path / "out")
    found = {path.stem[11:]: unpacked(path, tmp_path / "k") for path in sorted((tmp_path / "out" / "kits").iterdir())}
    coordinator, one, other = found["coordinator"], found["bank-a"], found["bank-b"]
    assert coordinator_settings(coordinator).he
    files = {path.name: path.read_bytes() for path in coordinator.folder.iterdir()}
    secret = one.path(kits.HE_KEY).read_bytes()
    assert secret == other.path(kits.HE_KEY).read_bytes() and one.path(kits.HE_KEY).stat().st_mode & 0o777 == 0o600
    assert kits.HE_KEY not in files and not any(secret[64:] in content for content in files.values())
    packing, total = Packing(1), Adder()
    total.add(total.read(encrypt(np.array([3, 4], np.int64), packing, secret)))
    assert decrypt(total.cells(), 2, packing, secret).tolist() == [3, 4]
    for key in [*files.values(), total._context.serialize()]:
        with pytest.raises(Exception):  # noqa: B017, PT011  # of TenSEAL's kinds, whatever they are called
            decrypt(total.cells(), 2, packing, key)
    add_site(tmp_path / "out", "bank-c")
    added = unpacked(tmp_path / "out" / "kits" / "four-banks-bank-c.tar", tmp_path / "k")
    assert added.path(kits.HE_KEY).read_bytes() == secret


def test_private_keys_are_in_their_own_kit_alone(office: Path, tmp_path: Path) -> None:
    secrets: dict[str, set[str]] = {}
    for archive in (office / "kits").iterdir():
        kit = unpacked(archive, tmp_path / "kits")
        held = {path.read_text() for path in kit.folder.iterdir() if SECRET in path.read_text()}
        secrets[archive.stem] = held
    assert {name[11:]: len(held) for name, held in secrets.items()} == {
        "bank-a": 2, "bank-b": 2, "coordinator": 2, "researcher": 1,
    }  # fmt: skip
    assert len(set.union(*secrets.values())) == 7  # no kit holds a key of another's: the coordinator no submitter's
    outside = [path for path in office.rglob("*") if path.is_file() and path.suffix != ".tar"]
    assert sorted(path.name for path in outside if SECRET in path.read_text()) == ["ca.key", "signing.key"]
    for path in outside:
        assert not any(secret in path.read_text() for held in secrets.values() for secret in held)


def test_a_site_s_policy_is_valid_from_the_start(office: Path, tmp_path: Path) -> None:
    kit = unpacked(office / "kits" / "four-banks-bank-a.tar", tmp_path / "kits")
    submitter = unpacked(office / "kits" / "four-banks-researcher.tar", tmp_path / "kits")
    policy = read_policy(kit.path(kits.POLICY))
    key = read_key(submitter.path(kits.SIGNING_KEY))
    assert policy.submitters == (key.public,) == kit.members().submitter_keys() and not policy.generation
    assert key.public not in kit.members().coordinator
    own = read_key(kit.path(kits.SIGNING_KEY))
    assert kit.members().active()["bank-a"].signing_public == own.public
    settings = kit.settings
    assert isinstance(settings, SiteKit) and settings.coordinator.host == "fed.example.org"
    text = re.sub('"64 hexadecimal digits[^"]*"', f'"{"a" * 64}"', kit.path(kits.POLICY).read_text())
    (tmp_path / "policy.toml").write_text(re.sub(r"(?m)^# (\w+ = |\[)", r"\1", text))
    full = read_policy(tmp_path / "policy.toml")  # every example in it is valid, and every rule has one
    assert all(getattr(full, name) is not None for name in Policy.model_fields)


def test_the_server_s_certificate(office: Path, tmp_path: Path) -> None:
    kit = unpacked(office / "kits" / "four-banks-coordinator.tar", tmp_path / "kits")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=kit.path("ca.crt"))
    server.load_cert_chain(kit.path("server.crt"), kit.path("server.key"))
    for name, is_named in (("fed.example.org", True), ("127.0.0.1", True), ("localhost", True), ("evil.org", False)):
        assert handshake(server, client, name) is is_named
    assert not handshake(server, ssl.create_default_context(), "localhost")
    ends = x509.load_pem_x509_certificate(kit.path("server.crt").read_bytes()).not_valid_after_utc
    assert timedelta(days=364) < ends - datetime.now(UTC) <= timedelta(days=365)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """A TLS handshake in memory; False when the client refuses."""
    down, up = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True))
    done = [False, False]
    while not all(done):
        for place, end in enumerate(ends):
            try:
                end.do_handshake()
                done[place] = True
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_a_site_may_make_its_own_keys(tmp_path: Path) -> None:
    request = make_request("bank-b", tmp_path / "own")
    assert SECRET not in request.read_text()
    made = provision(plan_in(tmp_path), tmp_path / "out", requests=[request])
    kit = unpacked(next(item.path for item in made if item.name == "bank-b"), tmp_path / "kits")
    assert not [path for path in kit.folder.iterdir() if SECRET in path.read_text()]
    own = read_key(tmp_path / "own" / "signing.key")
    assert kit.members().active()["bank-b"].signing_public == own.public
    public = (tmp_path / "own" / "auth.pub").read_text().split()
    assert (
        kit.members().active()["bank-b"].auth_public.split() == public[:2] == kit.path("auth.pub").read_text().split()
    )
    with pytest.raises(KitError, match="is not one that|is not a request"):
        broken = tmp_path / "broken.csr"
        broken.write_bytes(request.read_bytes()[: len(request.read_bytes()) // 2])
        add_site(tmp_path / "out", "bank-c", request=broken)
    with pytest.raises(KitError, match="is a request of 'bank-b', not of 'bank-c'"):
        add_site(tmp_path / "out", "bank-c", request=request)
    with pytest.raises(KitError, match="holds a key that was used before"):
        rotate_site(tmp_path / "out", "bank-b", request=request)


def test_add_revoke_rotate(office: Path, tmp_path: Path) -> None:
    kit = unpacked(office / "kits" / "four-banks-bank-a.tar", tmp_path / "kits")
    old = kit.members()
    added = unpacked(add_site(office, "bank-c").path, tmp_path / "kits")
    assert set(added.members().active()) == {"bank-a", "bank-b", "bank-c"} and added.members().version == 2
    rotated = unpacked(rotate_site(office, "bank-a").path, tmp_path / "again")
    keys = rotated.members().signing_keys()["bank-a"]
    assert keys[0] == old.active()["bank-a"].signing_public and len(keys) == 2  # old entries stay verifiable
    assert rotated.members().active()["bank-a"].contact == "a@example.org"
    assert set(revoke(office, "bank-b").active()) == {"bank-a", "bank-c"}
    coordinator = unpacked(rotate_coordinator(office).path, tmp_path / "again")
    listed = coordinator.members()
    assert (len(listed.coordinator), listed.version, listed.coordinator_now()) == (2, 5, listed.coordinator[1])
    assert replace_members(kit, office / kits.MEMBERS).version == 5 == kit.members().version
    with pytest.raises(KitError, match="has version 2; the kit has 5"):
        replace_members(kit, added.path(kits.MEMBERS))
    for call in (lambda: add_site(office, "bank-a"), lambda: revoke(office, "bank-b")):
        with pytest.raises(KitError, match="is a site already|is not a site of this federation"):
            call()
    with pytest.raises(KitError, match="is not a name"):
        add_site(office, "Bank/../C")


def test_submitters_come_and_go(office: Path, tmp_path: Path) -> None:
    kit = unpacked(office / "kits" / "four-banks-bank-a.tar", tmp_path / "kits")
    first = kit.members().submitter_keys()
    added = unpacked(add_submitter(office, "alice", contact="alice@example.org").path, tmp_path / "kits")
    assert len(added.members().submitter_keys()) == 2 and not list(added.folder.glob("auth.*"))
    renewed = unpacked(add_submitter(office, "alice").path, tmp_path / "again").members()
    assert len(renewed.submitter_keys()) == 2 and len(renewed.submitters) == 3
    assert revoke(office, "alice").submitter_keys() == first
    assert replace_members(kit, office / kits.MEMBERS).submitter_keys() == first
    for call in (lambda: add_site(office, "researcher"), lambda: add_submitter(office, "bank-a")):
        with pytest.raises(KitError, match="another name"):
            call()


def test_only_the_authority_s_list_counts(office: Path, tmp_path: Path) -> None:
    kit = unpacked(office / "kits" / "four-banks-bank-a.tar", tmp_path / "kits")
    listed = json.loads(kit.path(kits.MEMBERS).read_text())
    listed["members"]["members"][0]["status"] = "revoked"
    kit.path(kits.MEMBERS).write_text(json.dumps(listed))
    with pytest.raises(SignatureError, match="not signed by the federation's authority"):
        kit.members()
    kit.path(kits.MEMBERS).write_text("{}")
    with pytest.raises(KitError, match="is not a list of members"):
        kit.members()


def test_check_names_what_is_wrong(office: Path, tmp_path: Path) -> None:
    kit = unpacked(office / "kits" / "four-banks-bank-a.tar", tmp_path / "kits")
    kit.path(kits.POLICY).write_text("tasks = []")  # its owner's to change
    kit.path("ca.crt").write_text("another")
    kit.path("auth.pub").unlink()
    kit.path("signing.key").chmod(0o644)
    assert [fault.split(":")[0] for fault in check_kit(kit.folder)] == [
        "auth.pub is missing", "ca.crt is not what the kit held", "signing.key may be read by others",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("bank-b", "Bank_B"), "is not a name"), (("bank-b", "coordinator"), "cannot name a site"),
        (('host = "fed.example.org"', 'host = "a b"'), "neither a host name nor an IP"),
        (("[sites.bank-b]", "[site.bank-b]"), "did you mean 'sites'"),
        (("name = ", "nam = "), "did you mean 'name'"),
        (("[sites.bank-b]", "[submitters.bank-a]"), "'bank-a' is a site and a submitter"),
    ],
)  # fmt: skip
def test_faults_of_a_plan(tmp_path: Path, change: tuple[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        provision(plan_in(tmp_path, PLAN.replace(*change, 1)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(office: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="is not empty"):
        provision(tmp_path / "federation.toml", office)
    with pytest.raises(KitError, match="is not a folder that 'silotune provision' made"):
        add_site(tmp_path, "bank-c")
    make_request("bank-c", tmp_path / "own")
    with pytest.raises(RunFolderError):
        make_request("bank-c", tmp_path / "own")
    with pytest.raises(KitError, match="unpack a kit"):
        read_kit(tmp_path)
