"""``silotune provision``, ``charter`` and ``audit`` on real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from governed import NAMES, Federation
from silotune.deploy.kits import unpack
from silotune.federation.coordinator.audit import countersign
from silotune.record.audit import Trail
from silotune.record.chain import read_chain
from silotune.record.files import write_json
from silotune.record.signatures import new_key

PLAN = 'name = "duo"\n[coordinator]\nhost = "127.0.0.1"\n[sites.bank-a]\n[sites.bank-b]\n'
CHARTER = (
    'title = "Duo"\nfederation = "duo"\nparties = ["bank-a"]\nowner = "both"\nusers = ["both"]\npurpose = "news"\n'
    "until = 2027-12-31\n"
)


@pytest.fixture
def office(silotune, tmp_path: Path) -> Path:
    (tmp_path / "federation.toml").write_text(PLAN)
    outcome = silotune("provision", tmp_path / "federation.toml", "--out", tmp_path / "out")
    assert outcome.code == 0 and outcome.out.count("sha256 ") == 4
    for archive in (tmp_path / "out" / "kits").iterdir():
        unpack(archive, tmp_path / "kits")
    return tmp_path / "out"


def test_provision_add_revoke_rotate_request_members(silotune, office: Path, tmp_path: Path) -> None:
    made = json.loads(silotune("provision", "request", "bank-c", "--out", tmp_path / "own", "--json").out)
    added = silotune("provision", "add", "bank-c", "--out", office, "--csr", made["request"], "--json")
    assert json.loads(added.out)["members"] == str(office / "members.json")
    assert silotune("provision", "rotate", "bank-a", "--out", office).code == 0
    assert silotune("provision", "rotate", "coordinator", "--out", office).code == 0
    revoked = silotune("provision", "revoke", "bank-b", "--out", office)
    assert revoked.code == 0 and "silotune provision members KIT members.json" in revoked.out
    kit = tmp_path / "kits" / "duo-coordinator"
    assert "version 1" in silotune("provision", "members", kit).out
    shown = silotune("provision", "members", kit, office / "members.json").out
    assert "version 5" in shown and "bank-b" in shown and "revoked" in shown and "rotated" in shown
    assert json.loads(silotune("provision", "members", kit, "--json").out)["version"] == 5
    wrong = silotune("provision", "rotate", "researcher", "--out", office)
    assert wrong.code == 12 and "'silotune provision submitter researcher' gives it a new key" in wrong.err
    again = silotune("provision", tmp_path / "federation.toml", "--out", office)
    assert again.code == 12 and "is not empty" in again.err


def test_charter(silotune, office: Path, tmp_path: Path) -> None:
    (tmp_path / "charter.toml").write_text(CHARTER)
    site, coordinator = (tmp_path / "kits" / f"duo-{name}" for name in ("bank-a", "coordinator"))
    missing = silotune("charter", "verify", tmp_path / "charter.toml")
    assert missing.code == 12 and "not signed yet by bank-a" in missing.err
    assert silotune("charter", "sign", tmp_path / "charter.toml", "--kit", coordinator).code == 2
    signed = silotune("charter", "sign", tmp_path / "charter.toml", "--kit", site, "--json")
    assert json.loads(signed.out)["missing"] == []
    verified = silotune("charter", "verify", tmp_path / "charter.toml", "--kit", site)
    assert verified.code == 0 and "valid until 2027-12-31" in verified.out and "ssh-ed25519" in verified.out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of functions, with the trails of its sites beside it."""
    folder = tmp_path_factory.mktemp("governed")
    sites = Federation(folder)
    sites.finish(sites.run())
    assert countersign(sites.plan(), sites, 2) == NAMES
    write_json(folder / "keys.json", {"coordinator": sites.coordinator.public})
    return folder


def test_audit_verify(silotune, run: Path) -> None:
    outcome = silotune("audit", "verify", run / "run", "--site", run / "bank-a", "--site", run / "bank-b")
    assert outcome.code == 0 and outcome.out.startswith("15 entries in order, closed; head ")
    assert "the trail of bank-b agrees: 3 heads" in outcome.out and "countersigned by bank-a: 15 entries" in outcome.out
    assert "9 files are to the byte what they were when the trail was closed" in outcome.out
    assert "adapter and result are those that were signed" in outcome.out
    key = json.loads((run / "keys.json").read_text())["coordinator"]
    found = json.loads(silotune("audit", "verify", run / "run", "--key", f"coordinator={key}", "--json").out)
    assert found["closed"] and found["entries"] == 15 and found["keys"]["coordinator"] == [key]
    wrong = silotune("audit", "verify", run / "run", "--key", f"bank-a={key}")
    assert wrong.code == 11 and "entry 0 is signed with none of the keys known for 'coordinator'" in wrong.err
    assert silotune("audit", "verify", run / "run", "--key", "x").code == 2
    assert silotune("audit", "verify", run).code == 11


def test_audit_verify_of_a_site_s_own_trail(silotune, run: Path, tmp_path: Path) -> None:
    """It holds all runs of the site, so it never ends; in the place of a run's it is refused."""
    site = silotune("audit", "verify", run / "bank-a")
    assert site.code == 0 and site.out.startswith(
        "6 entries in order, the trail of site bank-a, which is never closed;"
    )
    assert "a site's own trail, so the verdict is about the trail alone" in site.out and "adapter" not in site.out
    assert (
        "Verified: 6 entries in order, never closed"
        in silotune("audit", "export", run / "bank-a", tmp_path / "x.json").out
    )
    copy = shutil.copytree(run / "run", tmp_path / "copy")
    shutil.copy(run / "bank-a" / "audit.jsonl", copy)
    for more in ((), ("--unfinished",)):
        refused = silotune("audit", "verify", copy, *more)
        assert refused.code == 11 and "it is the trail of 'bank-a', in a run folder" in refused.err


def test_audit_verify_prints_the_keys_that_signed(silotune, run: Path) -> None:
    key, stranger = json.loads((run / "keys.json").read_text())["coordinator"], new_key().public
    given = ("--key", f"coordinator={key}", "--key", f"coordinator={stranger}", "--key", f"bank-z={stranger}")
    said = silotune("audit", "verify", run / "run", *given).out
    assert f"signed by coordinator: {key}\n" in said and stranger not in said and "bank-z" not in said


def lines_of(run: Path, count: int, actor: str = "bank-a") -> bytes:
    return b"".join((run / actor / "audit.jsonl").read_bytes().splitlines(keepends=True)[:count])


def test_audit_verify_takes_no_trail_of_a_site_that_says_less(silotune, run: Path, tmp_path: Path) -> None:
    """Than the site has signed: one that is empty, another's, cut off before its last reply, or before the end."""
    faults = {
        0: "a site's trail without any entry says nothing of this run",
        3: "the trail of 'bank-a' lacks the head of 15 entries, which 'bank-a' has signed: it was cut off",
        1: "the trail of 'bank-a' lacks the head of 9 entries, which 'bank-a' has signed: it was cut off",
    }
    for count, said in faults.items():
        (tmp_path / "audit.jsonl").write_bytes(lines_of(run, count))
        outcome = silotune("audit", "verify", run / "run", "--site", tmp_path)
        assert outcome.code == 11 and said in outcome.err and len(outcome.err.splitlines()) == 1, (count, outcome)
    itself = silotune("audit", "verify", run / "run", "--site", run / "run")
    assert itself.code == 11 and "the trail of 'coordinator', which is not a site of this run" in itself.err


def test_audit_verify_takes_no_trail_of_a_site_under_another_key(silotune, run: Path, tmp_path: Path) -> None:
    """Nor needs it a kit for that: the replies in the run say with which key the site signs."""
    trail = Trail(tmp_path / "audit.jsonl", new_key(), actor="bank-a")
    for entry in read_chain(run / "bank-a" / "audit.jsonl"):
        trail.add(entry.event, entry.fields)
    trail.flush()
    outcome = silotune("audit", "verify", run / "run", "--site", tmp_path)
    assert outcome.code == 11 and "signed with another key than the replies of 'bank-a'" in outcome.err


def test_audit_export_of_a_trail_that_does_not_verify(silotune, run: Path, tmp_path: Path) -> None:
    """The file is there and says so; the command says so, too."""
    copy = shutil.copytree(run / "run", tmp_path / "copy")
    (copy / "result.json").write_text("{}")
    outcome = silotune("audit", "export", copy, tmp_path / "trail.json")
    assert outcome.code == 11 and "trail.json was written; its trail DOES NOT VERIFY: " in outcome.err
    assert json.loads((tmp_path / "trail.json").read_text())["verdict"].startswith("DOES NOT VERIFY: ")


DEEP = "[" * 100_000


def test_what_nests_too_deep_is_named_with_the_code_of_its_kind(silotune, office: Path, tmp_path: Path) -> None:
    kit, deep = tmp_path / "kits" / "duo-bank-a", tmp_path / "deep.json"
    deep.write_text(DEEP)
    charter = tmp_path / "charter.toml"
    charter.write_text(CHARTER)
    (tmp_path / "charter.signatures.json").write_text(DEEP)
    for code, name, command in (
        (12, "deep.json", ("provision", "members", kit, deep)),
        (12, "charter.signatures.json", ("charter", "verify", charter)),
        (12, "charter.signatures.json", ("charter", "sign", charter, "--kit", kit)),
    ):
        said = silotune(*command)
        assert said.code == code and name in said.err and said.err.count("\n") == 1, said.err
    charter.write_text(f"a = {DEEP}")
    (kit / "members.json").write_text(DEEP)
    for code, name, command in (
        (2, "charter.toml", ("charter", "verify", charter)),
        (2, "charter.toml", ("run", charter)),
        (12, "members.json", ("provision", "members", kit)),
    ):
        said = silotune(*command)
        assert said.code == code and name in said.err and said.err.count("\n") == 1, said.err


def test_audit_verify_asks_for_the_sites_signatures(silotune, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run / "run", tmp_path / "copy")
    (copy / "countersigned.json").unlink()
    (copy / "skew.png").write_bytes(b"")
    outcome = silotune("audit", "verify", copy)
    assert outcome.code == 11 and "countersignatures missing: bank-a, bank-b: " in outcome.err
    assert len(outcome.err.splitlines()) == 1 and "--uncountersigned" in outcome.err
    accepted = silotune("audit", "verify", copy, "--uncountersigned")
    assert accepted.code == 0 and "NOT countersigned by bank-a" in accepted.out
    assert "not covered: 'skew.png'" in accepted.out
    told = json.loads(silotune("audit", "verify", copy, "--uncountersigned", "--json").out)
    assert told["uncountersigned"] == ["bank-a", "bank-b"] and told["files_not_covered"] == ["skew.png"]
    assert len(told["files_covered"]) == 9
    exported = silotune("audit", "export", copy, tmp_path / "trail.json").out
    assert "NOT countersigned by bank-a, bank-b; 9 files of the run are covered, not covered: 'skew.png'" in exported


def test_audit_verify_takes_the_keys_of_a_kit(silotune, run: Path, office: Path, tmp_path: Path) -> None:
    outcome = silotune("audit", "verify", run / "run", "--kit", tmp_path / "kits" / "duo-bank-a")
    assert outcome.code == 11 and "known for 'coordinator'" in outcome.err


def test_audit_show(silotune, run: Path) -> None:
    lines = silotune("audit", "show", run / "run").out.splitlines()
    assert len(lines) == 15 and "aggregation" in lines[5] and "round 1" in lines[5]
    rows = json.loads(silotune("audit", "show", run / "run", "--last", 2, "--json").out)["entries"]
    assert [row["event"] for row in rows] == ["result", "closed"]


def test_audit_export(silotune, run: Path, tmp_path: Path) -> None:
    for ending in ("json", "csv", "html", "pdf"):
        outcome = silotune("audit", "export", run / "run", tmp_path / f"trail.{ending}")
        assert outcome.code == 0 and "Verified: 15 entries in order, closed" in outcome.out
    assert len(json.loads((tmp_path / "trail.json").read_text())["entries"]) == 15
    assert (tmp_path / "trail.csv").read_text().count("\n") == 16
    page = (tmp_path / "trail.html").read_text()
    assert page.count("<tr>") == 16 and "Verified: 15 entries" in page and "http" not in page
    assert (tmp_path / "trail.pdf").read_bytes().startswith(b"%PDF")
    assert silotune("audit", "export", run / "run", tmp_path / "trail.docx").code == 2
