"""Which of LoRA's factors travel and are averaged, clients' own models, and what is true of each choice."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, SerializeAsAny

from silotune.settings.registry import Choice, Table


class LoraRuleSettings(Choice):
    """A rule for LoRA's two factors.

    Attributes:
        is_plain: It treats the factors as any other tensors, and needs no adapter of a certain kind.
        keeps_product: It puts the mean of the clients' products into the model, for which it needs each product.
        sends_all: All that is trained travels in every round.
        moves: From one round to the next, a tensor's name may stand for other factors, or for none.
        grows: Its model has residuals beside the factors.
        keeps_own_b: Every client has a model of its own.
        has_core: The factors are fixed, and a matrix between them is trained.
        goes_with_noise: Noise may be added to everything that it sends.
        needs_start: Sites need the adapter that training began with also after the first round.
    """

    is_plain: ClassVar[bool] = False
    keeps_product: ClassVar[bool] = False
    sends_all: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    keeps_own_b: ClassVar[bool] = False
    has_core: ClassVar[bool] = False
    goes_with_noise: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True


class Factors(LoraRuleSettings):
    """Both factors, each averaged by itself: plain averaging."""

    type = "factors"
    is_plain = sends_all = goes_with_noise = True
    needs_start = False


class ExactResidual(LoraRuleSettings):
    """What averaging the factors loses of the mean product is kept as a residual (FedEx-LoRA, Singhal et al. 2025)."""

    type = "exact-residual"
    keeps_product = grows = True


class Stack(LoraRuleSettings):
    """The mean product goes into a residual, and factors begin afresh (FLoRA, Wang et al. 2024)."""

    type = "stack"
    keeps_product = moves = grows = True


class Svd(LoraRuleSettings):
    """The factors of the mean product's largest singular values (FlexLoRA, Bai et al. 2024)."""

    type = "svd"
    keeps_product = moves = True


class FreezeA(LoraRuleSettings):
    """A is fixed, B is trained and averaged (FFA-LoRA, Sun et al. 2024)."""

    type = "freeze-a"
    goes_with_noise = True


class Alternate(LoraRuleSettings):
    """B is trained in odd rounds and A in even ones (RoLoRA, Chen et al. 2025)."""

    type = "alternate"
    moves = goes_with_noise = True


class ShareA(LoraRuleSettings):
    """A is averaged; each client keeps its own B (FedSA-LoRA, Guo et al. 2025)."""

    type = "share-a"
    keeps_own_b = True


class SmallCore(LoraRuleSettings):
    """Both factors are fixed, and a small matrix between them is trained (Fed-SB, Singhal et al. 2025)."""

    type = "sb"
    sends_all = has_core = goes_with_noise = True


LORA_RULES = Table("federation.lora", Factors, ExactResidual, Stack, Svd, FreezeA, Alternate, ShareA, SmallCore)
LoraRule = Annotated[SerializeAsAny[LoraRuleSettings], LORA_RULES]


class PersonalizationSettings(Choice):
    """Whether each client has a model of its own, and how that is made.

    Attributes:
        makes_models: Every client has one.
        is_pulled: It is trained in every round, and pulled towards the global model's factors.
        comes_after: It is made from the global model after the last round.
    """

    makes_models: ClassVar[bool] = True
    is_pulled: ClassVar[bool] = False
    comes_after: ClassVar[bool] = False


class NoModels(PersonalizationSettings):
    """The global model alone."""

    type = "none"
    makes_models = False


class Ditto(PersonalizationSettings):
    """A model beside the global one, pulled towards it (Ditto, Li et al. 2021)."""

    type = "ditto"
    is_pulled = True

    pull: Annotated[float, Field(ge=0)] = Field(0.1, description="weight of the pull to the global model")


class FineTune(PersonalizationSettings):
    """A local round from the global model after the last round."""

    type = "fine-tune"
    comes_after = True


PERSONALIZATIONS = Table("federation.personalization", NoModels, Ditto, FineTune)
Personalization = Annotated[SerializeAsAny[PersonalizationSettings], PERSONALIZATIONS]
