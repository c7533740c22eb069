"""How a spent privacy budget is shown beside a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def epsilon_text(spent: Mapping[str, Any] | None) -> str:
    """What a model cost in privacy, for people; ``-`` where nothing is promised, ``?`` where only the sites know."""
    if not spent:
        return "-"
    known = "?" if spent.get("epsilon") is None else f"{spent['epsilon']:.3g}"
    return f"{known} (delta {spent['delta']:g})"
