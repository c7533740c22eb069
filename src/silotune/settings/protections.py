"""What the coordinator may see of one update: the protections, their settings, and what is true of each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Positive, PositiveNumber
from silotune.settings.registry import Choice, Table


class ProtectionSettings(Choice):
    """How the updates of a round reach the coordinator.

    Attributes:
        is_sum: It sees their sum alone.
    """

    is_sum: ClassVar[bool] = False


class NoProtection(ProtectionSettings):
    """The coordinator sees each update."""

    type = "none"


class SumSettings(ProtectionSettings):
    """The coordinator sees the sum of the updates alone."""

    is_sum = True

    least_clients: Annotated[int, Field(ge=2)] = Field(3, description="a sum of fewer updates is never opened")
    bound: PositiveNumber = Field(
        1.0, description="largest magnitude of a value of an update; what is beyond is cut off, counted and reported"
    )
    max_examples: Positive = Field(65536, description="most examples that a client may hold: its largest weight")


class SecureSum(SumSettings):
    """Masks that cancel in the sum (Bonawitz et al. 2017)."""

    type = "secure_sum"

    threshold: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        2 / 3, description="more than this share of a round's clients must stay to its end"
    )
    ring_bits: Literal[16, 32, 64] = Field(32, description="bits a value; more are finer and larger")


class EncryptedSum(SumSettings):
    """Sums of BFV ciphertexts that the sites decrypt."""

    type = "he"

    packing: Literal[2, 3, 4] = Field(3, description="values a slot; more are smaller and coarser")


PROTECTIONS = Table("privacy.protection", NoProtection, SecureSum, EncryptedSum)
Protection = Annotated[SerializeAsAny[ProtectionSettings], PROTECTIONS]
