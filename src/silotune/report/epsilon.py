"""How a spent privacy budget is shown beside a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def epsilon_text(spent: Mapping[str, Any] | None) -> str:
    """What a model cost in privacy, for people; ``-`` where nothing is promised."""
    if not spent or spent.get("epsilon") is None:
        return "-"
    return f"{spent['epsilon']:.3g} (delta {spent['delta']:g})"
