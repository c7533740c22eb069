"""The end of a run: killed at any moment before it is sealed, it is sealed by resume; afterwards nothing is written."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from silotune.config import Config
from silotune.errors import AuditError, RunFolderError
from silotune.experiment.audit import verify_run
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record import checkpoints
from silotune.record.audit import FILE
from silotune.record.grids import Cell, GridFolder, config_digest
from silotune.record.runs import RunFolder

pytestmark = pytest.mark.end_to_end
Make = Callable[..., Config]
MODES = {"modes": ["federated", "centralized"], "rounds": 2}


class KilledError(BaseException):
    """Stands for SIGKILL: nothing of ours catches it, and what is on the disk stays as it is."""


def dying(patch: pytest.MonkeyPatch, place: str, *, is_after: bool) -> None:
    """The process dies when it comes to a function for the first time, or when it leaves it."""
    module, _, name = place.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def dies(*values: object, **named: object) -> None:
        if is_after:
            real(*values, **named)
        raise KilledError

    patch.setattr(place, dies)


def killed(monkeypatch: pytest.MonkeyPatch, config: Config, place: str, *, is_after: bool = False) -> Path:
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        dying(patch, place, is_after=is_after)
        run_experiment(config)
    (folder,) = config.record.folder.iterdir()
    return folder


def snapshot(run: Path) -> dict[str, bytes]:
    found = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}


MOMENTS = {
    "before the result is in the trail": ("silotune.experiment.run.concludes", False),
    "after it": ("silotune.experiment.run.concludes", True),
    "before the other parts are compared": ("silotune.experiment.results.summarize", False),
    "before the manifest": ("silotune.federation.coordinator.audit.write_manifest", False),
    "after the manifest": ("silotune.federation.coordinator.audit.write_manifest", True),
    "after the trail is closed": ("silotune.experiment.run.close", True),
    "before the key is forgotten": ("silotune.experiment.run.forget_key", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_before_it_is_sealed_is_sealed_by_resume(
    configuration: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    place, is_after = MOMENTS[moment]
    folder = killed(monkeypatch, configuration(federation=MODES), place, is_after=is_after)
    assert list(folder.rglob("audit.key"))
    if not (folder / "federated" / FILE).read_bytes().count(b'"event":"closed"'):
        with pytest.raises(AuditError, match=r"federated/audit.jsonl: entry \d+ is missing: the trail was cut off"):
            verify_run(folder)
    done = resume_experiment(folder)
    found = verify_run(done.path)
    assert found.has_adapter and found.coverage.uncovered == () and "summary.json" in found.coverage.covered
    assert not list(folder.rglob("audit.key"))
    whole = run_experiment(configuration(federation=MODES, record={"folder": str(tmp_path / "whole")}))
    for part in ("federated", "centralized"):
        left, right = (run.part(part).load_adapter()[0] for run in (whole, done))
        tiny.assert_same_bits(left, right)
    before = snapshot(folder)
    assert resume_experiment(folder) == done and snapshot(folder) == before


def test_a_cell_of_a_grid_is_done_when_it_is_sealed(
    configuration: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = killed(monkeypatch, configuration(), "silotune.federation.coordinator.audit.write_manifest")
    grid = GridFolder(tmp_path)
    digest = config_digest(RunFolder(folder).read_json("config"))
    cell = Cell("t", "m", "a", "g", "p", 0, ("federated",), folder.relative_to(tmp_path).as_posix(), digest)
    assert RunFolder(folder).has("summary") and not grid.is_done(cell)
    resume_experiment(folder)
    assert grid.is_done(cell)


@pytest.fixture
def stopped(configuration: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose rounds are done and whose result is not there yet."""
    return killed(monkeypatch, configuration(), "silotune.experiment.run.concludes")


def test_an_unfinished_run_is_compared_with_what_its_trail_covers(stopped: Path) -> None:
    found = verify_run(stopped, is_open_allowed=True)
    assert found.coverage.covered == tuple(f"checkpoint-2/{name}" for name in checkpoints.FILES)
    assert not found.has_adapter and not found.chain.is_closed
    state = stopped / "federated" / "checkpoint-2" / "server.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AuditError, match="server.safetensors' was changed or damaged"):
        verify_run(stopped, is_open_allowed=True)


def forged_checkpoint(run: Path) -> None:
    """Another model, with hashes that fit it."""
    folder = RunFolder(run / "federated")
    loaded = folder.load_checkpoint()
    assert loaded is not None
    server, sites = loaded
    for tensor in server.weights.values():
        tensor += 1.0
    folder.save_checkpoint(server, sites)


def one_bit(run: Path) -> None:
    state = run / "federated" / "checkpoint-2" / "server.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def another_round(run: Path) -> None:
    """The model of a round that the trail knows, called another one's."""
    place = run / "federated" / "checkpoint-2" / "state.json"
    state = json.loads(place.read_text())
    state["server"]["round_number"] = 1
    del state["sha256"]
    text = json.dumps(state, ensure_ascii=False)
    place.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **state}, ensure_ascii=False))


def without_key(run: Path) -> None:
    (run / "federated" / "audit.key").unlink()


def without_trail(run: Path) -> None:
    (run / "federated" / FILE).unlink()


def cut_trail(run: Path) -> None:
    lines = (run / "federated" / FILE).read_bytes().splitlines(keepends=True)
    (run / "federated" / FILE).write_bytes(b"".join(lines[:-1]))  # without what vouches for the newest checkpoint


def edited_trail(run: Path) -> None:
    place = run / "federated" / FILE
    place.write_bytes(place.read_bytes().replace(b'"round":1', b'"round":3', 1))


REFUSED = {
    "one flipped bit": (one_bit, RunFolderError, "server.safetensors' was changed or damaged: put back a copy"),
    "another model": (forged_checkpoint, RunFolderError, "is not one that the audit trail audit.jsonl vouches for"),
    "another round": (another_round, RunFolderError, "is not one that the audit trail audit.jsonl vouches for"),
    "no trail": (without_trail, RunFolderError, "is vouched for by no audit trail"),
    "a trail that was cut off": (cut_trail, RunFolderError, "is not one that the audit trail audit.jsonl vouches for"),
    "a trail that was edited": (edited_trail, AuditError, r"cannot be continued: entry \d+"),
    "no key": (without_key, AuditError, "its key audit.key is gone; begin a new run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_does_not_go_on_from_what_its_trail_does_not_vouch_for(stopped: Path, name: str) -> None:
    edit, kind, said = REFUSED[name]
    edit(stopped)
    with pytest.raises(kind, match=said) as caught:
        resume_experiment(stopped)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_an_older_copy_of_its_checkpoint(
    configuration: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the message about a damaged one advises; rounds are done again to the same bits, and the trail fits."""
    config = configuration(federation={"rounds": 3})
    saved = tmp_path / "saved"

    real = RunFolder.save_checkpoint

    def copying(folder: RunFolder, server, sites, **named) -> None:  # noqa: ANN001, ANN003
        real(folder, server, sites, **named)
        if server.round_number == 1:
            shutil.copytree(folder.path / "checkpoint-1", saved)

    monkeypatch.setattr(RunFolder, "save_checkpoint", copying)
    folder = killed(monkeypatch, config, "silotune.experiment.run.concludes")
    shutil.rmtree(folder / "federated" / "checkpoint-3")
    saved.rename(folder / "federated" / "checkpoint-1")
    done = resume_experiment(folder)
    assert verify_run(done.path).has_adapter
    whole = run_experiment(configuration(federation={"rounds": 3}, record={"folder": str(tmp_path / "whole")}))
    tiny.assert_same_bits(whole.part("federated").load_adapter()[0], done.part("federated").load_adapter()[0])
