"""Every move of a hostile coordinator is refused, by what the table says, and tells it nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.hostile import Coordinator, House, configuration, leaks, outcome
from attacks.moves import MOVES
from silotune.federation.wire.reasons import REASONS
from silotune.models import threads
from silotune.record.environment import cores


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> House:
    made = House(tmp_path_factory.mktemp("h"), tiny_folder)
    first = Coordinator(made, configuration(tiny_folder), run="first", number="f" * 32)
    assert outcome(first.send(first.request())) == "reply"  # what libraries open at their first use is not looked at
    made.watch.seen.clear()
    return made


@pytest.fixture
def fresh(house: House, tiny_folder: Path) -> Coordinator:
    """A coordinator with a run of its own at the site."""
    fresh.count = getattr(fresh, "count", 0) + 1  # type: ignore[attr-defined]
    number = fresh.count  # type: ignore[attr-defined]
    return Coordinator(house, configuration(tiny_folder), run=f"run-{number}", number=f"{number:032x}")


def test_an_honest_coordinator_is_served(fresh: Coordinator) -> None:
    """What all moves differ from, so that none is refused for another reason than its own."""
    assert outcome(fresh.send(fresh.request())) == "reply"
    assert outcome(fresh.send(fresh.request("evaluate"))) == "reply"
    assert outcome(fresh.send(fresh.request("countersign", tensors={}))) == "reply"
    assert fresh.house.trail()[-1].event == "reply"


def test_threads_of_a_run_are_at_most_the_machine_s_and_end_with_it(
    fresh: Coordinator, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "LARGEST_ON_ONE_THREAD", 0)
    fresh.house.resident.rest()
    own = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for asked, given in ((1024, cores()), (None, 1)):
            config = configuration(tiny_folder, training={"threads": asked})
            other = replace(fresh, config=config, run=f"threads-{asked}", number=f"{asked or 0:032x}")
            assert outcome(other.send(other.request("countersign", tensors={}, body={"job": other.job()}))) == "reply"
            assert torch.get_num_threads() == given
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_refused(fresh: Coordinator, name: str, refused: Callable[..., None]) -> None:
    listed, house = MOVES[name], fresh.house
    fresh.model()  # the run is open: imports and model are there before anybody looks
    entries, before = len(house.trail()), set(house.states())
    frame = listed.move(fresh)
    assert outcome(frame) == listed.refused_by and outcome(frame) in REASONS
    assert not leaks(frame) and not frame.payload
    assert house.watch.seen == []  # nothing was opened but the site's own
    new = house.trail()[entries:]
    assert new[-1].event == "refusal" and new[-2].event == "request"
    made = {name for path in set(house.states()) - before for name in path.split("/")}
    assert not made & {"-7", "0", "..", "escape"}
    refused("a hostile coordinator", listed.says, f"{outcome(frame)}: {REASONS[outcome(frame)]}")
