"""The fuzzer of the receivers for some seconds; ``make fuzz`` does so for minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from attacks.fuzz import fuzz_coordinator, fuzz_site
from attacks.hostile import Coordinator, House, configuration

pytestmark = pytest.mark.end_to_end

SECONDS = 8.0


def test_a_site_answers_whatever_comes_with_a_reply_or_a_recorded_refusal(tmp_path: Path, tiny_folder: Path) -> None:
    house = House(tmp_path, tiny_folder, policy="most_steps = 20\nmost_seconds = 10\nmost_models = 1000000")
    first = Coordinator(house, configuration(tiny_folder), run="first", number="f" * 32)
    assert first.send(first.request()).header["status"] == "reply"
    house.watch.seen.clear()
    found = fuzz_site(house, tiny_folder, seconds=SECONDS, seed=1)
    assert found.messages > 20 and found.outcomes["reply"] and len(found.outcomes) > 3


def test_a_coordinator_believes_a_reply_or_has_the_failure_of_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.transports.flower.POLL_SECONDS", 0.0)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    found = fuzz_coordinator(seconds=SECONDS / 2, seed=1)
    assert found.messages > 20 and found.outcomes["believed"] and found.outcomes["refused (reply)"]
