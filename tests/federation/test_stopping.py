"""Why a run stops early: the target is met, or another round would pass the budget."""

from __future__ import annotations

import pytest

from silotune.federation.coordinator.decisions import why_stop
from silotune.settings.sections import BudgetSection
from silotune.structs import ServerState


def state(total_bytes: int = 0, joules: float | None = 0.0, best: float | None = None) -> ServerState:
    return ServerState(1, {}, bytes_up=total_bytes, joules=joules, best_metric=best)


def why(before: ServerState, after: ServerState, target: float | None = None, **budget) -> str:
    return why_stop(before, after, target=target, budget=BudgetSection(**budget))


def test_without_limits_it_goes_on() -> None:
    assert why(state(), state(10**12, 1e12, 1.0)) == ""


@pytest.mark.parametrize(("best", "target", "stops"), [(0.79, 0.8, False), (0.8, 0.8, True), (-3.0, -2.9, False)])
def test_target(best: float, target: float, stops: bool) -> None:
    found = why(state(), state(best=best), target=target)
    assert bool(found) == stops
    assert not stops or found == "the selection metric reached evaluation.target = 0.8"


def test_a_budget_is_kept_and_not_passed() -> None:
    """100 bytes a round: 300 allow three rounds, 299 two."""
    assert why(state(100), state(200), bytes=300) == ""
    assert why(state(200), state(300), bytes=300).startswith("another round would pass federation.budget.bytes = 300")
    assert why(state(100), state(200), bytes=299) != ""
    assert why(state(joules=1.0), state(joules=2.0), joules=3.0) == ""
    assert "joules = 2.9: 2 are spent" in why(state(joules=1.0), state(joules=2.0), joules=2.9)


def test_a_run_whose_clients_stand_still_ends() -> None:
    found = why_stop(state(), state(), target=None, budget=BudgetSection(), is_still=True)
    assert found.startswith("no client's update moved the model: there is nothing left to learn")


def test_joules_that_are_not_known_stop_the_run() -> None:
    assert "not known" in why(state(joules=1.0), state(joules=None), joules=1e9)
    assert why(state(joules=1.0), state(joules=None)) == ""
