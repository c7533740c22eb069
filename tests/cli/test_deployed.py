"""The commands of a deployment, where nothing runs yet: kits are real, processes are not started."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import kits
from silotune.cli.deployed import _node_words, _trainer_words
from silotune.config import from_mapping
from silotune.data.files import read_rows
from silotune.deploy.kits import coordinator_folder, read_kit
from silotune.deploy.processes import only_one
from silotune.deploy.queue import Jobs
from silotune.deploy.submit import hand_in, renewed, sign_run, submit_run, write_submission
from silotune.errors import ConfigError, DataError
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
    wrong = silotune("submit", "quickstart", "--as", kit, "--out", tmp_path / "other.json")
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


# --- what is given to submit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is signed and not handed in."""
    place = tmp_path_factory.mktemp("signed") / "run.json"
    write_submission(sign_run(from_mapping({}), read_kit(folder / "researcher"), name="once"), place)
    return place


@pytest.mark.parametrize("option", [("--out", "x.json"), ("--base", "0" * 64), ("--days", "3"), ("--set", "seed=1")])
def test_no_option_is_taken_with_a_signed_run(silotune, folder: Path, signed: Path, jobs: Jobs, option) -> None:
    before = jobs.names()
    said = silotune("submit", signed, "--kit", folder / "coordinator", *option)
    assert said.code == 2 and option[0] in said.err and said.err.count("\n") == 1 and jobs.names() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--kit", "KIT", "--out", "x.json"), "--out would do nothing"),
        (("--kit", "KIT", "--base", "0" * 64), "--base would do nothing"),
        (("--out", "x.json", "--follow"), "--follow would do nothing"),
        (("--out", "x.signed"), "name a new file that ends in .json"),
        (("--out", "x.json", "--base", "zzz"), "'zzz' is not the fingerprint of a base model"),
        (("--out", "x.json", "--set", "federation.rounds=2000000"), "rounds = 2000000"),
    ],
)
def test_what_would_do_nothing_is_refused_when_a_run_is_signed(
    silotune, folder: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before, kit = jobs.names(), folder / "coordinator"
    said = silotune("submit", "quickstart", "--as", folder / "researcher", *(kit if m == "KIT" else m for m in more))
    assert said.code == 2 and words in said.err and said.err.count("\n") == 1, said.err
    assert jobs.names() == before and not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_written_over(silotune, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "kept.json"
    place.write_text("kept")
    said = silotune("submit", "quickstart", "--as", folder / "researcher", "--out", place)
    assert said.code == 2 and "name a new file" in said.err and place.read_text() == "kept"


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no file"),
        ("[]", "is not a signed run, which is a JSON object"),
        ("{", "is not valid JSON"),
        (DEEP, "nests more than"),
        ("[" * 100 + "]" * 100, "nests more than"),
    ],
)
def test_a_file_that_is_no_signed_run_is_said_in_one_line(
    silotune, folder: Path, tmp_path: Path, text: str | None, words: str
) -> None:
    place = tmp_path / "given.json"
    if text is not None:
        place.write_text(text)
    said = silotune("submit", place, "--kit", folder / "coordinator")
    assert said.code == 2 and words in said.err and str(place) in said.err and said.err.count("\n") == 1


def test_a_folder_and_what_is_signed_already_are_named_as_such(silotune, folder: Path, signed: Path) -> None:
    for more in (("--kit", folder / "coordinator"), ("--as", folder / "researcher", "--kit", folder / "coordinator")):
        assert "is a folder: give a TOML file" in silotune("submit", signed.parent, *more).err
    said = silotune("submit", signed, "--as", folder / "researcher", "--kit", folder / "coordinator")
    assert said.code == 2 and f"silotune submit {signed} --kit KIT" in said.err


@pytest.mark.parametrize(
    ("name", "command"), [("config.json", "status"), ("state.json", "status"), ("job.json", "resume")]
)
def test_files_of_a_run_that_nest_too_deep_are_named(
    silotune, folder: Path, jobs: Jobs, stopped: str, name: str, command: str
) -> None:
    (jobs.folder / "jobs" / stopped / name).write_text(DEEP)
    said = silotune(command, stopped, "--kit", folder / "coordinator")
    assert said.code == 7 and name in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"test": "gone.jsonl"}},
        {"data": {"validation": "gone.jsonl"}},
        {"evaluation": {"gold": "gone.jsonl"}},
        {"evaluation": {"forgetting": "gone.txt"}},
        {"adapter": {"start": "gone"}},
    ],
)
def test_a_run_whose_files_are_not_at_the_coordinator_is_not_registered(
    folder: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections
) -> None:
    """Nothing is used up: with the files put there, the same signed run is taken."""
    monkeypatch.chdir(tmp_path)
    kit, name = read_kit(folder / "coordinator"), f"files-{'-'.join(next(iter(sections.values())))}"
    submission = sign_run(from_mapping(sections), read_kit(folder / "researcher"), name=name)
    before = below(jobs.folder)
    with pytest.raises(ConfigError) as caught:
        hand_in(kit, submission)
    (fault,) = caught.value.faults
    (given,) = next(iter(sections.values())).values()
    assert str(tmp_path / given) in fault and below(jobs.folder) == before
    if "adapter" in sections:
        (tmp_path / "gone").mkdir()
        (tmp_path / "gone" / "adapter_config.json").write_text("{}")
    else:
        (tmp_path / given).write_text("")
    assert hand_in(kit, submission) == name
    shutil.rmtree(jobs.folder / "jobs" / name)


def test_a_model_that_is_not_at_the_coordinator_is_told_when_the_run_is_handed_in(folder: Path, jobs: Jobs) -> None:
    config = from_mapping({"model": {"name": "/no/such/folder"}})
    submission = sign_run(config, read_kit(folder / "researcher"), name="base", base="0" * 64)
    with pytest.raises(ConfigError) as caught:
        hand_in(read_kit(folder / "coordinator"), submission)
    assert "model.name" in caught.value.faults[0] and "base" not in jobs.names()


def test_the_reason_of_a_failed_run_does_not_list_a_folder(tmp_path: Path) -> None:
    (tmp_path / "patients.csv").write_text("")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "gone.jsonl")
    assert "patients.csv" in str(caught.value) and "patients.csv" not in caught.value.told
    assert "gone.jsonl" in caught.value.told


def test_a_run_is_not_fetched_into_another(silotune, folder: Path, jobs: Jobs, stopped: str, tmp_path: Path) -> None:
    RunFolder.create(jobs.folder / "runs", stopped, config={})
    first = tmp_path / "first"
    assert silotune("fetch", stopped, first, "--kit", folder / "coordinator").code == 0
    before = below(first)
    for out in (first / "in", first / "federated" / "in"):
        said = silotune("fetch", stopped, out, "--kit", folder / "coordinator")
        assert said.code == 6 and "is inside the run folder" in said.err and below(first) == before
    shutil.rmtree(jobs.folder / "runs" / stopped)


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


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_run_that_nobody_works_on_says_so(silotune, folder: Path, jobs: Jobs, stopped: str, status: str) -> None:
    """A coordinator that was killed leaves its run as it was; whether one is there, its lock says."""
    jobs.write(stopped, replace(jobs.read(stopped), status=status, reason=""))
    kit = folder / "coordinator"
    for command in (("status", stopped, "--kit", kit), ("list", "--kit", kit), ("coordinator", "status", kit)):
        assert f"run stopped: {status}; the coordinator is stopped" in silotune(*command).out
    assert json.loads(silotune("status", stopped, "--kit", kit, "--json").out)["coordinator"] is None
    with only_one(jobs.folder, "the coordinator"):
        assert "the coordinator is stopped" not in silotune("status", stopped, "--kit", kit).out
        assert json.loads(silotune("status", stopped, "--kit", kit, "--json").out)["coordinator"] == os.getpid()


def test_as_alone_is_refused(silotune, folder: Path, tmp_path: Path) -> None:
    refused = silotune("resume", tmp_path, "--as", folder / "researcher")
    assert refused.code == 2 and "--kit" in refused.err


COMMON = ("signing.key", "ca.crt", "authority.pub", "members.json")
STARTED = {"bank-a": (*COMMON, "auth.key", "policy.toml"), "coordinator": (*COMMON, "server.key", "server.crt")}
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "broken": lambda path: path.write_text("= nothing"),
    "open to others": lambda path: path.chmod(0o644),
}


@pytest.mark.parametrize(
    ("kit", "name", "damage"),
    [
        (kit, name, damage)
        for kit, names in STARTED.items()
        for name in names
        for damage in DAMAGES
        if (damage != "open to others" or name.endswith(".key")) and (damage, name) != ("broken", "policy.toml")
    ],
)
def test_nothing_starts_with_a_kit_that_is_not_whole(
    silotune, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: str, name: str, damage: str
) -> None:
    monkeypatch.setattr("silotune.deploy.processes.Child.start", lambda child: pytest.fail("a process was started"))
    copy = Path(shutil.copytree(folder / kit, tmp_path / "kit"))
    DAMAGES[damage](copy / name)
    said = silotune("coordinator" if kit == "coordinator" else "site", "start", copy)
    assert said.code == 12 and name in said.err and not said.out and said.err.count("\n") == 1, said.err


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("site.toml", "host =", "hosst ="),
        ("coordinator.toml", "host =", "hosst ="),
        ("submitter.toml", "submitter =", "submiter ="),
    ],
)
def test_every_fault_of_a_kit_s_file_names_the_file_and_the_key(
    silotune, folder: Path, tmp_path: Path, file: str, before: str, after: str
) -> None:
    owner = {"site.toml": "bank-a", "submitter.toml": "researcher"}.get(file, "coordinator")
    place = Path(shutil.copytree(folder / owner, tmp_path / "kit")) / file
    place.write_text(place.read_text().replace(before, after, 1))
    said = silotune("provision", "members", place.parent)
    lines = said.err.splitlines()
    assert said.code == 2 and len(lines) == 2 and all(line.startswith(f"error: {place}: ") for line in lines), said.err
    assert "this key is missing" in said.err and f"unknown key {after.split()[0]!r}" in said.err
    assert "{" not in said.err


@pytest.mark.parametrize("name", ["signing.key", "authority.pub"])
def test_a_charter_is_not_signed_without_a_key(silotune, folder: Path, tmp_path: Path, name: str) -> None:
    copy, charter = Path(shutil.copytree(folder / "bank-a", tmp_path / "kit")), tmp_path / "charter.toml"
    charter.write_text(
        'title = "t"\nfederation = "test"\nparties = ["bank-a"]\nowner = "o"\nusers = []\npurpose = "p"\n'
        "until = 2999-01-01\n"
    )
    (copy / name).unlink()
    command = ("sign",) if name == "signing.key" else ("verify",)
    said = silotune("charter", *command, charter, "--kit", copy)
    assert said.code == 12 and name in said.err and said.err.count("\n") == 1


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
