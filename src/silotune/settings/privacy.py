"""What ``[privacy]`` chooses: the promise about single records or institutions, and what is seen of one update."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from silotune.settings.base import Place, Positive, PositiveNumber
from silotune.settings.registry import Choice, Table

Accountant = Literal["pld", "rdp"]
Probability = Annotated[float, Field(gt=0, lt=1)]


class ClippingSettings(Choice):
    """The bound on a client's update."""


class Fixed(ClippingSettings):
    """The same bound in every round."""

    type = "fixed"


class Adaptive(ClippingSettings):
    """A bound that follows a quantile of the updates' norms (Andrew et al. 2021)."""

    type = "adaptive"

    quantile: Probability = Field(0.5, description="of the norms that it follows")
    learning_rate: PositiveNumber = Field(0.2, description="of the bound's logarithm")


CLIPPINGS = Table("privacy.dp.clipping", Fixed, Adaptive)
Clipping = Annotated[SerializeAsAny[ClippingSettings], CLIPPINGS]


class DpSettings(Choice):
    """What is promised.

    Attributes:
        is_promised: There is a guarantee.
        is_by_example: It protects single examples, by noise in every step of a site.
        is_at_site: The noise is added at the site, so that the server need not be trusted.
        is_on_sum: The noise is on the sum of updates.
        is_in_shares: Each site adds a share of the sum's noise.
        costs_sites: A site adds noise, its own or a share of a sum's, and so keeps a ledger of what it spends.
    """

    is_promised: ClassVar[bool] = True
    is_by_example: ClassVar[bool] = False
    is_at_site: ClassVar[bool] = False
    is_on_sum: ClassVar[bool] = False
    is_in_shares: ClassVar[bool] = False
    costs_sites: ClassVar[bool] = False


class NoGuarantee(DpSettings):
    """Nothing is promised."""

    type = "none"
    is_promised = False


class Guarantee(DpSettings):
    """A promise of differential privacy."""

    epsilon: PositiveNumber | None = Field(
        None, description="most that a run may cost; without noise_multiplier the noise is made to fit it"
    )
    delta: Probability = Field(1e-5, description="below 1 / examples, or 1 / clients")
    noise_multiplier: PositiveNumber | None = Field(
        None, description="standard deviation of the noise over the sensitivity; default: made to fit epsilon"
    )
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="bound on an example's gradient, or on a client's update; of adaptive clipping the first one"
    )
    accountant: Accountant = Field("pld", description="how epsilon is computed; rdp is faster and looser")
    ledger: Place | None = Field(
        None, description="folder in which sites keep what they spent over all runs; default: of this run only"
    )
    report_costs: bool = Field(
        False, description="let sites send seconds and joules, which the guarantee does not cover"
    )


class ByExample(Guarantee):
    """DP-SGD at each site (Abadi et al. 2016): single examples are protected."""

    type = "example"
    is_by_example = is_at_site = costs_sites = True


class ByClient(Guarantee):
    """Noise of the server on the sum of updates (McMahan et al. 2018): whole institutions are protected."""

    type = "client"
    is_on_sum = True

    clipping: Clipping = Field(Fixed(), description="the bound on a client's update")
    client_sampling: Literal["fixed", "poisson"] = Field(
        "fixed",
        description="poisson draws each client by itself, clients_per_round on average, and is counted as "
        "amplification; fixed is not",
    )


class Local(Guarantee):
    """Noise on each update before it leaves its site: whole institutions are protected, from the server too."""

    type = "local"
    is_at_site = costs_sites = True


class Distributed(Guarantee):
    """Each site adds a share of the sum's noise, within a secure sum (Kairouz et al. 2021)."""

    type = "distributed"
    is_on_sum = is_in_shares = costs_sites = True

    colluding: Annotated[int, Field(ge=0)] = Field(
        1, description="sites that may work with the coordinator; their shares of noise do not count"
    )


GUARANTEES = Table("privacy.dp", NoGuarantee, ByExample, ByClient, Local, Distributed)
DifferentialPrivacy = Annotated[SerializeAsAny[DpSettings], GUARANTEES]


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
