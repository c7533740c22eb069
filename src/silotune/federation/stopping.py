"""Why a run of rounds ends before its last one, patience apart."""

from __future__ import annotations

from silotune.settings.sections import BudgetSection
from silotune.structs import ServerState


def why_stop(before: ServerState, after: ServerState, *, target: float | None, budget: BudgetSection) -> str:
    """Why the run stops after a round; empty where it goes on.

    A budget is kept, not passed: the run stops when another round like this one would pass it. Only the first round
    is not known beforehand.

    Args:
        before: The state before the round.
        after: The state after it.
        target: Selection metric that is good enough, the higher the better; None for none.
        budget: What the rounds may spend.
    """
    if target is not None and after.best_metric is not None and after.best_metric >= target:
        return f"the selection metric reached evaluation.target = {abs(target):g}"
    spent, before_it = after.bytes_up + after.bytes_down, before.bytes_up + before.bytes_down
    if budget.bytes is not None and 2 * spent - before_it > budget.bytes:
        return f"another round would pass federation.budget.bytes = {budget.bytes}: {spent} are spent"
    if budget.joules is None:
        return ""
    if after.joules is None or before.joules is None:
        return "a client's joules are not known, so federation.budget.joules cannot be kept"
    if 2 * after.joules - before.joules > budget.joules:
        return f"another round would pass federation.budget.joules = {budget.joules:g}: {after.joules:.0f} are spent"
    return ""
