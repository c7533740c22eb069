"""What a site keeps between rounds: a kill at any moment leaves the newest whole state, damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from silotune.errors import RunFolderError
from silotune.record import site_states
from silotune.record.site_states import load_before, load_newest, save_after
from silotune.structs import SiteState


class KilledError(Exception):
    """Stands for SIGKILL: what is on the disk stays as it is."""


def kept(folder: Path, *rounds: int) -> None:
    for number in rounds:
        save_after(folder, number, SiteState(data={"steps": number}), keep=3)


@pytest.mark.parametrize(
    "place", ["checkpoints.write_groups", "checkpoints.shutil.rmtree", "site_states.shutil.rmtree"]
)
@pytest.mark.parametrize("number", [3, 5, 6])
def test_a_kill_leaves_a_state_that_the_site_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    """A round is asked for again, or the next one, and the process dies while it writes or while it removes."""

    def dies(*values: object, **named: object) -> None:
        raise KilledError

    kept(tmp_path, 1, 2, 3, 4, 5)
    with monkeypatch.context() as patch:
        patch.setattr(f"silotune.record.{place}", dies)
        try:
            save_after(tmp_path, number, SiteState(data={"steps": 10 * number}), keep=3)
        except KilledError:
            (tmp_path / str(number)).mkdir(exist_ok=True)  # as a kill leaves it before the state is moved into it
    assert load_newest(tmp_path).data["steps"] in (5, 10 * number)
    assert load_before(tmp_path, number).data == {"steps": number - 1}
    kept(tmp_path, number)
    assert load_newest(tmp_path).data == {"steps": number}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_state_that_was_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    kept(tmp_path, 1, 2)
    state = tmp_path / "2" / "checkpoint-2" / "state.json"
    content = state.read_bytes()
    state.write_bytes(content.replace(b'"steps": 2', b'"steps": 3'))
    for load in (lambda: load_newest(tmp_path), lambda: load_before(tmp_path, 3)):
        with pytest.raises(RunFolderError, match="state.json' was changed or damaged"):
            load()
    assert load_before(tmp_path, 2).data == {"steps": 1}
    state.write_bytes(content)
    assert load_newest(tmp_path).data == {"steps": 2}


def test_a_site_that_keeps_nothing_has_no_files(tmp_path: Path) -> None:
    save_after(tmp_path / "run", 1, SiteState(), keep=2)
    assert not (tmp_path / "run").exists() and load_newest(tmp_path / "run") == SiteState()
    assert site_states.load_before(tmp_path / "run", 5) == SiteState()
