"""The small part that is trained and sent: the kinds of adapter, their settings, and what is true of each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Positive, PositiveNumber
from silotune.settings.registry import Choice, Table


class AdapterSettings(Choice):
    """What is trained and sent.

    Attributes:
        is_whole: All weights of the model are trained, without a separate adapter.
        needs_int4: It is for a base whose weights take four bits.
    """

    is_whole: ClassVar[bool] = False
    needs_int4: ClassVar[bool] = False

    @property
    def begins_from(self) -> str | None:
        """The run folder or adapter whose tensors training goes on from."""
        return None

    @property
    def has_factors(self) -> bool:
        """Whether it has the two factors of a low-rank product, which the rules for LoRA's factors need."""
        return False

    @property
    def draws(self) -> bool:
        """Whether a training step draws random numbers for it."""
        return False

    def without_start(self) -> AdapterSettings:
        """The same without the place that training goes on from."""
        return self

    def on_whole_weights(self) -> AdapterSettings:
        """The same for a base whose weights are no longer quantised."""
        return self


class PeftSettings(AdapterSettings):
    """An adapter on some of the model's modules."""

    targets: Literal["auto", "all-linear"] | tuple[str, ...] = Field(
        "auto", description="'auto' (peft's map for the architecture), 'all-linear', or module names"
    )
    start: str | None = Field(
        None, description="run folder (or RUN/centralized), or exported adapter, whose adapter training goes on from"
    )

    @property
    def begins_from(self) -> str | None:
        """The value of ``start``."""
        return self.start

    def without_start(self) -> AdapterSettings:
        """The same with ``start`` left out."""
        return self.model_copy(update={"start": None})


class Lora(PeftSettings):
    """Low-rank adaptation (LoRA, Hu et al. 2021)."""

    type = "lora"

    rank: Positive = Field(8, description="of both factors")
    alpha: PositiveNumber = Field(16, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of an adapted layer's inputs left out")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), Kalajdzievski 2023")
    dora: bool = Field(False, description="weight-decomposed LoRA, Liu et al. 2024")

    @property
    def has_factors(self) -> bool:
        """Whether it is not DoRA, which also trains magnitudes beside the factors."""
        return not self.dora

    @property
    def draws(self) -> bool:
        """Whether there is dropout."""
        return self.dropout > 0


class QLora(Lora):
    """LoRA on an int4 base (QLoRA, Dettmers et al. 2023)."""

    type = "qlora"
    needs_int4 = True

    def on_whole_weights(self) -> AdapterSettings:
        """Plain LoRA with the same settings."""
        return Lora(**{name: getattr(self, name) for name in Lora.model_fields})


class IA3(PeftSettings):
    """A factor for each output of some layers (IA3, Liu et al. 2022)."""

    type = "ia3"


class AllWeights(AdapterSettings):
    """No adapter: all weights are trained."""

    type = "none"
    is_whole = True


ADAPTERS = Table("adapter", Lora, QLora, IA3, AllWeights)
Adapter = Annotated[SerializeAsAny[AdapterSettings], ADAPTERS]
