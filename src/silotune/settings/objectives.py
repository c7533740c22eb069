"""What a client learns from its examples, and by which optimiser: settings, and what is true of each choice."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Momentum, PositiveNumber
from silotune.settings.registry import Choice, Table


class ObjectiveSettings(Choice):
    """What a local round minimises.

    Attributes:
        learns_from: Kinds of answer that it learns from: ``text``, ``options``, ``preference``, ``document``.
        has_head: It trains a head for classes, and writes no text.
        compares: It compares with the model that training began with.
        is_by_example: Its loss is a sum over examples, each term a function of its example alone.
        needs_several: It compares the examples of a batch with each other.
    """

    learns_from: ClassVar[tuple[str, ...]] = ()
    has_head: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    is_by_example: ClassVar[bool] = False
    needs_several: ClassVar[bool] = False

    @property
    def packs(self) -> bool:
        """Whether several examples stand in one row."""
        return False


class LanguageSettings(ObjectiveSettings):
    """Cross-entropy of tokens."""

    packing: bool = Field(False, description="put short examples into one row, each by itself")

    @property
    def packs(self) -> bool:
        """The value of ``packing``."""
        return self.packing


class Sft(LanguageSettings):
    """Supervised fine-tuning: the tokens of the answer."""

    type = "sft"
    learns_from = ("text", "options", "preference")
    is_by_example = True

    turns: Literal["all", "last"] = Field("all", description="which of an assistant's turns in a chat are learnt")


class ClosedSettings(ObjectiveSettings):
    """Cross-entropy over a closed set of answers."""

    learns_from = ("options",)
    is_by_example = True

    logit_adjustment: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="strength at which the logarithm of a client's own shares of the answers is added to their scores "
        "in training alone (Menon et al. 2021), so that clients with other shares learn the same function; 0 for none",
    )


class SoftmaxOverOptions(ClosedSettings):
    """Softmax over the options, each scored by the likelihood of its tokens."""

    type = "choice"


class Classify(ClosedSettings):
    """A head for classes on the model."""

    type = "classify"
    has_head = True

    wording: Literal["auto", "prompt", "text"] = Field(
        "auto", description="the whole prompt, or the row's text alone; auto: text for an encoder"
    )


class ComparingSettings(ObjectiveSettings):
    """Answers that are preferred, by how much more likely they became since training began."""

    learns_from = ("preference",)
    compares = True

    beta: PositiveNumber = Field(0.1, description="how strongly the model is held to where training began")


class Dpo(ComparingSettings):
    """Pairs of answers (DPO, Rafailov et al. 2023)."""

    type = "dpo"
    is_by_example = True

    preference_loss: Literal["sigmoid", "robust", "ipo"] = Field(
        "sigmoid", description="sigmoid (smoothed by label_smoothing), robust (Chowdhury 2024), ipo (Azar 2023)"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="of sigmoid and robust: share of pairs that may be the wrong way round"
    )


class Kto(ComparingSettings):
    """Answers that are wanted or not (KTO, Ethayarajh et al. 2024)."""

    type = "kto"
    needs_several = True

    desirable_weight: PositiveNumber = Field(1.0, description="of answers that are wanted")
    undesirable_weight: PositiveNumber = Field(1.0, description="of answers that are not")


class Pretrain(LanguageSettings):
    """All tokens of plain text."""

    type = "pretrain"
    learns_from = ("document",)


OBJECTIVES = Table("training.objective", Sft, SoftmaxOverOptions, Classify, Dpo, Kto, Pretrain)
Objective = Annotated[SerializeAsAny[ObjectiveSettings], OBJECTIVES]


class OptimizerSettings(Choice):
    """The optimiser of the local steps.

    Attributes:
        is_plain: A step is the gradient times the learning rate, apart from momentum.
        bytes_a_value: Memory for a trained float32 value: itself, its gradient, and the optimiser's moments.
    """

    is_plain: ClassVar[bool] = False
    bytes_a_value: ClassVar[int] = 16

    @property
    def keeps_momentum(self) -> bool:
        """Whether a step also contains a share of the last step."""
        return False


class AdamW(OptimizerSettings):
    """AdamW (Loshchilov and Hutter 2019)."""

    type = "adamw"


class Sgd(OptimizerSettings):
    """Plain steps against the gradient."""

    type = "sgd"
    is_plain = True
    bytes_a_value = 12

    momentum: Momentum = Field(0.0, description="share of the last step")

    @property
    def keeps_momentum(self) -> bool:
        """Whether the momentum is above 0."""
        return self.momentum > 0


OPTIMIZERS = Table("training.optimizer", AdamW, Sgd)
Optimizer = Annotated[SerializeAsAny[OptimizerSettings], OPTIMIZERS]
