"""The dossier of a run: values with their sources, nothing invented, hostile names harmless, every change found."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

from finished_run import finished_run
from silotune.errors import AuditError, ConfigError, RunFolderError
from silotune.record.envelope import ENVELOPE, verify_folder
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key, raw_public
from silotune.report.dossier import KIND, ML_BOM, SBOM, write_dossier
from silotune.report.dossier_facts import UNKNOWN, Sources, facts_of

KEY = new_key()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "runs").path


def written(run: Path, out: Path) -> Path:
    write_dossier(run, out, KEY)
    return out


def test_a_value_stands_beside_its_source_and_the_hash_of_that_file(run: Path, tmp_path: Path) -> None:
    page = (written(run, tmp_path / "out") / "model-card.html").read_text(encoding="utf-8")
    digest = hashlib.sha256((run / "summary.json").read_bytes()).hexdigest()
    assert "<td>0.8</td><td><code>summary.json</code></td><td><code>" + digest in page
    assert "no legal advice" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_what_no_file_says_is_not_known_and_the_share_of_compute_is_never_invented(run: Path) -> None:
    facts = facts_of(Sources(run))
    for name in ("epsilon", "audit", "charter", "policies", "leakage", "flops", "base_flops", "share", "tokens"):
        assert (facts[name].value, facts[name].source, facts[name].sha256) == (UNKNOWN, "", ""), name


def test_operations_of_fine_tuning_are_six_a_weight_and_token(tmp_path: Path) -> None:
    changed = {"federated": {"accuracy": 0.8, "cost": {"tokens": 1000}}}
    folder = finished_run(tmp_path, **changed)
    folder.append("events", {"event": "run_started", "num_parameters": 2_000_000})
    fact = facts_of(Sources(folder.path))["flops"]
    assert (fact.value, fact.source) == ("1.2e+10", "summary.json and events.jsonl")
    assert facts_of(Sources(folder.path), 4.8e10)["share"].value == "0.25"
    with pytest.raises(ConfigError, match="--base-flops nan: give a number above 0"):
        write_dossier(folder.path, tmp_path / "out", KEY, base_flops=float("nan"))


def test_choices_are_read_where_a_configuration_of_today_has_them(tmp_path: Path) -> None:
    config = {"privacy": {"dp": {"type": "client"}, "protection": {"type": "secure-sum"}}}
    run = RunFolder.create(tmp_path, "own", config=config)
    run.write_json("summary", {"metric": "accuracy"})
    facts = facts_of(Sources(run.path))
    assert (facts["dp"].value, facts["protection"].value) == ("client", "secure-sum")


def test_each_institution_has_a_sheet_with_its_counts(run: Path, tmp_path: Path) -> None:
    sheets = sorted(written(run, tmp_path / "out").glob("datasheet-*.html"))
    assert len(sheets) == 4
    assert "examples of neutral</th><td>40</td>" in sheets[0].read_text(encoding="utf-8")


def test_names_of_a_run_are_escaped_and_name_no_file(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>/../../x\x1b[2J"
    run = finished_run(tmp_path / "runs", task=evil, model=[[[[evil]]]], notes=[evil, {"a": 1}], seconds="1" * 9999)
    run.write_json("partition", {"clients": {evil: {"num_examples": "many", "labels": {evil: 3}}}})
    out = written(run.path, tmp_path / "out")
    for page in out.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text and "\x1b" not in text
    assert {path.parent for path in out.rglob("*")} == {out}


@pytest.mark.parametrize("name", ["summary.json", "partition.json", "leakage/leakage.json"])
def test_a_link_or_a_broken_file_in_a_run_is_refused_by_name(run: Path, tmp_path: Path, name: str) -> None:
    place = run / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="is a link"):
        write_dossier(run, tmp_path / "out", KEY)
    place.unlink()
    place.write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=f"{place.name}' is not valid JSON"):
        write_dossier(run, tmp_path / "out", KEY)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    begun = RunFolder.create(tmp_path / "runs", "begun", config={})
    with pytest.raises(RunFolderError, match="is not finished"):
        write_dossier(begun.path, tmp_path / "out", KEY)
    with pytest.raises(RunFolderError, match="is not a run folder"):
        write_dossier(tmp_path, tmp_path / "out", KEY)


def test_a_folder_that_holds_something_or_lies_in_the_run_is_not_written_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "own.txt").touch()
    with pytest.raises(ConfigError, match="is there and not empty"):
        write_dossier(run, tmp_path / "out", KEY)
    with pytest.raises(ConfigError, match="lies in the run folder"):
        write_dossier(run, run / "dossier", KEY)


def test_what_was_signed_verifies_and_each_change_is_named(run: Path, tmp_path: Path) -> None:
    out = written(run, tmp_path / "out")
    key, files = verify_folder(out, kind=KIND, signer=KEY.public)
    assert key == KEY.public and set(files) == {path.name for path in out.iterdir()} - {ENVELOPE}
    with pytest.raises(AuditError, match="not by the key that was given"):
        verify_folder(out, kind=KIND, signer=new_key().public)
    page = out / "dpia.html"
    content = page.read_bytes()
    page.write_bytes(content + b" ")
    with pytest.raises(AuditError, match=r"changed: 'dpia\.html'"):
        verify_folder(out, kind=KIND)
    page.unlink()
    with pytest.raises(AuditError, match=r"missing: 'dpia\.html'"):
        verify_folder(out, kind=KIND)
    page.write_bytes(content)
    (out / "more.html").touch()
    with pytest.raises(AuditError, match=r"not part of it: 'more\.html'"):
        verify_folder(out, kind=KIND)


def test_the_envelope_is_dsse_over_an_in_toto_statement(run: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    document = json.loads((written(run, tmp_path / "out") / ENVELOPE).read_bytes())
    payload, kind = base64.b64decode(document["payload"]), b"application/vnd.in-toto+json"
    signed = b" ".join((b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload))
    signature = base64.b64decode(document["signatures"][0]["sig"])
    Ed25519PublicKey.from_public_bytes(raw_public(KEY.public)).verify(signature, signed)
    assert json.loads(payload)["_type"] == "https://in-toto.io/Statement/v1"


@pytest.mark.parametrize("change", ["payload", "signatures", "nothing"])
def test_an_envelope_that_was_changed_is_refused(run: Path, tmp_path: Path, change: str) -> None:
    out = written(run, tmp_path / "out")
    document = json.loads((out / ENVELOPE).read_bytes())
    document[change] = base64.b64encode(b"{}").decode() if change == "payload" else []
    content = b"[" * 100_000 if change == "nothing" else json.dumps(document).encode()
    (out / ENVELOPE).write_bytes(content)
    with pytest.raises(AuditError, match=r"does not fit|was changed"):
        verify_folder(out, kind=KIND)


def test_the_bills_of_materials_are_valid_by_the_schema_of_cyclonedx(run: Path, tmp_path: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    pytest.importorskip("jsonschema")
    out = written(run, tmp_path / "out")
    for name in (ML_BOM, SBOM):
        found = validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str((out / name).read_text())
        assert found is None, f"{name}: {found}"


def test_the_software_bill_holds_the_versions_that_the_run_recorded(run: Path, tmp_path: Path) -> None:
    recorded = json.loads((run / "versions.json").read_bytes())["packages"]
    listed = json.loads((written(run, tmp_path / "out") / SBOM).read_bytes())["components"]
    of_packages = {row["name"]: row["version"] for row in listed if row["type"] == "library"}
    assert of_packages == {name: version for name, version in recorded.items() if version}
