"""What becomes of a round with too few replies, where waiting cannot help."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from silotune.errors import BudgetError, FederationError
from silotune.federation.coordinator.decisions import MOST_TRIES, SHORTFALLS, TooFewRepliesError
from silotune.structs import BUDGET, Failure


def short(*failures: Failure) -> TooFewRepliesError:
    return TooFewRepliesError("2 usable replies of 3", SimpleNamespace(failures=list(failures)))


@pytest.mark.parametrize(
    "refused",
    [Failure("b", 3, BUDGET, "above 4"), Failure("b", 3, "train", "above 4", rule="largest_epsilon_total")],
)
def test_nobody_waits_for_a_client_whose_budget_is_spent(refused: Failure) -> None:
    """Every try would cost the others a round of theirs."""
    away = Failure("a", 3, "transport", "no reply")
    with pytest.raises(
        BudgetError, match="round 3 waits in vain for 'b', whose privacy budget does not allow it: above"
    ):
        SHORTFALLS["wait"](short(away, refused), 3, 1, lambda event, fields: None)
    assert SHORTFALLS["skip"](short(away, refused), 3, 1, lambda event, fields: None)


def test_a_round_is_tried_so_often() -> None:
    said = []
    error = short(Failure("a", 3, "transport", "no reply"))
    assert not SHORTFALLS["wait"](error, 3, 1, lambda event, fields: said.append((event, fields["tries"])))
    assert said == [("round_waits", 1)]
    with pytest.raises(FederationError, match=f"round 3 was tried {MOST_TRIES} times: 2 usable replies of 3"):
        SHORTFALLS["wait"](error, 3, MOST_TRIES, lambda event, fields: None)
