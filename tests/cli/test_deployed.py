"""The commands of a deployment, where nothing runs yet: kits are real, processes are not started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import kits
from silotune.cli.deployed import _node_words, _trainer_words
from silotune.config import from_mapping
from silotune.deploy.jobs import Jobs
from silotune.deploy.kits import read_kit
from silotune.deploy.places import coordinator_folder
from silotune.deploy.submit import renewed, submit_run
from silotune.record.runs import RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kits.make(tmp_path_factory.mktemp("f"), ["bank-a", "bank-b"])


@pytest.fixture
def jobs(folder: Path) -> Jobs:
    return Jobs(coordinator_folder(read_kit(folder / "coordinator")))


def test_a_run_from_submission_to_its_folder(silotune, folder: Path, jobs: Jobs, tmp_path: Path) -> None:
    kit, submitter = folder / "coordinator", folder / "researcher"
    given = silotune("submit", "quickstart", "--kit", kit, "--as", submitter, "--set", "seed=3", "--json")
    name = json.loads(given.out)["name"]
    assert given.code == 0 and jobs.config(name).seed == 3
    assert jobs.config(name).federation.modes == ("federated",)
    assert (
        "follow it: silotune logs quickstart-2" in silotune("submit", "quickstart", "--kit", kit, "--as", submitter).out
    )
    listed = json.loads(silotune("list", "--kit", kit, "--json").out)
    assert [(job["name"], job["status"]) for job in listed] == [(name, "queued"), ("quickstart-2", "queued")]
    assert silotune("cancel", "quickstart-2", "--kit", kit).out == "quickstart-2: cancelled\n"
    run = RunFolder.create(jobs.run_path(name).parent, name, config={})
    run.append("events", {"event": "note", "time": 1.0, "text": "two sites"})
    run.part("federated").append("metrics", {"round": 2})
    jobs.change(name, status="failed", reason="client 'bank-a' failed", exit_code=6)
    said = silotune("status", name, "--kit", kit)
    assert "run quickstart: failed, round 2 of 24: client 'bank-a' failed" in said.out
    assert json.loads(silotune("status", name, "--kit", kit, "--json").out)["exit_code"] == 6
    shown = silotune("logs", name, "--kit", kit)
    assert shown.code == 6 and "note: two sites" in shown.out and "client 'bank-a' failed" in shown.err
    assert silotune("fetch", name, tmp_path / "out", "--kit", kit).code == 0
    assert (tmp_path / "out" / "events.jsonl").is_file()
    assert silotune("status", "nobody", "--kit", kit).code == 6


def test_a_run_is_signed_on_one_machine_and_handed_in_on_another(
    silotune, folder: Path, jobs: Jobs, tmp_path: Path
) -> None:
    """The coordinator's kit can hand in what was signed, to the byte, and nothing else."""
    kit, submitter, signed = folder / "coordinator", folder / "researcher", tmp_path / "run.json"
    said = silotune("submit", "quickstart", "--as", submitter, "--out", signed, "--set", "record.name=signed")
    assert said.code == 0 and "signed: signed" in said.out
    given = silotune("submit", signed, "--kit", kit, "--json")
    assert json.loads(given.out) == {"name": "signed"} and jobs.read("signed").status == "queued"
    assert "there is a run 'signed' already" in silotune("submit", signed, "--kit", kit).err
    document = json.loads(signed.read_text())
    for section, values in (("training", {"learning_rate": 0.5}), ("data", {"task": "medical-choice"})):
        changed = {**document, "config": {**document["config"], section: {**document["config"][section], **values}}}
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        assert "is not the one that was signed" in silotune("submit", tmp_path / "changed.json", "--kit", kit).err
    forged = json.loads(json.dumps(document))
    forged["job"]["job"]["rounds"] += 1
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    refused = silotune("submit", tmp_path / "forged.json", "--kit", kit)
    assert refused.code == 12 and "was changed after it was signed" in refused.err
    assert "is signed first" in silotune("submit", "quickstart", "--kit", kit).err
    assert "where to?" in silotune("submit", "quickstart", "--as", submitter).err
    wrong = silotune("submit", "quickstart", "--as", kit, "--out", signed)
    assert "is the coordinator's kit: give a submitter's" in wrong.err
    (tmp_path / "none.json").write_text("{}")
    assert "is not a signed run" in silotune("submit", tmp_path / "none.json", "--kit", kit).err
    before = jobs.signed("signed")
    jobs.change("signed", status="failed", reason="the job expired", exit_code=6)
    assert silotune("resume", "signed", "--kit", kit, "--as", submitter).code == 0
    after = jobs.signed("signed")
    assert after.is_signed() and after.job.expires > before.job.expires and after.job.id == before.job.id


@pytest.mark.parametrize("name", ["../../esc", "x y", "-x", ".."])
def test_every_command_that_takes_a_name_says_what_one_is(
    silotune, folder: Path, jobs: Jobs, tmp_path: Path, name: str
) -> None:
    named = tmp_path / "named.toml"
    named.write_text(f'[record]\nname = "{name}"\n')
    before, kit = jobs.names(), folder / "coordinator"
    for command in (("run", named), ("submit", named, "--kit", kit, "--as", folder / "researcher"), ("doctor", named)):
        said = silotune(*command)
        assert said.code == 2 and said.err.count("\n") == 1, said.err
        assert f"record.name = {name!r}: it cannot name a folder" in said.err
    assert jobs.names() == before and not list(folder.rglob("*esc*"))


# --- a run that goes on ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(folder: Path, jobs: Jobs) -> Iterator[str]:
    """A run that failed; it is gone when the test ends."""
    name = submit_run(
        read_kit(folder / "coordinator"),
        from_mapping({"record": {"name": "stopped"}}),
        submitter=read_kit(folder / "researcher"),
    )
    jobs.change(name, status="failed", reason="a test", exit_code=6)
    yield name
    shutil.rmtree(jobs.folder / "jobs" / name)


def below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_signed_anew_by_a_submitter_of_its_federation_alone(
    silotune, folder: Path, jobs: Jobs, stopped: str, tmp_path: Path
) -> None:
    other, before = kits.make(tmp_path / "other", ["bank-a"]), below(jobs.folder)
    refused = silotune("resume", stopped, "--kit", folder / "coordinator", "--as", other / "researcher")
    assert refused.code == 12 and "is not signed by a submitter of this federation" in refused.err
    assert refused.err.count("\n") == 1 and below(jobs.folder) == before
    place = jobs.folder / "jobs" / stopped / "job.json"
    changed = json.loads(place.read_text())
    changed["job"]["rounds"] += 1
    place.write_text(json.dumps(changed))
    refused = silotune("resume", stopped, "--kit", folder / "coordinator", "--as", folder / "researcher")
    assert refused.code == 12 and "was changed after it was signed" in refused.err


@pytest.mark.parametrize("status", ["queued", "running", "finished"])
def test_a_run_that_does_not_go_on_is_left_as_it_is(
    silotune, folder: Path, jobs: Jobs, stopped: str, status: str
) -> None:
    jobs.write(stopped, replace(jobs.read(stopped), status=status))
    before = below(jobs.folder)
    refused = silotune("resume", stopped, "--kit", folder / "coordinator", "--as", folder / "researcher")
    assert refused.code == 6 and f"run 'stopped' is {status}" in refused.err and below(jobs.folder) == before


@pytest.mark.parametrize("name", ["nobody", "../../outside", "..", ".", "a/b"])
@pytest.mark.parametrize("command", ["resume", "sign", "status", "logs", "cancel", "fetch"])
def test_no_name_of_a_run_leads_out_of_the_coordinators_folder(
    silotune, folder: Path, jobs: Jobs, stopped: str, tmp_path: Path, name: str, command: str
) -> None:
    outside = folder / "coordinator" / "outside"
    if not outside.is_dir():
        shutil.copytree(jobs.folder / "jobs" / stopped, outside)
    before, signs = below(folder), ["--as", folder / "researcher"] if command == "sign" else []
    more = [tmp_path / "out"] if command == "fetch" else signs
    said = silotune("resume" if command == "sign" else command, name, *more, "--kit", folder / "coordinator")
    assert said.code == 6 and f"unknown run {name!r}" in said.err and said.err.count("\n") == 1
    assert below(folder) == before


def test_a_run_that_expired_says_how_it_is_signed_anew(silotune, folder: Path, jobs: Jobs, stopped: str) -> None:
    kit, submitter = folder / "coordinator", folder / "researcher"
    jobs.sign(stopped, renewed(jobs.signed(stopped), read_kit(submitter), days=-1))
    before = below(jobs.folder)
    refused = silotune("resume", stopped, "--kit", kit)
    assert refused.code == 2 and f"'silotune resume stopped --kit {kit} --as KIT'" in refused.err
    assert "the job expired at" in refused.err and below(jobs.folder) == before
    assert silotune("resume", stopped, "--kit", kit, "--as", submitter).out.startswith("stopped: queued")


def test_as_alone_is_refused(silotune, folder: Path, tmp_path: Path) -> None:
    refused = silotune("resume", tmp_path, "--as", folder / "researcher")
    assert refused.code == 2 and "--kit" in refused.err


def test_what_does_not_run_says_so(silotune, folder: Path) -> None:
    for kind, kit in (("coordinator", "coordinator"), ("site", "bank-a")):
        assert "stopped" in silotune(kind, "status", folder / kit).out
        assert json.loads(silotune(kind, "status", folder / kit, "--json").out)["process"] is None
        stopped = silotune(kind, "stop", folder / kit)
        assert stopped.code == 6 and "does not run" in stopped.err


def test_what_a_site_s_parts_do_is_said_in_words() -> None:
    trainer = {"status": "state", "process": 7, "works_on": "", "served": 0, "base": "", "base_loads": 0}
    said = [
        _trainer_words(trainer),
        _trainer_words({**trainer, "works_on": "train", "served": 3, "base": "nano", "base_loads": 1}),
        _trainer_words({"status": "starting"}),
        _node_words({"status": "connected", "coordinator": "fed:9092", "node_id": 1}),
        _node_words({"status": "waiting", "reason": "fed:9092 cannot be reached"}),
        _node_words({}),
    ]
    assert said == [
        "ready, process 7, 0 requests served, no base read yet",
        "works (train), process 7, 3 requests served, base 'nano' read once",
        "starting",
        "connected to fed:9092",
        "waiting: fed:9092 cannot be reached",
        "starting",
    ]


def test_check_ends_with_the_code_of_a_kit_that_is_not_in_order(silotune, folder: Path) -> None:
    told = silotune("site", "check", folder / "bank-b")
    assert told.code == 12 and "FAULT TLS" in told.out and "ok    policy" in told.out
    found = json.loads(silotune("site", "check", folder / "bank-b", "--json").out)
    assert {item["check"]: item["ok"] for item in found}["policy"]
    assert silotune("site", "check", folder).code == 12
