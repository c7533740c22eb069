from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disks import disk
from silotune.errors import RunFolderError
from silotune.record import checkpoints
from silotune.record.runs import RunFolder
from silotune.structs import ServerState, SiteState
from silotune.tensors import digest


def state(round_number: int, *, size: int = 8) -> ServerState:
    generator = torch.Generator().manual_seed(round_number)
    weights = {name: torch.randn(size, generator=generator) for name in ("z.lora_A", "a.lora_B")}
    return ServerState(
        round_number=round_number,
        weights=weights,
        memory={"momentum/z": torch.randn(3, generator=generator).to(torch.bfloat16)},
        best_round=round_number,
        best_metric=0.1 + 0.2,
        best_weights=weights,
        seconds=1 / 3,
        bytes_up=2**40,
        bytes_down=7,
        stopped="patience",
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "demo", config={"seed": 1})


def test_create_writes_config_and_versions_and_takes_a_free_name(tmp_path):
    made = [RunFolder.create(tmp_path / "runs", "demo", config={"folder": Path("x")}) for _ in range(3)]
    assert [run.path.name for run in made] == ["demo", "demo-2", "demo-3"]
    assert made[0].read_json("config") == {"folder": "x"}
    assert {"python", "platform", "cores", "packages"} <= made[0].read_json("versions").keys()


def test_a_folder_appears_with_its_configuration_or_not_at_all(tmp_path, monkeypatch):
    def killed(self, name, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.create(tmp_path, "demo", config={})
    assert not (tmp_path / "demo").exists()
    (tmp_path / "demo-2").mkdir()
    assert [RunFolder.create(tmp_path, "demo", config={}).path.name for _ in range(2)] == ["demo", "demo-3"]


def test_open_refuses_what_is_no_run_folder(tmp_path, run):
    assert RunFolder.open(str(run.path)) == run
    with pytest.raises(RunFolderError, match="holds no config.json"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunFolderError, match="is not a folder"):
        RunFolder.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "../x", ".hidden", "-x", "a b", "a\n", "x" * 300])
def test_names_cannot_leave_the_folder(run, tmp_path, name):
    for act in (
        lambda: run.part("isolated", name),
        lambda: run.write_json(name, 1),
        lambda: RunFolder.create(tmp_path, name, config={}),
    ):
        with pytest.raises(RunFolderError, match="cannot name"):
            act()


def test_parts_appear_when_written(run):
    part = run.part("isolated", "client-0")
    assert run.parts() == [] and part.parts() == []
    part.write_json("result", {"round": 1})
    run.save_checkpoint(state(1), {})
    run.save_adapter({}, {}, card="")
    assert run.parts() == ["isolated"]
    assert run.part("isolated").parts() == ["client-0"]
    assert part.has("result") and not part.has("metrics")


def test_rows_and_keep_rounds(run):
    for number in range(4):
        run.append("metrics", {"round": number, "accuracy": float("nan") if number == 2 else 0.5})
    run.append("metrics", {"note": "no round"})
    run.keep_rounds("metrics", 2)
    rows = run.read_rows("metrics")
    assert [row.get("round") for row in rows] == [0, 1, 2, None]
    assert rows[2]["accuracy"] is None
    run.keep_rounds("clients", 2)
    assert not run.has("clients") and run.read_rows("clients") == []


def test_a_checkpoint_comes_back_bit_for_bit_and_in_order(run):
    server = state(3)
    sites = {
        "Bank one": SiteState({"m": torch.tensor([1, 2])}, data={"steps": 5, "loss": float("inf")}),
        "idle": SiteState(),
        "b": SiteState(data={"seen": [1]}),
    }
    run.save_checkpoint(server, sites)
    loaded, loaded_sites = run.load_checkpoint()
    for name in ("weights", "memory", "best_weights"):
        left, right = getattr(server, name), getattr(loaded, name)
        assert list(left) == list(right)
        assert digest(left) == digest(right)
    for name in ("round_number", "best_round", "best_metric", "seconds", "bytes_up", "bytes_down", "stopped"):
        assert getattr(server, name) == getattr(loaded, name)
    assert list(loaded_sites) == ["Bank one", "b"]
    assert loaded_sites["Bank one"].data == {"steps": 5, "loss": float("inf")}
    assert torch.equal(loaded_sites["Bank one"].optimizer["m"], torch.tensor([1, 2]))


@given(data=st.data())
def test_any_tensor_survives(tmp_path_factory, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    whole = torch.randn(4, 4, 4).mul(50).to(dtype)
    tensors = {"view": whole[0], "same": whole, "transposed": whole.mT[1], "shaped": torch.zeros(shape, dtype=dtype)}
    folder = tmp_path_factory.mktemp("run")
    checkpoints.save(folder, ServerState(round_number=1, weights=tensors), {})
    loaded, _ = checkpoints.load(folder)
    assert digest(loaded.weights) == digest(tensors)


def test_only_the_newest_checkpoint_is_kept_and_loaded_tensors_outlive_it(run):
    assert run.load_checkpoint() is None
    assert RunFolder(run.path / "nothing").load_checkpoint() is None
    for number in (1, 2, 10):
        run.save_checkpoint(state(number), {})
    loaded, _ = run.load_checkpoint()
    run.save_checkpoint(state(11), {})
    assert digest(loaded.weights) == digest(state(10).weights)
    loaded.weights["z.lora_A"].zero_()
    assert [path.name for path in run.path.glob("checkpoint*")] == ["checkpoint-11"]


def test_the_same_round_may_be_saved_again(run):
    for stopped in ("", "patience", "done"):
        run.save_checkpoint(ServerState(round_number=1, weights={}, stopped=stopped), {})
        assert run.load_checkpoint()[0].stopped == stopped
    assert [path.name for path in run.path.glob("checkpoint*")] == ["checkpoint-1.2"]
    run.save_checkpoint(ServerState(round_number=10, weights={}), {})
    assert [path.name for path in run.path.glob("checkpoint*")] == ["checkpoint-10"]


def test_leftovers_are_ignored_and_cleaned_under_the_lock(run):
    run.save_checkpoint(state(1), {})
    leftover = run.path / ".checkpoint-2.99-ab.tmp"
    shutil.copytree(run.path / "checkpoint-1", leftover)
    half = run.path / "checkpoint-3"
    half.mkdir()
    assert run.load_checkpoint()[0].round_number == 1
    with run.lock():
        assert not leftover.exists()
    assert run.load_checkpoint()[0].round_number == 1


def test_torn_lines_are_cut_and_noted_but_not_those_of_a_file_with_a_lock_of_its_own(run):
    rows, ledger = run.path / "federated" / "metrics.jsonl", run.path / "ledger" / "a.jsonl"
    for name in ("federated", "ledger"):
        run.part(name).append("metrics" if name == "federated" else "a", {"round": 1})
    ledger.with_name(".a.lock").touch()
    for path in (rows, ledger):
        path.write_bytes(path.read_bytes() + b"\0" * 9)
    with run.lock():
        (note,) = run.mend()
        assert str(rows) in note and "its 9 bytes were cut" in note
        assert run.mend() == []
    assert rows.read_bytes() == b'{"round": 1}\n' and ledger.read_bytes().endswith(b"\0")


def test_a_damaged_checkpoint_names_its_file_and_is_not_passed_over(run):
    """One that lies beside it from before would be another model: it is not taken in its place."""
    run.save_checkpoint(state(1), {})
    older = run.path / "older"
    shutil.copytree(run.path / "checkpoint-1", older)
    run.save_checkpoint(state(2), {"a": SiteState({"m": torch.ones(2)}, data={"steps": 3})})
    older.rename(run.path / "checkpoint-1")
    place = run.path / "checkpoint-2"
    for name in checkpoints.FILES:
        content = (place / name).read_bytes()
        for damaged in (content[:-4], content + b" ", b"", content[:-3] + b"\xff\xff\xff", None):
            (place / name).unlink() if damaged is None else (place / name).write_bytes(damaged)
            why = f"{name}' was changed or damaged: put back a copy of 'checkpoint-2'"
            with pytest.raises(RunFolderError, match=why):
                run.load_checkpoint()
        (place / name).write_bytes(content)
    assert run.load_checkpoint()[0].round_number == 2
    for odd in ("{}", '{"files": {}}', '{"files": {"server.safetensors": "x"}}'):
        (place / "state.json").write_text(odd)
        with pytest.raises(RunFolderError, match="not a checkpoint of this version, or was damaged"):
            run.load_checkpoint()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_of_a_checkpoint_is_resumed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    kept = SiteState({"m": torch.tensor([1, 2])}, data={"loss": float("inf"), "steps": 5})
    place = checkpoints.save(folder, state(3), {"bank": kept})
    sha256, whole = checkpoints.sha256_of(place), checkpoints.load(folder)
    name = data.draw(st.sampled_from(checkpoints.FILES))
    content = (place / name).read_bytes()
    spot = data.draw(st.integers(0, len(content) - 1))
    flipped = bytes([content[spot] ^ (1 << data.draw(st.integers(0, 7)))])
    (place / name).write_bytes(content[:spot] + flipped + content[spot + 1 :])
    with pytest.raises(RunFolderError, match="changed or damaged|or was damaged"):
        checkpoints.load(folder)
    (place / name).write_bytes(content)
    assert checkpoints.sha256_of(place) == sha256
    again = checkpoints.load(folder)
    assert digest(again[0].weights) == digest(whole[0].weights) and again[1]["bank"].data == kept.data


def test_a_checkpoint_is_announced_before_it_is_there(run):
    told = []

    def announce(sha256):
        told.append(sha256)
        assert not list(run.path.glob("checkpoint*"))

    run.save_checkpoint(state(1), {}, announce=announce)
    assert told == [checkpoints.sha256_of(run.path / "checkpoint-1")]
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(state(2), {}, announce=lambda sha256: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [path.name for path in run.path.glob("*checkpoint*")] == ["checkpoint-1"]


def test_the_adapter_comes_back_and_can_be_written_again(run):
    for value in (0.0, 1.0):
        tensors = {"base_model.model.q.lora_A.weight": torch.full((2, 3), value)}
        run.save_adapter(tensors, {"peft_type": "LORA", "target_modules": {"q"}}, card="# Card\n")
        loaded, config = run.load_adapter()
        assert digest(loaded) == digest(tensors)
        assert config == {"peft_type": "LORA", "target_modules": ["q"]}
    assert {path.name for path in (run.path / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    with pytest.raises(RunFolderError, match="holds no adapter_config.json"):
        run.part("federated").load_adapter()


WRITE_FOREVER = """
import sys
from pathlib import Path
import torch
from silotune.record.runs import RunFolder
from silotune.structs import ServerState, SiteState
run = RunFolder.open(sys.argv[1])
with run.lock():
    print("ready", flush=True)
    loaded = run.load_checkpoint()
    number = loaded[0].round_number if loaded else 0
    while True:
        number += 1
        value = torch.full((100_000,), float(number))
        run.append("metrics", {"round": number})
        run.save_checkpoint(
            ServerState(number, {"w": value}, {"m": -value}), {"a": SiteState({"r": value}, data={"round": number})}
        )
"""


def start(run: RunFolder, code: str = WRITE_FOREVER) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.end_to_end
def test_kill_while_writing_leaves_a_whole_newest_checkpoint(run):
    chance = random.Random(0)
    before = 0
    for _ in range(3):
        process = start(run)
        time.sleep(chance.uniform(0.1, 0.6))
        end(process)
        server, sites = run.load_checkpoint()
        number = server.round_number
        assert number > before
        assert torch.equal(server.weights["w"], torch.full((100_000,), float(number)))
        assert torch.equal(server.memory["m"], torch.full((100_000,), -float(number)))
        assert sites["a"].data == {"round": number} and sites["a"].optimizer["r"][0] == number
        assert len(run.read_rows("metrics")) >= number
        run.keep_rounds("metrics", number)
        before = number


@pytest.mark.end_to_end
def test_one_writer_at_a_time_and_a_kill_frees_the_lock(run):
    process = start(run)
    with pytest.raises(RunFolderError, match=f"in use by process {process.pid} "), run.lock():
        pass
    end(process)
    with run.lock(), pytest.raises(RunFolderError, match=f"process {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass


@pytest.fixture
def small_disk(tmp_path: Path):
    with disk(tmp_path / "disk", size=256 << 10) as place:
        yield place


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk):
    run = RunFolder.create(small_disk, "demo", config={})
    run.save_checkpoint(state(1), {})
    run.append("metrics", {"round": 1})
    before = snapshot(run)
    big = {"w": torch.zeros(100_000)}
    for act in (
        lambda: run.save_checkpoint(ServerState(2, big), {}),
        lambda: run.save_adapter(big, {}, card=""),
        lambda: run.write_json("result", "x" * 300_000),
        lambda: run.append("metrics", {"x": "x" * 300_000}),
    ):
        with pytest.raises(RunFolderError, match="no space left in") as caught:
            act()
        assert ".tmp" not in str(caught.value) and "\n" not in str(caught.value)
        assert snapshot(run) == before
    with pytest.raises(RunFolderError, match="no space left"):
        RunFolder.create(small_disk, "second", config={"x": "x" * 300_000})
    assert not (small_disk / "second").exists()


def snapshot(run: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_an_unknown_tensor_error_is_told(run, monkeypatch):
    import safetensors.torch

    def fail(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("odd")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(RunFolderError, match="odd"):
        run.save_checkpoint(state(1), {})
    assert run.load_checkpoint() is None


def test_a_lock_that_the_disk_cannot_give_is_told(run, monkeypatch):
    import fcntl

    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(RunFolderError, match="cannot lock .* No locks available"), run.lock():
        pass


def test_create_in_a_place_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot use"):
        RunFolder.create(tmp_path / "file", "demo", config={})
