"""The resident trainer: the bits of the client function, one base for all requests, states that survive it."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from acting import ORDER, acting
from silotune.errors import BudgetError, DataError, PolicyError, RunFolderError
from silotune.federation.site.client import client_round
from silotune.federation.site.served import FILE, OPENED, Served
from silotune.federation.site.state import Site
from silotune.federation.wire.messages import decode_reply, encode, layout_of
from silotune.federation.wire.reasons import REASONS
from silotune.record.site_states import load_before, load_newest, save_after
from silotune.structs import BUDGET, Request, SiteState
from silotune.transports.frames import Frame, ask, listen, wait_until_ready, work_frame
from silotune.transports.trainer_host import Opened, TrainerHost

EXAMPLES = tiny.encoded(tiny.closed(6))
SETTINGS = acting(tiny.training(learning_rate=0.01, optimizer_state="keep"), rounds=3)


class OneModel:
    """Opens every run with the same examples and model; notes what was asked of it."""

    def __init__(self, model, start) -> None:  # noqa: ANN001
        self.model, self.expected = model, {"train": layout_of(start)}
        self.opened: list[Any] = []
        self.rests = 0
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.gate: threading.Event | None = None

    def open(self, setup: Mapping[str, Any]) -> Opened:
        self.opened.append(setup)
        if setup.get("fault"):
            raise DataError("no such examples")
        if setup.get("rule"):
            raise PolicyError(setup["rule"], "not here")
        if setup.get("spent"):
            raise BudgetError("nothing is left")
        if setup.get("bug"):
            raise KeyError("a patient's name")
        if self.gate is not None:
            self.gate.wait(10)
        self.site = Site("a", EXAMPLES, self.model, settings=SETTINGS)
        return Opened(self.site, self.expected, keep=2, notes=("train: 1 of 9 prompts were cut",))

    def rest(self) -> None:
        self.rests += 1

    def state(self) -> dict[str, Any]:
        return {"base_loads": 1}


@contextmanager
def served(desk: OneModel, folder: Path) -> Iterator[Path]:
    """A trainer in a thread; its socket."""
    path = folder / "own" / "trainer.sock"
    host = TrainerHost(desk, folder / "states", notify=lambda event, fields: desk.told.append((event, fields)))
    thread = threading.Thread(target=host.serve, args=(listen(path),), daemon=True)
    thread.start()
    wait_until_ready(path, timeout_seconds=5)
    yield path
    ask(path, Frame({"verb": "stop"}), timeout_seconds=5)
    thread.join(5)
    assert not thread.is_alive()


def request(start, number: int, **changes: Any) -> Request:  # noqa: ANN001
    return Request(
        **{"kind": "train", "round_number": number, "client": "a", "tensors": start, "body": ORDER, **changes}
    )


def work(path: Path, asked: Request, setup: Mapping[str, Any] | None = None, job: str = "run-1") -> Frame:
    return ask(path, work_frame(job, json.dumps(setup or {"seed": 1}).encode(), encode(asked)), timeout_seconds=30)


def test_a_killed_trainer_goes_on_with_the_same_bits(model, start, tmp_path: Path) -> None:
    site, wanted = Site("a", EXAMPLES, model, settings=SETTINGS), []
    for number in (1, 2, 3):
        wanted.append(client_round(request(start, number), site))
    desk = OneModel(model, start)
    for number in (1, 2, 2, 3):  # each time another trainer; a coordinator that went back asks for round 2 twice
        with served(desk, tmp_path) as path:
            frame = work(path, request(start, number))
        assert frame.header["status"] == "reply"
        reply = decode_reply(frame.payload, layout_of(start))
        tiny.assert_same_bits(reply.tensors, wanted[number - 1].tensors)
        assert reply.body["loss"] == wanted[number - 1].body["loss"]
    assert len(desk.opened) == 4


def test_a_run_is_opened_once_and_the_next_one_frees_it(model, start, tmp_path: Path) -> None:
    desk = OneModel(model, start)
    with served(desk, tmp_path) as path:
        for job in ("run-1", "run-1", "run-2"):
            assert work(path, request(start, 1), job=job).header["status"] == "reply"
        said = ask(path, Frame({"verb": "state"}), timeout_seconds=5).header
    assert (len(desk.opened), desk.rests, said["served"], said["base_loads"]) == (2, 1, 3, 1)
    notes = ["train: 1 of 9 prompts were cut"]  # for the site's own staff: no answer holds them
    assert desk.told == [("run_opened", {"run": run, "notes": notes}) for run in ("run-1", "run-2")]
    assert "cut" not in str(said)


@pytest.mark.parametrize(
    ("setup", "changes", "stage", "reason"),
    [
        ({"fault": 1}, {}, "open", "data"),
        ({"bug": 1}, {}, "open", "error"),
        ({}, {"tensors": {}}, "admission", "form"),
        ({}, {"client": "b"}, "admission", "form"),
        ({}, {"kind": "steal", "tensors": {}}, "steal", "form"),
        ({}, {"body": {}}, "train", "form"),
    ],
)
def test_what_goes_wrong_is_said_by_a_code_and_no_text(
    model, start, tmp_path: Path, setup, changes, stage, reason
) -> None:  # noqa: ANN001
    with served(OneModel(model, start), tmp_path) as path:
        frame = work(path, request(start, 1, **changes), {"seed": 1, **setup})
    assert (frame.header["status"], frame.header["stage"], frame.header["reason"]) == ("failure", stage, reason)
    assert reason in REASONS and "patient" not in json.dumps(frame.header)


def test_a_full_disk_at_a_site_fails_the_request_and_no_more(model, start, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    def full(path: Path, *rest: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "full", str(path))

    with served(OneModel(model, start), tmp_path) as path:
        with monkeypatch.context() as patch:
            patch.setattr("silotune.record.checkpoints.write_groups", full)
            frame = work(path, request(start, 1))
        assert (frame.header["status"], frame.header["reason"]) == ("failure", "disk")
        assert work(path, request(start, 1)).header["status"] == "reply"


def test_a_refusal_carries_the_rule(model, start, tmp_path: Path) -> None:
    with served(OneModel(model, start), tmp_path) as path:
        frame = work(path, request(start, 1), {"rule": "tasks"})
    assert frame.header["reason"] == "tasks"


@pytest.mark.parametrize("job", ["", "../up", ".hidden", "a/b"])
def test_a_run_cannot_name_a_folder_elsewhere(model, start, tmp_path: Path, job: str) -> None:
    with served(OneModel(model, start), tmp_path) as path:
        assert work(path, request(start, 1), job=job).header["status"] == "failure"
        assert ask(path, Frame({"verb": "dance"}), timeout_seconds=5).header["status"] == "failure"


def test_a_spent_budget_is_told_as_one(model, start, tmp_path: Path) -> None:  # noqa: ANN001
    with served(OneModel(model, start), tmp_path) as path:
        frame = work(path, request(start, 1), {"spent": 1})
    assert (frame.header["status"], frame.header["stage"]) == ("failure", BUDGET)


def test_what_was_served_is_not_put_back(model, start, tmp_path: Path) -> None:  # noqa: ANN001
    """A round is asked for again after later ones, and by a trainer that knows the disk alone: it is still known."""
    desk = OneModel(model, start)
    place = tmp_path / "states" / "run-1" / FILE
    for number, over in ((1, "x"), (2, "y")):
        Served(place).note_opened(f"secure_sum:{number}", over)
    with served(desk, tmp_path) as path:
        assert work(path, request(start, 2)).header["status"] == "reply"
        assert work(path, request(start, 1)).header["status"] == "reply"
        assert desk.site.served.opened("secure_sum:2") == "y"
    known = Served(place)
    assert (known.opened("secure_sum:1"), known.opened("secure_sum:2")) == ("x", "y")
    assert known.of(OPENED, "secure_sum:3") == ()


def test_a_request_that_is_refused_undoes_nothing(model, start, tmp_path: Path) -> None:  # noqa: ANN001
    """An order of an earlier round that cannot be read: what the site has spent since stays known."""
    desk = OneModel(model, start)
    with served(desk, tmp_path) as path:
        for number in (1, 2):
            work(path, request(start, number))
        site = desk.site
        known = site.state
        assert known.optimizer  # of the optimiser, after two rounds
        assert work(path, request(start, 1, body={**ORDER, "seed": "none"})).header["status"] == "failure"
        assert site.state is known


def test_its_state_is_told_while_it_works(model, start, tmp_path: Path) -> None:
    desk = OneModel(model, start)
    with served(desk, tmp_path) as path:
        desk.gate = threading.Event()
        worker = threading.Thread(target=work, args=(path, request(start, 1)))
        worker.start()
        while not (said := ask(path, Frame({"verb": "state"}), timeout_seconds=2).header)["works_on"]:
            pass
        assert said["works_on"] == "open"
        desk.gate.set()
        worker.join(20)


def test_a_state_that_cannot_be_written_takes_no_other_away(tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    """A full disk, or a kill, while round 2 is written again: rounds 1 to 3 are as they were."""
    for number in (1, 2, 3):
        save_after(tmp_path, number, SiteState(data={"steps": number}), keep=5)

    def full(path: Path, *rest: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "full", str(path))

    with monkeypatch.context() as patch, pytest.raises(RunFolderError, match="no space left"):
        patch.setattr("silotune.record.checkpoints.write_groups", full)
        save_after(tmp_path, 2, SiteState(data={"steps": 9}), keep=5)
    assert [load_before(tmp_path, number).data["steps"] for number in (2, 3, 4)] == [1, 2, 3]
    save_after(tmp_path, 2, SiteState(data={"steps": 9}), keep=5)
    assert load_newest(tmp_path).data == {"steps": 9} and load_before(tmp_path, 2).data == {"steps": 1}


def test_states_of_later_rounds_are_not_gone_on_from(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        save_after(tmp_path, number, SiteState(data={"steps": number}), keep=2)
    assert load_before(tmp_path, 5).data == {"steps": 4}
    assert load_before(tmp_path, 3).data == {"steps": 2}
    assert not (tmp_path / "1").exists()  # nobody can ask for what came after it again
    save_after(tmp_path, 3, SiteState(), keep=2)  # asked again, and now there is nothing to keep
    assert load_before(tmp_path, 5).data == {"steps": 2}
