"""Whole runs on a real disk that fills up: they end with one line, and go on to the bits of a quiet run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny
from disks import PAGE, disk, fill, make_room
from silotune.config import Config
from silotune.errors import RunFolderError
from silotune.experiment.audit import verify_run
from silotune.experiment.run import resume_experiment, run_experiment
from silotune.record.runs import RunFolder

ROWS = ("metrics", "clients")


def kept(run: RunFolder, name: str) -> list[dict[str, Any]]:
    """The rows of the federated part, without what a clock or a meter says."""
    return [
        {key: value for key, value in row.items() if "seconds" not in key and key not in ("cost", "joules")}
        for row in run.part("federated").read_rows(name)
    ]


def assert_same(quiet: RunFolder, resumed: RunFolder) -> None:
    tiny.assert_same_bits(quiet.part("federated").load_adapter()[0], resumed.part("federated").load_adapter()[0])
    for name in ROWS:
        assert kept(quiet, name) == kept(resumed, name)
    assert verify_run(resumed.path).has_adapter


@pytest.mark.end_to_end
def test_a_run_whose_disk_fills_up_goes_on_to_the_bits_of_a_quiet_one(
    configuration: Callable[..., Config], tmp_path: Path
) -> None:
    quiet = run_experiment(configuration(federation={"rounds": 3}))
    for leave in (0, 1, 2, 3, 5, 8):
        with disk(tmp_path / f"disk-{leave}", size=8 << 20) as place:
            config = configuration(federation={"rounds": 3}, record={"folder": str(place / "runs")})

            def fills(event: str, fields: Mapping[str, Any], place: Path = place, leave: int = leave) -> None:
                if event == "round_finished" and fields["round"] == 1:
                    fill(place, leave=leave * PAGE)

            with pytest.raises(RunFolderError, match="no space left") as caught:
                run_experiment(config, observer=fills)
            assert "\n" not in str(caught.value), leave
            folder = place / "runs" / "demo"
            for path in folder.rglob("*.jsonl"):
                assert path.read_bytes()[-1:] in (b"\n", b""), path
            if leave == 0:  # nothing was freed yet: the same line once more, and nothing is worse
                with pytest.raises(RunFolderError, match="no space left"):
                    resume_experiment(folder)
            make_room(place)
            assert_same(quiet, resume_experiment(folder))


@pytest.mark.end_to_end
def test_lines_torn_by_a_power_cut_are_cut_and_noted_and_change_no_bit(
    configuration: Callable[..., Config], tmp_path: Path
) -> None:
    quiet = run_experiment(configuration(federation={"rounds": 3}))
    config = configuration(federation={"rounds": 3}, record={"folder": str(tmp_path / "cut")})

    class PowerCutError(Exception):
        pass

    def cuts(event: str, fields: Mapping[str, Any]) -> None:
        if event == "round_finished" and fields["round"] == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        run_experiment(config, observer=cuts)
    folder = tmp_path / "cut" / "demo"
    torn = [path for path in folder.rglob("*.jsonl") if path.stat().st_size]
    assert {path.stem for path in torn} >= {*ROWS, "events", "audit"}
    for path in torn:
        path.write_bytes(path.read_bytes() + b'{"round": ' + b"\0" * 700 + b"\n")
    resumed = resume_experiment(folder)
    assert_same(quiet, resumed)
    notes = [row["text"] for row in resumed.read_rows("events") if row["event"] == "note"]
    assert all(any(f"{str(path)!r} was torn" in note for note in notes) for path in torn)
