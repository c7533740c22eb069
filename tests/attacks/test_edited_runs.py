"""Edits of a finished run of three sites with keys, by whoever can write to its folder: each is detected and named.

The run goes over kits as they are provisioned; some edits are the coordinator's own, signed again with its own key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployed import NAMES, Deployed, document, quickly, without_waiting
from silotune.cli import main as entry
from silotune.config import from_mapping
from silotune.errors import AuditError
from silotune.experiment.audit import Checked, verify_run
from silotune.federation.coordinator.audit import Audit, close, concludes
from silotune.record.audit import FILE, Trail
from silotune.record.chain import read_chain
from silotune.record.plain_json import canonical
from silotune.record.runs import RunFolder
from silotune.record.signatures import SigningKey, new_key, read_key

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Deployed:
    return Deployed(tmp_path_factory.mktemp("deployed") / "f", tiny_folder)


@pytest.fixture(scope="module")
def whole(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """The finished run; nobody may change it."""
    with quickly(), without_waiting():
        yield deployed.run(from_mapping(document(tiny_folder, tmp_path_factory.mktemp("runs")))).path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def checked(deployed: Deployed, run: Path, **allowed: bool) -> Checked:
    return verify_run(run, keys=deployed.kit.members().signing_keys(), **allowed)


def test_the_run_as_it_is(deployed: Deployed, run: Path) -> None:
    found = checked(deployed, run)
    assert set(found.chain.countersigned) == set(NAMES) and found.uncountersigned == () and found.has_adapter
    beside = {"manifest.json", f"federated/{FILE}", "federated/countersigned.json", ".lock"}
    there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert set(found.coverage.covered) == there - beside and found.coverage.uncovered == ()
    assert len(found.coverage.covered) > 12


# --- by whoever can write ---------------------------------------------------------------------------------------------

Edit = Callable[[Path], object]


def in_json(place: str, change: Callable[[Any], object]) -> Edit:
    def edit(run: Path) -> None:
        value = json.loads((run / place).read_text())
        change(value)
        (run / place).write_text(json.dumps(value, indent=2) + "\n")

    return edit


def in_text(place: str, old: str, new: str) -> Edit:
    def edit(run: Path) -> None:
        text = (run / place).read_text()
        assert old in text
        (run / place).write_text(text.replace(old, new))

    return edit


def in_rows(place: str, **changes: Any) -> Edit:
    def edit(run: Path) -> None:
        rows = [json.loads(line) for line in (run / place).read_text().splitlines()]
        (run / place).write_text("".join(json.dumps({**row, **changes}) + "\n" for row in rows))

    return edit


def flipped(place: str) -> Edit:
    def edit(run: Path) -> None:
        content = bytearray((run / place).read_bytes())
        content[-1] ^= 1
        (run / place).write_bytes(content)

    return edit


def added(place: str, content: bytes) -> Edit:
    return lambda run: (run / place).write_bytes((run / place).read_bytes() + content)


def with_manifest(run: Path) -> None:
    """A file is edited, and the manifest to fit it."""
    in_json("summary.json", lambda value: value.update(seed=7))(run)
    content = (run / "summary.json").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    in_json("manifest.json", lambda value: value["files"].update({"summary.json": facts}))(run)


def without_its_end(run: Path) -> None:
    lines = (run / "federated" / FILE).read_bytes().splitlines(keepends=True)
    (run / "federated" / FILE).write_bytes(b"".join(lines[:-1]))


def linked(run: Path) -> None:
    (run / "summary.json").rename(run / "elsewhere")
    (run / "summary.json").symlink_to(run / "elsewhere")


def link_of(place: str) -> Edit:
    def edit(run: Path) -> None:
        (run / place).rename(run / "elsewhere")
        (run / place).symlink_to(run / "elsewhere")

    return edit


def in_signatures(change: Callable[[list[Any]], list[Any]]) -> Edit:
    def edit(run: Path) -> None:
        place = run / "federated/countersigned.json"
        rows = sorted(json.loads(place.read_bytes()), key=lambda row: str(row["client"]))
        place.write_bytes(canonical(change(rows)) + b"\n")

    return edit


def stranger(row: dict[str, Any]) -> dict[str, Any]:
    """A signature of the end in a made-up name, with a key of its own."""
    key, said = new_key(), {**row["statement"], "client": "FDA"}
    return {"client": "FDA", "key": key.public, "statement": said, "signature": key.sign("reply", canonical(said))}


def site_trail(run: Path) -> bytes:
    trail = Trail(run.parent / "of-a-site.jsonl", new_key(), actor="client-0")
    trail.add("request", {"round": 1})
    trail.flush()
    return (run.parent / "of-a-site.jsonl").read_bytes()


EDITS: Mapping[str, tuple[Edit, str]] = {
    "result.json deleted": (lambda run: (run / "federated/result.json").unlink(), "missing: 'federated/result.json'"),
    "lora_alpha 4 to 400": (
        in_json("federated/adapter/adapter_config.json", lambda value: value.update(lora_alpha=400)),
        "changed: 'federated/adapter/adapter_config.json'",
    ),
    "adapter_config.json deleted": (
        lambda run: (run / "federated/adapter/adapter_config.json").unlink(),
        "missing: 'federated/adapter/adapter_config.json'",
    ),
    "config.json claims differential privacy": (
        in_json("config.json", lambda value: value["privacy"].update(dp={"type": "example", "epsilon": 1.0})),
        "changed: 'config.json'",
    ),
    "config.json claims another rate": (
        in_json("config.json", lambda value: value["training"].update(learning_rate=1e-5)),
        "changed: 'config.json'",
    ),
    "privacy.json edited": (
        in_json("privacy.json", lambda value: value.update(statement=["all is protected"])),
        "changed: 'privacy.json'",
    ),
    "summary.json edited": (
        in_json("summary.json", lambda value: value["federated"].update(accuracy=1.0)),
        "changed: 'summary.json'",
    ),
    "metrics.jsonl edited": (in_rows("federated/metrics.jsonl", accuracy=1.0), "changed: 'federated/metrics.jsonl'"),
    "clients.jsonl edited": (in_rows("federated/clients.jsonl", num_examples=1), "changed: 'federated/clients.jsonl'"),
    "events.jsonl deleted": (lambda run: (run / "events.jsonl").unlink(), "missing: 'events.jsonl'"),
    "model card edited": (
        in_text("federated/adapter/README.md", "without differential privacy", "with all privacy"),
        "changed: 'federated/adapter/README.md'",
    ),
    "adapter edited": (
        flipped("federated/adapter/adapter_model.safetensors"),
        "changed: 'federated/adapter/adapter_model.safetensors'",
    ),
    "checkpoint with one flipped bit": (
        flipped("federated/checkpoint-2/server.safetensors"),
        "changed: 'federated/checkpoint-2/server.safetensors'",
    ),
    "the key that is printed changed": (
        lambda run: (run / "federated/audit.pub").write_text(new_key().public + "\n"),
        "changed: 'federated/audit.pub'",
    ),
    "one byte appended to the trail": (
        added(f"federated/{FILE}", b"x"),
        rf"federated/{FILE}: entry \d+ is torn",
    ),
    "one line feed appended to the trail": (
        added(f"federated/{FILE}", b"\n"),
        rf"federated/{FILE}: entry \d+ is not valid",
    ),
    "the trail without its end": (without_its_end, rf"federated/{FILE}: entry \d+ is missing"),
    "the trail deleted": (lambda run: (run / "federated" / FILE).unlink(), f"holds no audit trail .{FILE}"),
    "manifest.json deleted": (lambda run: (run / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest.json edited with a file": (with_manifest, "manifest.json is not the one that the trail was closed over"),
    "countersigned.json deleted": (
        lambda run: (run / "federated/countersigned.json").unlink(),
        "countersignatures missing: client-0, client-1, client-2: ",
    ),
    "one countersignature taken out": (
        lambda run: (run / "federated/countersigned.json").write_bytes(
            canonical(json.loads((run / "federated/countersigned.json").read_bytes())[:2]) + b"\n"
        ),
        "countersignatures missing: client-",
    ),
    "a line feed appended to countersigned.json": (
        added("federated/countersigned.json", b"\n"),
        "countersigned.json is not what was written",
    ),
    "a file in place of which a link stands": (linked, "missing: 'summary.json'"),
    "a link in place of countersigned.json": (link_of("federated/countersigned.json"), "countersigned.json is a link"),
    "a link in place of the trail": (link_of(f"federated/{FILE}"), f"federated/{FILE}: it is a link"),
    "a countersignature twice": (in_signatures(lambda rows: rows * 2), "countersigned.json: 'client-0' stands in it"),
    "a countersignature by nobody of the run": (
        in_signatures(lambda rows: [*rows, stranger(rows[0])]),
        "countersigned.json: 'FDA' is not a site of this run",
    ),
    "a site's trail in place of the run's": (
        lambda run: (run / FILE).write_bytes(site_trail(run)),
        "it is the trail of 'client-0', in a run folder",
    ),
    "two files at once": (
        lambda run: [(run / name).unlink() for name in ("versions.json", "partition.json")],
        "2 files are not what the trail was closed over; missing: 'partition.json', 'versions.json'",
    ),
    "the trail's folder under another name": (
        lambda run: (run / "federated").rename(run / "other"),
        f"holds no audit trail .{FILE}",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_detected_and_named(deployed: Deployed, run: Path, name: str, refused: Callable[..., None]) -> None:
    edit, said = EDITS[name]
    edit(run)
    for keys in (deployed.kit.members().signing_keys(), None):
        with pytest.raises(AuditError, match=said) as caught:
            verify_run(run, keys=keys)
    refused("whoever edits a finished run", name, f"audit verify: {str(caught.value).replace(str(run), 'RUN')}")


@pytest.mark.parametrize("name", list(EDITS)[:14])
def test_the_command_ends_with_11_and_says_it_in_one_line(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, _ = EDITS[name]
    edit(run)
    with pytest.raises(SystemExit) as caught:
        entry.main(["audit", "verify", str(run)])
    said = capsys.readouterr()
    assert caught.value.code == 11 and said.out == ""
    assert len(said.err.splitlines()) == 1 and "not what the trail was closed over" in said.err


def test_what_came_later_is_told_as_not_covered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "skew.png").write_bytes(b"a picture")
    (run / "federated" / "adapter" / "adapter_model.bin").write_bytes(b"another adapter, which peft might prefer")
    (run / "\udcff odd").write_bytes(b"")
    with suppress(SystemExit):
        entry.main(["audit", "verify", str(run)])
    said = capsys.readouterr().out
    assert r"not covered: '\\xff odd', 'federated/adapter/adapter_model.bin', 'skew.png'" in said
    assert "files are to the byte what they were when the trail was closed" in said
    with suppress(SystemExit):
        entry.main(["audit", "verify", str(run), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert "federated/result.json" in told["files_covered"] and "skew.png" in told["files_not_covered"]
    assert told["uncountersigned"] == []


def test_whatever_lies_beside_is_told_as_not_covered(deployed: Deployed, run: Path, tmp_path: Path) -> None:
    """Links, pipes, files with the names of what a run leaves out, and a lock with more in it than its holder."""
    (tmp_path / "evil").mkdir()
    (run / "federated/adapter-final").symlink_to(tmp_path / "evil")
    (run / "summary-corrected.json").symlink_to("/etc/hostname")
    (run / "federated/final.tmp").mkdir()
    for place in ("results.json.tmp", "federated/final.tmp/a.json", "federated/audit.key", "federated/.lock"):
        (run / place).write_text("forged")
    os.mkfifo(run / "pipe")
    told = {
        "federated/.lock", "federated/adapter-final", "federated/audit.key", "federated/final.tmp/a.json", "pipe",
        "results.json.tmp", "summary-corrected.json",
    }  # fmt: skip
    assert set(checked(deployed, run).coverage.uncovered) == told
    (run / ".lock").write_text("forged")
    assert set(checked(deployed, run).coverage.uncovered) == {*told, ".lock"}


def test_no_countersignature_can_be_taken_out_unseen(deployed: Deployed, tiny_folder: Path, tmp_path: Path) -> None:
    """Nor that of a site that no round drew: the end of the trail names all who are to sign it."""
    drawn_one = {"rounds": 1, "clients_per_round": 1}
    with quickly(), without_waiting():
        made = document(tiny_folder, tmp_path, federation=drawn_one, record={"name": "drawn"})
        run = deployed.run(from_mapping(made)).path
    assert set(checked(deployed, run).chain.countersigned) == set(NAMES)
    place = run / "federated/countersigned.json"
    rows = json.loads(place.read_bytes())
    for row in rows:
        place.write_bytes(canonical([other for other in rows if other != row]) + b"\n")
        for keys in (deployed.kit.members().signing_keys(), None):
            with pytest.raises(AuditError, match=f"^countersignatures missing: {row['client']}: "):
                verify_run(run, keys=keys)


# --- by the coordinator, with its own key -----------------------------------------------------------------------------


def coordinator_key(deployed: Deployed) -> SigningKey:
    return read_key(deployed.kit.path("signing.key"))


def forged(deployed: Deployed, run: Path) -> None:
    """Another accuracy everywhere, and the end of the trail signed again over all of it."""
    audit = rewritten_end(deployed, run)
    part = RunFolder(run / "federated")
    result = part.read_json("result")
    result["metrics"]["accuracy"] = 1.0
    part.write_json("result", result)
    adapter = part.load_adapter()[0]
    concluded(audit, result, adapter)
    in_json("summary.json", lambda value: value["federated"].update(accuracy=1.0))(run)
    close(audit, run, round_number=2)


def rewritten_end(deployed: Deployed, run: Path) -> Audit:
    """The trail cut before its result, to go on under the coordinator's key."""
    place = run / "federated" / FILE
    lines = place.read_bytes().splitlines(keepends=True)
    place.write_bytes(b"".join(line for line in lines if json.loads(line)["event"] not in ("result", "closed")))
    return Audit(Trail(place, coordinator_key(deployed), actor="coordinator"), RunFolder(run / "federated"))


def concluded(audit: Audit, result: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    state = audit.run.load_checkpoint()
    assert state is not None
    concludes(audit, weights=state[0].weights, adapter=dict(adapter), result=result)


def test_forged_accuracy_signed_again_lacks_the_sites_signatures(deployed: Deployed, run: Path) -> None:
    forged(deployed, run)
    with pytest.raises(AuditError, match=f"the trail was written anew|is not the one that site '{NAMES[0]}' saw"):
        checked(deployed, run)
    (run / "federated/countersigned.json").unlink()
    with pytest.raises(AuditError, match="^countersignatures missing: client-0, client-1, client-2: each was asked"):
        checked(deployed, run)
    found = checked(deployed, run, is_uncountersigned_allowed=True)  # and then it is said
    assert found.uncountersigned == NAMES


def test_sites_cannot_be_taken_out_of_a_trail_whose_members_are_known(deployed: Deployed, run: Path) -> None:
    """Without signed replies nobody would have to countersign; a kit says who has keys."""
    place = run / "federated" / FILE
    (run / "federated/countersigned.json").unlink()
    entries = read_chain(place)
    place.unlink()
    trail = Trail(place, coordinator_key(deployed), actor="coordinator")
    for item in entries[:-1]:
        bare = {name: item.fields[name] for name in item.fields if name not in ("signature", "key", "statement")}
        trail.add(item.event, bare if item.event == "reply" else item.fields)
    close(Audit(trail, RunFolder(run / "federated")), run, round_number=2)
    with pytest.raises(AuditError, match=r"entry \d+: the reply of 'client-\d' is not signed"):
        checked(deployed, run)


def test_a_run_resumed_from_other_weights(deployed: Deployed, run: Path) -> None:
    audit = rewritten_end(deployed, run)
    audit.trail.add("resumed", {"round": 2, "weights": "0" * 64})
    part = RunFolder(run / "federated")
    concluded(audit, part.read_json("result"), part.load_adapter()[0])
    close(audit, run, round_number=2)
    (run / "federated/countersigned.json").unlink()
    with pytest.raises(AuditError, match=r"entry \d+: the run goes on from another model than it had after round 2"):
        checked(deployed, run, is_uncountersigned_allowed=True)


@pytest.mark.parametrize("name", ["result.json", "adapter"])
def test_a_run_closed_over_what_its_trail_did_not_end_with(deployed: Deployed, run: Path, name: str) -> None:
    """The manifest fits the files, the entry before it does not."""
    lines = (run / "federated" / FILE).read_bytes().splitlines(keepends=True)
    (run / "federated" / FILE).write_bytes(b"".join(lines[:-1]))
    part = RunFolder(run / "federated")
    if name == "adapter":
        tensors, config = part.load_adapter()
        part.save_adapter({key: tensor + 1e-6 for key, tensor in tensors.items()}, config, card="")
    else:
        part.write_json("result", {**part.read_json("result"), "metrics": {"accuracy": 1.0}})
    trail = Trail(run / "federated" / FILE, coordinator_key(deployed), actor="coordinator")
    close(Audit(trail, part), run, round_number=2)
    (run / "federated/countersigned.json").unlink()
    with pytest.raises(AuditError, match=rf"entry \d+: {name}/? is not the one that was signed"):
        checked(deployed, run, is_uncountersigned_allowed=True)


ODD_ENDS: Mapping[str, Mapping[str, Any]] = {
    "a place outside": {"trail": "../../federated/audit.jsonl"},
    "a deep place": {"trail": "/".join("a" * 300)},
    "no place": {"trail": ""},
    "another place": {"trail": "isolated/audit.jsonl"},
}


@pytest.mark.parametrize("name", ODD_ENDS)
def test_a_trail_closed_as_another(deployed: Deployed, run: Path, name: str) -> None:
    place = run / "federated" / FILE
    lines = place.read_bytes().splitlines(keepends=True)
    place.write_bytes(b"".join(lines[:-1]))
    trail = Trail(place, coordinator_key(deployed), actor="coordinator")
    trail.add("closed", {**json.loads(lines[-1])["fields"], **ODD_ENDS[name]})
    trail.flush()
    (run / "federated/countersigned.json").unlink()
    with pytest.raises(AuditError, match=f"federated/{FILE}: "):
        checked(deployed, run, is_uncountersigned_allowed=True)


ODD_MANIFESTS = (
    "[]",
    "{}",
    '{"files": []}',
    '{"files": {"config.json": 3}}',
    '{"files": {"config.json": {"bytes": "1"}}}',
    "{",
)


@pytest.mark.parametrize("content", ODD_MANIFESTS)
def test_a_signed_manifest_that_is_none(deployed: Deployed, run: Path, content: str) -> None:
    place = run / "federated" / FILE
    lines = place.read_bytes().splitlines(keepends=True)
    place.write_bytes(b"".join(lines[:-1]))
    (run / "manifest.json").write_text(content)
    trail = Trail(place, coordinator_key(deployed), actor="coordinator")
    digest = hashlib.sha256(content.encode()).hexdigest()
    trail.add("closed", {**json.loads(lines[-1])["fields"], "manifest": digest})
    trail.flush()
    (run / "federated/countersigned.json").unlink()
    with pytest.raises(AuditError, match=r"manifest.json"):
        checked(deployed, run, is_uncountersigned_allowed=True)


# --- one byte, anywhere -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spare(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose files are put right after each try."""
    return Path(shutil.copytree(whole, tmp_path_factory.mktemp("spare") / "run"))


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_byte_of_any_file_can_change(deployed: Deployed, spare: Path, data: st.DataObject) -> None:
    places = sorted(path for path in spare.rglob("*") if path.is_file() and path.name != ".lock")
    place = data.draw(st.sampled_from(places))
    content = place.read_bytes()
    spot, byte = data.draw(st.integers(0, max(0, len(content) - 1))), data.draw(st.integers(0, 255))
    how = data.draw(st.sampled_from(["changed", "inserted", "removed", "appended"]))
    made = {
        "changed": content[:spot] + bytes([byte]) + content[spot + 1 :],
        "inserted": content[:spot] + bytes([byte]) + content[spot:],
        "removed": content[:spot] + content[spot + 1 :],
        "appended": content + bytes([byte]),
    }[how]
    if made == content:
        return
    place.write_bytes(made)
    try:
        with pytest.raises(AuditError, match=place.name.replace(".", r"\.")):
            checked(deployed, spare)
    finally:
        place.write_bytes(content)
