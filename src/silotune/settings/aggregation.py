"""How the updates of a round become one: the aggregation rules and the weightings, and what is true of each."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Positive, PositiveNumber
from silotune.settings.registry import Choice, Table


class AggregationSettings(Choice):
    """A rule that makes one update of all the updates of a round.

    Attributes:
        is_mean: It is the weighted mean, which needs no single update.
        counts_once: It counts every update once, as it was published, whatever its weight.
    """

    is_mean: ClassVar[bool] = False
    counts_once: ClassVar[bool] = False

    @property
    def least_updates(self) -> int:
        """Fewest updates of a round for which the rule's guarantee holds."""
        return 1


class Mean(AggregationSettings):
    """Weighted mean; it does not withstand malicious clients."""

    type = "mean"
    is_mean = True


class Median(AggregationSettings):
    """The middle of each value (Yin et al. 2018)."""

    type = "median"
    counts_once = True


class TrimmedMean(AggregationSettings):
    """For each value the mean without the smallest and largest (Yin et al. 2018)."""

    type = "trimmed-mean"
    counts_once = True

    trim: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.2, description="share left out on either side")


class NormBound(AggregationSettings):
    """Weighted mean of updates that are scaled down to a largest norm (Sun et al. 2019)."""

    type = "norm-bound"

    bound: PositiveNumber | None = Field(
        None, description="largest norm of an update; default: the median of the round's norms"
    )


class Krum(AggregationSettings):
    """The update that is closest to its neighbours (Blanchard et al. 2017)."""

    type = "krum"
    counts_once = True

    malicious: Annotated[int, Field(ge=0)] = Field(1, description="most malicious clients of a round")

    @property
    def least_updates(self) -> int:
        """2 f + 3."""
        return 2 * self.malicious + 3


class MultiKrum(Krum):
    """Mean of the updates that are closest to their neighbours; as many as may be malicious are left out."""

    type = "multi-krum"


class GeometricMedian(AggregationSettings):
    """The point with the least sum of distances to the updates (RFA, Pillutla et al. 2022)."""

    type = "geometric-median"


AGGREGATIONS = Table("federation.aggregation", Mean, Median, TrimmedMean, NormBound, Krum, MultiKrum, GeometricMedian)
Aggregation = Annotated[SerializeAsAny[AggregationSettings], AGGREGATIONS]


class WeightingSettings(Choice):
    """What an update counts in a weighted mean.

    Attributes:
        is_by_examples: It is the number of examples, as a protected sum counts it.
        needs_loss: It is made from the client's own loss.
        needs_sizes: The weight of an update depends on its number of examples.
    """

    is_by_examples: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    needs_sizes: ClassVar[bool] = True

    @property
    def largest(self) -> int | None:
        """The most that one update weighs; None where no bound is known."""
        return None


class ByExamples(WeightingSettings):
    """The client's number of examples (McMahan et al. 2017)."""

    type = "examples"
    is_by_examples = True


class Uniform(WeightingSettings):
    """Every client the same."""

    type = "uniform"
    needs_sizes = False

    @property
    def largest(self) -> int:
        """One."""
        return 1


class QFFL(WeightingSettings):
    """Examples times a power of the loss: a client that is served worse counts for more (q-FFL, Li et al. 2020)."""

    type = "q-ffl"
    needs_loss = True

    fairness_q: Annotated[float, Field(ge=0)] = Field(1.0, description="power of the loss; 0 is by examples")


class Capped(WeightingSettings):
    """Examples, up to a cap, which bounds the influence of one client (McMahan et al. 2018)."""

    type = "capped"

    cap: Positive = Field(description="most examples that count")

    @property
    def largest(self) -> int:
        """The cap."""
        return self.cap


WEIGHTINGS = Table("federation.weighting", ByExamples, Uniform, QFFL, Capped)
Weighting = Annotated[SerializeAsAny[WeightingSettings], WEIGHTINGS]
