"""A coordinator that dies in any phase of a round goes on from its checkpoint, to the same bits, without help."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

import tiny
from acting import ORDER, acting
from line import NAMES, Line, line, transport
from silotune.federation.coordinator.rounds import Plan, run_rounds
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import layout_of
from silotune.methods.algorithms import method
from silotune.record.runs import RunFolder
from silotune.settings.sections import FederationSection
from silotune.structs import ServerState
from silotune.transports.frames import Frame, work_frame
from silotune.transports.trainer_host import Opened, TrainerHost

pytestmark = pytest.mark.end_to_end

EXAMPLES = tiny.encoded(tiny.closed(9))
SETTINGS = acting(tiny.training(learning_rate=0.01, optimizer_state="keep"), rounds=3)


class KilledError(BaseException):
    """What SIGKILL is to a process, for one that must go on."""


class Desk:
    def __init__(self, name: str, model, start) -> None:  # noqa: ANN001
        place = NAMES.index(name)
        self.opened = Opened(
            Site(name, EXAMPLES[place::3], model, settings=SETTINGS), {"train": layout_of(start)}, keep=3
        )

    def open(self, setup: Mapping[str, Any]) -> Opened:
        return self.opened

    def rest(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}


def trainers(folder: Path, model, start) -> Any:  # noqa: ANN001
    hosts = {name: TrainerHost(Desk(name, model, start), folder / name) for name in NAMES}

    def work(envelope: Mapping[str, str], setup: Any, data: bytes) -> Frame:
        return hosts[envelope["client"]].answer(work_frame(envelope["job"], setup, data))

    return work


def coordinate(folder: Path, grid: Line, start, *, dies: tuple[str, int] = ("", 0), every: int = 1) -> ServerState:  # noqa: ANN001
    """One life of a coordinator; ``dies`` is the event, and its number, at which it does."""
    seen: dict[str, int] = {}

    def at(event: str) -> None:
        seen[event] = seen.get(event, 0) + 1
        if (event, seen[event]) == dies:
            raise KilledError

    def score(weights: Any) -> dict[str, Any]:
        at("scoring")
        return {"norm": float(sum(value.square().sum() for value in weights.values()))}

    run = RunFolder(folder)
    real_pull, real_push = grid.pull_messages, grid.push_messages
    grid.pull_messages = lambda numbers: (at("waiting"), real_pull(numbers))[1]  # type: ignore[method-assign]
    grid.push_messages = lambda messages: (at("asking"), real_push(messages))[1]  # type: ignore[method-assign]
    plan = Plan(
        rounds=3, method=method(FederationSection()), body=ORDER, seed=3, timeout_seconds=60, score=score,
        settings=SETTINGS, checkpoint_every=every,
    )  # fmt: skip
    found = run.load_checkpoint()
    state = found[0] if found else ServerState(0, start)
    try:
        return run_rounds(plan, transport(grid), state, run, notify=lambda event, fields: at(event))
    finally:
        grid.pull_messages, grid.push_messages = real_pull, real_push  # type: ignore[method-assign]


PHASES = (
    ("scoring", 1), ("asking", 2), ("waiting", 1), ("waiting", 5), ("client_finished", 2), ("client_finished", 5),
    ("scoring", 3), ("round_finished", 3), ("asking", 8), ("round_finished", 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(model, start, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN001
    folder = tmp_path_factory.mktemp("whole")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    grid = line(trainers(folder / "sites", model, start))
    return coordinate(folder / "run", grid, start), RunFolder(folder / "run").read_rows("metrics")


@pytest.mark.parametrize(
    ("phase", "every"),
    [*((phase, 1) for phase in PHASES), (("waiting", 5), 2), (("round_finished", 3), 2)],
    ids=lambda value: f"{value[0]}-{value[1]}" if isinstance(value, tuple) else str(value),
)
def test_no_phase_is_a_bad_one_to_die_in(whole, model, start, tmp_path: Path, phase, every: int) -> None:  # noqa: ANN001
    work = trainers(tmp_path / "sites", model, start)
    with pytest.raises(KilledError):
        coordinate(tmp_path / "run", line(work), start, dies=phase, every=every)
    state = coordinate(tmp_path / "run", line(work, seed=5), start, every=every)
    tiny.assert_same_bits(state.weights, whole[0].weights)
    rows = RunFolder(tmp_path / "run").read_rows("metrics")
    assert [(row["round"], row["norm"]) for row in rows] == [(row["round"], row["norm"]) for row in whole[1]]
