"""Disks that are really full: a tmpfs of a few pages. What cannot be written leaves what was there, whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disks import PAGE, disk, fill, make_room
from silotune.errors import RunFolderError
from silotune.federation.coordinator.course import verify_trail
from silotune.federation.site.ledger import Budget, open_round, spent_in
from silotune.privacy.accountant import Spend
from silotune.record import checkpoints, files
from silotune.record.audit import FILE, Trail
from silotune.record.runs import RunFolder
from silotune.record.signatures import new_key, private_bytes, write_secret
from silotune.settings.sections import PrivacySection
from silotune.structs import ServerState, SiteState

pytestmark = pytest.mark.end_to_end


@pytest.fixture(params=[16, 64], ids=lambda pages: f"{pages} pages")
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", size=request.param * PAGE) as mounted:
        yield mounted


def until_full(write: Callable[[int], object]) -> int:
    """Calls ``write`` with 0, 1, 2, ... until the disk is full; gives the number of the one that found no room."""
    for number in range(10_000):
        try:
            write(number)
        except RunFolderError as error:
            assert "no space left" in str(error) and "\n" not in str(error)  # noqa: PT017  any other error fails
            return number
    raise AssertionError("the disk did not fill up")


def row(number: int, *, size: int = 300) -> dict[str, Any]:
    return {"round": number, "text": "x" * size}


@pytest.mark.parametrize("size", [300, 3 * PAGE])
def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(place: Path, size: int) -> None:
    path, seen = place / "metrics.jsonl", [b""]

    def write(number: int) -> None:
        files.append_line(path, files.to_line(row(number, size=size)))
        seen.append(path.read_bytes())

    write(0)
    fill(place)
    count = 1 + until_full(lambda number: write(number + 1))
    assert path.read_bytes() == seen[-1]
    assert files.read_lines(path) == [row(number, size=size) for number in range(count)]
    make_room(place)
    files.append_line(path, files.to_line(row(99)))
    assert files.read_lines(path)[count:] == [row(99)]


def test_several_rows_of_one_append_are_there_together_or_not_at_all(place: Path) -> None:
    folder = RunFolder(place)
    folder.append("clients", row(0))
    fill(place)
    count = until_full(lambda number: folder.append("clients", *[row(number + 1)] * 5))
    assert len(folder.read_rows("clients")) == 1 + 5 * count


def test_a_file_that_cannot_be_replaced_stays(place: Path) -> None:
    path = place / "state.json"
    files.write_json(path, {"old": "x" * 100})
    fill(place)
    with pytest.raises(RunFolderError, match="no space left"):
        files.write_json(path, {"new": "x" * 3 * PAGE})
    assert files.read_json(path) == {"old": "x" * 100}
    make_room(place)
    files.write_json(path, {"new": 1})
    assert files.read_json(path) == {"new": 1}
    assert [entry.name for entry in place.iterdir()] == ["state.json"]


def test_a_secret_that_finds_no_room_is_not_there(place: Path) -> None:
    content = private_bytes(new_key())
    fill(place)
    with pytest.raises(RunFolderError, match="no space left"):
        write_secret(place / "audit.key", content)
    make_room(place)
    assert not list(place.iterdir())
    write_secret(place / "audit.key", content)
    assert (place / "audit.key").read_bytes() == content


@pytest.mark.parametrize("leave", [0, 1, 2, 3])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(place: Path, leave: int) -> None:
    def state(number: int) -> ServerState:
        return ServerState(number, {"w": torch.full((2, PAGE // 8), float(number))})

    sites = {"a": SiteState({"m": torch.ones(PAGE // 8)}, data={"seen": 1})}
    checkpoints.save(place, state(1), sites)
    fill(place, leave=leave * PAGE)
    with pytest.raises(RunFolderError, match="no space left"):
        checkpoints.save(place, state(2), sites)
    assert checkpoints.load(place)[0].round_number == 1
    make_room(place)
    checkpoints.save(place, state(2), sites)
    assert checkpoints.load(place)[0].weights["w"][0, 0] == 2
    assert [entry.name for entry in place.iterdir()] == ["checkpoint-2"]


def test_entries_of_a_trail_that_found_no_room_are_written_later_in_order_and_once(place: Path) -> None:
    trail = Trail(place / FILE, new_key(), actor="site")

    def add(number: int) -> None:
        trail.add("request", {"number": number})
        trail.flush()

    add(0)
    fill(place)
    missed = 1 + until_full(lambda number: add(number + 1))
    assert len(verify_trail(place / FILE, is_open_allowed=True).entries) == missed
    until_full(lambda number: add(missed + 1 + number))  # no room yet: what is asked meanwhile waits, too
    make_room(place)
    add(missed + 2)
    entries = verify_trail(place / FILE, is_open_allowed=True).entries
    assert [entry.fields["number"] for entry in entries] == list(range(missed + 3))


@pytest.mark.parametrize("place", [16], indirect=True)
def test_a_round_whose_charge_finds_no_room_does_not_begin(place: Path) -> None:
    privacy = PrivacySection(dp={"type": "example", "noise_multiplier": 1.0, "accountant": "rdp"})

    def charge(number: int) -> None:
        open_round(
            "a", SiteState(), Budget(place / "ledger"), privacy, run="r" * 1000, round_number=number,
            release=lambda noise: Spend(1.0, 0.5, 1),
        )  # fmt: skip

    charge(0)
    fill(place)
    count = 1 + until_full(lambda number: charge(number + 1))
    assert spent_in(place / "ledger", delta=1e-5, accountant="rdp")["a"]["releases"] == count
    make_room(place)
    charge(count)
    assert spent_in(place / "ledger", delta=1e-5, accountant="rdp")["a"]["releases"] == count + 1
