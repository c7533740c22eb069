"""The parts of a deployment that need no process of their own: gate, bundle, jobs, thin imports, checks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import kits
from disks import PAGE, disk, fill, make_room
from governed import job
from silotune.config import Config, from_mapping
from silotune.deploy import coordinator as coordinators
from silotune.deploy import site
from silotune.deploy.check import CHECKS, check_site
from silotune.deploy.coordinator import _Keeper
from silotune.deploy.flower.bundle import bundle, bundle_hash
from silotune.deploy.flower.fleet import read_node_key
from silotune.deploy.flower.superlink import MOST_BODY_BYTES, MOST_OBJECT_BYTES, OBJECT, build_app, fleet_only
from silotune.deploy.kits import Kit, coordinator_folder, coordinator_settings, read_kit, site_settings
from silotune.deploy.node import _Node
from silotune.deploy.processes import Child, holder, only_one, stop_holder
from silotune.deploy.queue import ENDED, Jobs
from silotune.deploy.queued_run import ending_of
from silotune.deploy.site import notes_beyond, told_by
from silotune.deploy.submit import fetch_run, follow_run, submit_run
from silotune.errors import ConfigError, FederationError, KitError, RunFolderError, SignatureError
from silotune.experiment.site import Holdings, SiteDesk, setup_of
from silotune.record.audit import Trail
from silotune.record.files import write_json
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key, write_secret
from silotune.settings.sections import FederationSection, FileSettings
from silotune.transports.flower import Ending
from silotune.transports.frames import Frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kits.make(tmp_path_factory.mktemp("federation"), ["bank-a", "bank-b"])


@pytest.fixture
def coordinator(folder: Path) -> Kit:
    return read_kit(folder / "coordinator")


@pytest.fixture
def submitter(folder: Path) -> Kit:
    return read_kit(folder / "researcher")


# --- the gate --------------------------------------------------------------------------------------------------------


def asked(path: str, *, length: str = "3", kind: str = "http") -> int | None:
    """The status that a request gets at the public port; None where it gets none."""
    said: list[dict[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    scope = {"type": kind, "path": path, "headers": [(b"content-length", length.encode())] if length else []}
    asyncio.run(fleet_only(behind)(scope, None, send))
    return said[0]["status"] if said else None


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/health", "/", "/v1/fleet",
     "/v1/fleet/../control/start-run/x"[:9] + "x"],
)  # fmt: skip
def test_only_fleet_is_reached_from_outside(path: str) -> None:
    assert asked(path) == 404


def test_a_node_is_let_through_and_bounded() -> None:
    assert asked("/v1/fleet/pull-messages") == 200
    assert asked(OBJECT, length=str(MOST_OBJECT_BYTES)) == 200
    assert asked(OBJECT, length=str(MOST_OBJECT_BYTES + 1)) == 413
    assert asked("/v1/fleet/push-messages", length=str(MOST_BODY_BYTES + 1)) == 413
    assert asked(OBJECT, length="") == 413  # a body without a length has no bound
    assert asked("/v1/fleet/x", kind="websocket") is None


# --- the bundle ------------------------------------------------------------------------------------------------------


def test_the_bundle_is_the_same_bytes_each_time_and_holds_no_code() -> None:
    assert bundle() == bundle() and bundle_hash() == hashlib.sha256(bundle()).hexdigest()
    with zipfile.ZipFile(BytesIO(bundle())) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
    from flwr.common.config import get_fab_config

    assert get_fab_config(bundle())["project"]["name"] == "silotune"


@pytest.mark.parametrize(
    ("named", "content", "is_ours"),
    [(bundle_hash(), bundle(), True), (bundle_hash(), bundle() + b"x", False), ("0" * 64, bundle(), False)],
)
def test_a_site_refuses_a_run_with_another_bundle(named: str, content: bytes, is_ours: bool) -> None:
    class Fleet:
        def bundle_of(self, run_id: int) -> tuple[str, bytes]:
            return named, content

    assert _Node(Fleet(), lambda *_: Frame({}))._is_ours(1) is is_ours  # type: ignore[arg-type]


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_jobs_are_queued_in_order_and_end_once(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    assert jobs.names() == []
    names = [jobs.submit(Config(), job(run=jobs.free_name("demo"))) for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"] == jobs.names()
    with pytest.raises(FederationError, match="there is a run 'demo' already"):
        jobs.submit(Config(), job(run="demo"))
    assert jobs.signed("demo-2") == job(run="demo-2", expires=jobs.signed("demo-2").job.expires)
    assert (tmp_path / "jobs" / "demo").stat().st_mode & 0o777 == 0o700
    assert jobs.config("demo") == Config()
    jobs.change("demo", status="running", attempts=1)
    assert jobs.progress("demo")["round"] is None
    assert jobs.cancel("demo").status == "cancelled"
    assert jobs.change("demo", status="running").status == "cancelled"  # what has ended does not begin again
    assert jobs.read("demo").ended > 0 and jobs.read("demo").status in ENDED
    for wrong in ("nobody", "../demo", "..", "../jobs/demo"):
        with pytest.raises(FederationError, match="unknown run"):
            jobs.read(wrong)


@pytest.mark.parametrize("name", ["../../esc", "/tmp/esc", "..", "-x", "x y", ".hidden", ""])
def test_a_job_s_name_does_not_leave_the_folder_of_jobs(tmp_path: Path, name: str) -> None:
    jobs = Jobs(tmp_path / "a" / "b")
    odd = job().model_copy(update={"job": job().job.model_copy(update={"run": name})})
    with pytest.raises(RunFolderError, match="cannot name a file of a run"):
        jobs.submit(Config(), odd)
    with pytest.raises(RunFolderError, match="cannot name a file of a run"):
        jobs.free_name(name)
    assert jobs.names() == [] and not list(tmp_path.rglob("*esc*"))


def test_a_number_behind_a_taken_name_is_a_part_of_it(tmp_path: Path) -> None:
    longest, jobs = "x" * 200, Jobs(tmp_path)
    assert jobs.submit(Config(), job(run=jobs.free_name(longest))) == longest
    with pytest.raises(RunFolderError, match="at most 200"):
        jobs.free_name(longest)


@pytest.mark.parametrize("leave", [0, 1])
def test_a_run_that_finds_no_room_is_not_queued_and_takes_no_name(tmp_path: Path, leave: int) -> None:
    with disk(tmp_path / "disk", size=64 * PAGE) as place:
        jobs = Jobs(place)
        fill(place, leave=leave * PAGE)
        with pytest.raises(RunFolderError, match="no space left"):
            jobs.submit(Config(), job(run="demo"))
        assert jobs.names() == []
        make_room(place)
        assert jobs.submit(Config(), job(run="demo")) == "demo"


def test_a_run_that_cannot_be_is_refused_with_every_fault(coordinator: Kit, submitter: Kit) -> None:
    federation = {"modes": ["isolated"], "clients_per_round": 3}
    config = Config.model_validate({"federation": federation, "privacy": {"protection": "secure_sum"}})
    with pytest.raises(ConfigError) as fault:
        submit_run(coordinator, config, submitter=submitter)
    said = fault.value.faults
    assert said[0].startswith("federation.modes: must name 'federated' to be submitted")
    assert said[1] == "federation.clients_per_round = 3, but the federation has 2 sites"
    assert said[2].startswith("privacy.protection opens no sum of fewer than least_clients = 3: a round has 2")
    assert len(said) == 3


LEFT_OUT: dict[str, dict[str, Any]] = {
    "federation.attack": {"federation": {"attack": "scaled"}},
    "federation.clock": {"federation": {"clock": {"latency_seconds": 1}}},
    "federation.split": {"federation": {"split": {"first": 1}}},
    "federation.personalization": {"federation": {"personalization": "ditto"}},
    "federation.ranks: unknown site 'bank-c'": {"federation": {"ranks": {"bank-c": 1}}},
    "privacy.dp.ledger": {"privacy": {"dp": {"type": "local", "epsilon": 8, "ledger": "x"}}},
    "federation.weighting = 'capped' with privacy.dp = 'client'": {
        "privacy": {"dp": {"type": "client", "epsilon": 8}}, "federation": {"weighting": {"type": "capped", "cap": 9}},
    },
    "adapter.start": {"adapter": {"start": "x"}, "training": {"objective": "dpo"}, "data": {"task": "note-preference"}},
    "privacy.protection = 'he'": {"privacy": {"protection": {"type": "he", "least_clients": 2}}},
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_sites_cannot_do_is_refused_in_one_line(coordinator: Kit, submitter: Kit, what: str) -> None:
    with pytest.raises(ConfigError) as fault:
        submit_run(coordinator, Config.model_validate(LEFT_OUT[what]), submitter=submitter)
    (line,) = fault.value.faults
    assert line.startswith(what)


def test_a_run_under_a_charter_that_has_ended_is_refused(coordinator: Kit, submitter: Kit) -> None:
    charter = submitter.path("charter.toml")
    said = {"title": "t", "federation": "test", "owner": "o", "purpose": "p"}
    lines = [*(f'{key} = "{value}"' for key, value in said.items()), 'parties = ["bank-a"]', "users = []"]
    charter.write_text("\n".join([*lines, "until = 2020-12-31"]))
    try:
        with pytest.raises(ConfigError) as fault:
            submit_run(coordinator, Config(), submitter=submitter)
        assert fault.value.faults == ("the charter's last day was 2020-12-31: sites refuse runs that name it",)
    finally:
        charter.unlink()


def test_over_sampling_and_a_deadline_end_rounds_at_sites_too() -> None:
    def clock(**changes: Any) -> FederationSection:
        return FederationSection.model_validate({"clients_per_round": 2, **changes})

    assert ending_of(clock()) == Ending()
    assert ending_of(clock(clock={"over_sampling": 1.5})) == Ending(2, None)
    assert ending_of(clock(clock={"deadline_seconds": 9})) == Ending(None, 9.0)


def test_a_submitted_run_names_its_files_from_wherever_it_is_typed(
    coordinator: Kit, submitter: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_folder)
    for name in ("gold.jsonl", "chosen.csv"):
        (tmp_path / name).touch()
    chosen = {"selection": "chosen.csv", "keep": "best"}
    asked = {"data": {"test": "gold.jsonl"}, "evaluation": chosen, "model": {"name": "base"}}
    jobs = Jobs(coordinator_folder(coordinator))
    config = jobs.config(submit_run(coordinator, Config.model_validate(asked), submitter=submitter))
    assert config.data.test == tmp_path / "gold.jsonl" and config.data.validation is None
    assert config.evaluation.selection == str(tmp_path / "chosen.csv") and config.evaluation.gold == "test"
    assert config.model.name == str(tmp_path / "base")


def test_a_job_that_failed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    name = jobs.submit(Config(), job(run="demo"))
    with pytest.raises(FederationError, match="is queued: only a run that failed or was cancelled"):
        jobs.resume(name)
    jobs.change(name, status="failed", reason="no space left", exit_code=7, attempts=2)
    again = jobs.resume(name)
    assert (again.status, again.reason, again.exit_code, again.ended, again.attempts) == ("queued", "", 0, 0.0, 2)
    jobs.cancel(name)
    assert jobs.resume(name).status == "queued"
    jobs.change(name, status="finished")
    with pytest.raises(FederationError, match="is finished"):
        jobs.resume(name)


def test_a_full_disk_does_not_end_the_coordinator(coordinator: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, Any]] = []
    keeper = _Keeper(coordinator, Path(), Child("it", (), Path()), lambda event, fields: said.append((event, fields)))

    def once() -> None:
        raise RunFolderError("no space left in 'state'")

    monkeypatch.setattr(keeper, "once", once)
    keeper.once_there_is_room()
    keeper.once_there_is_room()
    monkeypatch.setattr(keeper, "once", lambda: None)
    keeper.once_there_is_room()
    assert said == [("coordinator_waits", {"reason": "no space left in 'state'"})]


def test_a_submitted_run_is_followed_and_fetched(coordinator: Kit, submitter: Kit, tmp_path: Path) -> None:
    jobs = Jobs(coordinator_folder(coordinator))
    both = Config.model_validate({"federation": {"modes": ["federated", "isolated"]}})
    name = submit_run(coordinator, both, submitter=submitter)
    asked_for = jobs.config(name)
    assert asked_for.federation.modes == ("federated",)
    assert asked_for.record.audit_key == coordinator.folder / "signing.key"
    with pytest.raises(FederationError, match="has not begun"):
        fetch_run(jobs, name, tmp_path / "out")
    run = RunFolder.create(jobs.run_path(name).parent, name, config={})
    run.append("events", {"event": "note", "time": 1.0, "text": "begun"})
    jobs.change(name, status="finished")
    assert list(follow_run(jobs, name)) == [("note", {"text": "begun"})]
    assert (fetch_run(jobs, name, tmp_path / "out") / "config.json").is_file()
    with pytest.raises(FederationError, match="there already"):
        fetch_run(jobs, name, tmp_path / "out")


# --- kits and processes ----------------------------------------------------------------------------------------------


def test_a_kit_of_the_other_kind_is_refused(folder: Path, coordinator: Kit) -> None:
    with pytest.raises(KitError, match="coordinator's kit"):
        site_settings(coordinator)
    with pytest.raises(KitError, match="kit of site 'bank-a'"):
        coordinator_settings(read_kit(folder / "bank-a"))


def test_only_one_process_holds_a_folder(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    code = f"""
import time
from pathlib import Path
from silotune.deploy.processes import only_one, told_to_stop
with only_one(Path({str(tmp_path)!r}), "it"), told_to_stop() as stopped:
    print("held", flush=True)
    while not stopped:
        time.sleep(0.02)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert holder(tmp_path) == process.pid
        with pytest.raises(FederationError, match=f"as process {process.pid}"), only_one(tmp_path, "it"):
            pass
        stop_holder(tmp_path, "it")
        assert process.wait(10) == 0
    with pytest.raises(FederationError, match="does not run"):
        stop_holder(tmp_path, "it")


def test_a_child_is_started_again_and_stopped_by_its_own_id(tmp_path: Path) -> None:
    child = Child("it", ("this",), tmp_path / "logs" / "it.log")
    assert not child.is_running and child.code is None and child.last_line() == "nothing was printed"
    child.start()
    assert child.process is not None
    child.process.wait(20)
    assert child.code == 0 and "Beautiful is better than ugly" in child.log.read_text(encoding="utf-8")
    assert child.log.stat().st_mode & 0o777 == 0o600
    assert not child.keep_up()  # a pause comes first
    child._next = 0.0
    assert child.keep_up() and child.starts == 2
    child.stop()
    assert not child.is_running


@pytest.mark.end_to_end
def test_the_node_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, silotune.deploy.node, silotune.deploy.site, silotune.deploy.coordinator;"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --- site check ------------------------------------------------------------------------------------------------------


def test_check_tells_each_fault_with_its_remedy(folder: Path, tmp_path: Path) -> None:
    kit = read_kit(folder / "bank-b")
    found = {item.name: item for item in check_site(kit)}
    assert list(found) == list(CHECKS)
    assert {name for name, item in found.items() if not item.ok} == {"TLS", "clock", "authentication"}  # none listens
    assert "is the coordinator started" in found["TLS"].said
    assert len(found["base model"].said) == 64
    (kit.folder / "auth.key").chmod(0o644)
    (kit.folder / "policy.toml").write_text("format = 1\nunknown = 2\n", encoding="utf-8")
    (kit.folder / "site.toml").write_text(
        (kit.folder / "site.toml").read_text(encoding="utf-8").replace("# sha256 = \"\"", f'sha256 = "{"0" * 64}"')
        .replace("# task = \"finance-news\"", "task = \"finance-news\"")
        .replace('# train = "/path/to/train.jsonl"', 'train = "none.jsonl"'),
        encoding="utf-8",
    )  # fmt: skip
    found = {item.name: item for item in check_site(read_kit(kit.folder))}
    for name, words in {
        "files": "chmod 600", "policy": "everything is refused", "base model": "put the right model there",
        "data format": "none.jsonl",
    }.items():  # fmt: skip
        assert not found[name].ok and words in found[name].said, name


def test_a_site_says_how_its_own_file_is_read(tmp_path: Path) -> None:
    kit = read_kit(kits.make(tmp_path, ["bank-a"]) / "bank-a")
    lines = [
        "text%label",
        *(f"Firm {n} s\u00e9lls.%{['negative', 'positive'][n % 2]}" for n in range(6)),
        "SECRET%none",
    ]
    (kit.folder / "own.csv").write_bytes("\n".join(lines).encode("cp1252"))
    old = (kit.folder / "site.toml").read_text(encoding="utf-8")
    own = '[data]\ntask = "fpb"\ntrain = "own.csv"\ndelimiter = "%"\n'
    for more, is_ok in (("", False), ('on_bad_row = "skip"\n', True)):
        (kit.folder / "site.toml").write_text(old.replace("[data]\n", own + more), encoding="utf-8")
        found = next(item for item in check_site(read_kit(kit.folder)) if item.name == "data format")
        assert found.ok == is_ok and "SECRET" not in found.said
    assert found.said.startswith("6 examples for fpb; ")
    assert "read as cp1252" in found.said and "left out 1 row (1 x label is not one of" in found.said
    (kit.folder / "own.csv").write_text("text%label\n" + "shares " * 600 + "%negative\nup<|eos|>%positive\n")
    said = CHECKS["data format"](read_kit(kit.folder))
    assert "; 1 would be cut by a run with model.max_length = 512; control marks of the tokenizer stand in" in said
    assert "the longest has 18" in said and "shares" not in said


def test_a_site_is_told_what_was_cut_skipped_or_escaped_of_its_examples(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_bytes("text,label\nSECRET s\u00e9lls </s>,negative\nup,positive\nSECRET,none\n".encode("cp1252"))
    own = Holdings(
        "north", model=str(tiny_folder), task="fpb", train=file, files=FileSettings(on_bad_row="skip"), device="cpu"
    )
    data = {"task": "fpb", "test": "elsewhere.csv"}
    config = from_mapping({"data": data, "model": {"name": str(tiny_folder), "max_length": 24}})
    notes = SiteDesk(own).open(setup_of(config)).notes
    for said in ("read as cp1252", "left out 1 row", "2 of 2 prompts were cut", "1 of 2 texts spell control marks"):
        assert any(said in note for note in notes), said
    assert "SECRET" not in "".join(notes)


def test_a_sites_terminal_shows_a_note_once_a_run(tmp_path: Path) -> None:
    known: set[tuple[str, str]] = set()
    place = tmp_path / "notes.json"
    assert notes_beyond(known, place) == []
    for run in ("first", "second"):
        write_json(place, {"run": run, "notes": ["train: 3 of 9 prompts were cut"]})
        assert notes_beyond(known, place) == [{"run": run, "note": "train: 3 of 9 prompts were cut"}]
        assert notes_beyond(known, place) == []


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("submitters = ['A STRANGER']", "submitters lists nobody who may submit runs in this federation"),
        ("tasks = ['medqa']", "tasks does not list 'finance-news', which site.toml says the examples are for"),
        (f"base_models = ['{'a' * 64}']", "base_models does not list the base model of site.toml"),
        ("least_participants = 9", "asks for 9 sites, the federation has"),
        ("least_cohort = 9", "asks for 9 sites, the federation has"),
        (f"charter = '{'a' * 64}'", "charter is not the one in this kit"),
        ("smallest_adapter = 9\nlargest_adapter = 5", "everything is refused"),
    ],
)
def test_check_tells_of_a_policy_that_no_run_can_meet(tmp_path: Path, rule: str, said: str) -> None:
    kit = read_kit(kits.make(tmp_path, ["bank-a", "bank-b"]) / "bank-a")
    settings = kit.path("site.toml").read_text().replace("# task = ", "task = ")
    kit.path("site.toml").write_text(settings)
    kit.path("policy.toml").write_text("")
    assert CHECKS["policy"](read_kit(kit.folder)) == "restricts nothing but generation"
    kit.path("policy.toml").write_text(rule.replace("A STRANGER", new_key().public))
    found = {item.name: item for item in check_site(read_kit(kit.folder))}["policy"]
    assert not found.ok and said in found.said


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_nothing_starts_with_a_key_that_others_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    made = kits.make(tmp_path, ["bank-a"], plan="he = true")
    monkeypatch.setattr(Child, "start", lambda child: pytest.fail(f"{child.name} was started"))
    seen = set()
    for kit, starts in ((read_kit(made / "bank-a"), site.start), (read_kit(made / "coordinator"), coordinators.start)):
        for key in sorted(kit.folder.glob("*.key")):
            key.chmod(mode)
            with pytest.raises(SignatureError, match=rf"{key.name}' may be read by others: chmod 600 it"):
                starts(kit)
            key.chmod(0o600)
            seen.add(key.name)
    assert seen == {"auth.key", "signing.key", "he.key", "server.key"}


def test_each_key_is_looked_at_where_it_is_read(folder: Path, coordinator: Kit, tmp_path: Path) -> None:
    auth = folder / "bank-a" / "auth.key"
    assert read_node_key(auth).curve.name == "secp384r1"
    auth.chmod(0o644)
    with pytest.raises(SignatureError, match="auth.key' may be read by others"):
        read_node_key(auth)
    auth.chmod(0o600)
    coordinator.path("server.key").chmod(0o644)
    with pytest.raises(SignatureError, match="server.key' may be read by others"):
        build_app(coordinator, tmp_path)
    coordinator.path("server.key").chmod(0o600)
    for content in (
        b"",
        b"no key",
        auth.with_name("auth.pub").read_bytes(),
        auth.with_name("signing.key").read_bytes(),
    ):
        (tmp_path / "other.key").unlink(missing_ok=True)
        write_secret(tmp_path / "other.key", content)
        with pytest.raises(KitError, match="is not a"):
            read_node_key(tmp_path / "other.key")


def test_a_log_holds_nothing_that_acts_on_a_terminal() -> None:
    code = (
        "import logging; from silotune.deploy.processes import log_to_stdout; log_to_stdout();"
        r"reason = 'no \x1b]0;owned\x07\n2026-01-01 INFO all is well'; log = logging.getLogger('silotune');"
        "log.info('refused: %s', reason)\n"
        "try: raise ValueError(reason)\n"
        "except ValueError: log.exception('failed')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in said and "\x07" not in said
    refused, failed, *trace = said.splitlines()
    assert refused.endswith(r"no \u001b]0;owned\u0007\u000a2026-01-01 INFO all is well")
    assert failed.endswith("failed") and trace[0].startswith("Traceback")


def test_ctrl_c_reaches_the_parent_alone(tmp_path: Path) -> None:
    """It ends its children in order: a coordinator's job is stopped, and has not crashed."""
    child = Child("sleeper", ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), tmp_path / "log")
    child.start()
    try:
        assert child.process is not None and os.getpgid(child.process.pid) != os.getpgid(0)
    finally:
        child.stop()


LOG = "logs/trainer.log in the state folder"


def test_a_site_tells_of_the_rounds_that_it_trained_and_of_those_that_it_did_not(tmp_path: Path) -> None:
    trail, key = Trail(tmp_path / "audit.jsonl", new_key(), actor="north"), {"run": "first"}
    assert told_by(tmp_path / "audit.jsonl", 0) == ([], 0)
    trail.add("request", {"kind": "train", "round": 1, **key})
    sizes = {"bytes_down": 4000, "bytes_up": 3000}
    report = {"loss": 0.51234, "seconds": 2.0, "steps": 3}
    trail.add("reply", {"kind": "train", "round": 1, "body": report, **sizes, **key})
    trail.add("reply", {"kind": "evaluate", "round": 1, "body": {"loss": 0.5}, **key})
    trail.add("reply", {"kind": "train", "round": 2, "body": "0" * 64, **key})
    trail.add("refusal", {"kind": "train", "round": 3, "rule": "hours", "reason": "it is night", **key})
    trail.add("failure", {"kind": "train", "round": 4, "error": "ModelError", **key})
    trail.flush()
    told, seen = told_by(tmp_path / "audit.jsonl", 0)
    assert told == [
        ("round_trained", {"run": "first", "round": 1, "loss": "0.512", "seconds": "2", **sizes}),
        ("request_refused", {"run": "first", "round": 3, "kind": "train", "rule": "hours", "reason": "it is night"}),
        ("request_failed", {"run": "first", "round": 4, "kind": "train", "error": "ModelError", "see": LOG}),
    ]
    assert told_by(tmp_path / "audit.jsonl", seen) == ([], seen)
