"""The federated algorithms: their settings, and what is true of each.

A fact that an algorithm does not state counts as untrue, so that unsafe combinations are refused.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Momentum, PositiveNumber
from silotune.settings.registry import Choice, Table


class AlgorithmSettings(Choice):
    """What the server does with a round's update, and how clients correct their gradients.

    Attributes:
        linear: It uses nothing from the clients but the mean of their updates.
        summable: It uses updates only in their sum weighted by examples.
        keeps_product: The aggregate is the mean, and the server step adds it as it is.
        keeps_control: Its clients keep a control of every trained tensor.
        is_of_whole_updates: It sums updates without weights, so scaling late updates down would be wrong.
        needs_plain_steps: It is derived for plain steps of SGD.
        needs_no_momentum: It is derived for steps without momentum.
        shares_step: A round is one step of ``[training]``: clients send a batch's gradient, and the server takes it.
        is_of_server_alone: Clients train plainly and send updates alone; what is its own is the server's step.
        trusted: What clients send beside the update, which no robust rule checks; empty for nothing.
    """

    linear: ClassVar[bool] = False
    summable: ClassVar[bool] = False
    keeps_product: ClassVar[bool] = False
    keeps_control: ClassVar[bool] = False
    is_of_whole_updates: ClassVar[bool] = False
    needs_plain_steps: ClassVar[bool] = False
    needs_no_momentum: ClassVar[bool] = False
    shares_step: ClassVar[bool] = False
    is_of_server_alone: ClassVar[bool] = False
    trusted: ClassVar[str] = ""

    server_learning_rate: PositiveNumber = Field(1.0, description="the update is scaled by it")

    @property
    def sends_gradient(self) -> bool:
        """Whether clients send an exact gradient, of all their examples, beside the update."""
        return False


class FedAvg(AlgorithmSettings):
    """FedAvg (McMahan et al. 2017): the mean update is added."""

    type = "fedavg"
    linear = summable = keeps_product = is_of_server_alone = True


class FedProx(AlgorithmSettings):
    """FedProx (Li et al. 2020): FedAvg whose clients are pulled towards the received model."""

    type = "fedprox"
    linear = summable = keeps_product = True

    proximal_mu: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of the proximal term")


class Scaffold(AlgorithmSettings):
    """SCAFFOLD (Karimireddy et al. 2020): FedAvg whose clients' gradients are corrected by control variates."""

    type = "scaffold"
    keeps_control = needs_plain_steps = needs_no_momentum = True
    trusted = "controls"

    option: Literal["I", "II"] = Field(
        "II", description="a client's control is its gradient at the received model (I) or over its steps (II)"
    )

    @property
    def sends_gradient(self) -> bool:
        """Whether the option is I, with which the control is the gradient itself."""
        return self.option == "I"


class FedAvgM(AlgorithmSettings):
    """FedAvgM (Hsu et al. 2019): FedAvg with momentum at the server."""

    type = "fedavgm"
    linear = summable = is_of_server_alone = True

    server_momentum: Momentum = Field(0.9, description="share of the last step")


class AdaptiveSettings(AlgorithmSettings):
    """Adaptive server steps (Reddi et al. 2021): each value moves by about the learning rate in each step."""

    linear = summable = is_of_server_alone = True

    server_learning_rate: PositiveNumber = Field(0.01, description="about the length of a step in every value")
    server_beta1: Momentum = Field(0.9, description="decay of the mean update")
    server_tau: PositiveNumber = Field(1e-3, description="least divisor of a step")


class FedAdagrad(AdaptiveSettings):
    """FedAdagrad (Reddi et al. 2021): the server's step is Adagrad's."""

    type = "fedadagrad"


class FedYogi(AdaptiveSettings):
    """FedYogi (Reddi et al. 2021): the server's step is Yogi's."""

    type = "fedyogi"

    server_beta2: Momentum = Field(0.99, description="decay of the squared update")


class FedAdam(AdaptiveSettings):
    """FedAdam (Reddi et al. 2021): the server's step is Adam's, without correction of bias."""

    type = "fedadam"

    server_beta2: Momentum = Field(0.99, description="decay of the squared update")


class FedSgd(AlgorithmSettings):
    """FedSGD (McMahan et al. 2017): a gradient of each client a round, and the server takes the step of [training]."""

    type = "fedsgd"
    linear = summable = shares_step = True

    server_learning_rate: PositiveNumber = Field(1.0, description="training.learning_rate is multiplied by it")


class FedNova(AlgorithmSettings):
    """FedNova (Wang et al. 2020): FedAvg over updates that are normalised by local steps."""

    type = "fednova"
    needs_no_momentum = True
    trusted = "numbers of steps"


class FedDyn(AlgorithmSettings):
    """FedDyn (Acar et al. 2021): clients' losses are regularised so that all optima agree."""

    type = "feddyn"
    summable = keeps_control = is_of_whole_updates = True

    alpha: Annotated[float, Field(ge=0)] = Field(0.1, description="weight of the dynamic regulariser")


ALGORITHMS = Table(
    "federation.algorithm", FedAvg, FedProx, Scaffold, FedAvgM, FedAdagrad, FedYogi, FedAdam, FedNova, FedDyn, FedSgd
)
Algorithm = Annotated[SerializeAsAny[AlgorithmSettings], ALGORITHMS]
