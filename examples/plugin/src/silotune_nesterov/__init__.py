"""An algorithm of one's own for silotune: FedAvg with Nesterov's momentum at the server.

DiLoCo's outer step (Douillard et al. 2023, Algorithm 1): v <- m v + delta; weights + rate (delta + m v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from silotune.settings.algorithms import AlgorithmSettings
from silotune.settings.base import Momentum

if TYPE_CHECKING:
    from silotune.methods.aggregate import Rule
    from silotune.methods.algorithms import Method


class Nesterov(AlgorithmSettings):
    """FedAvg with Nesterov's momentum at the server (DiLoCo, Douillard et al. 2023)."""

    type = "nesterov"
    linear = summable = True  # it learns of the clients nothing but the mean of their updates

    server_momentum: Momentum = Field(0.9, description="share of the last step")

    @classmethod
    def implementation(cls) -> Callable[[Nesterov, Rule], Method]:
        """The builder of the method; torch is imported here, where it is needed."""
        from silotune_nesterov.step import method

        return method
