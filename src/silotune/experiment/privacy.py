"""What a configuration promises and costs in privacy, by site and round, before anything is trained.

The same three lines say what a run kept; what it really spent is for ``experiment.spending`` to find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.config import Config
from silotune.data.mixture import load_examples
from silotune.experiment.budget import matched
from silotune.experiment.exposure import Exposed, sgd_warnings
from silotune.experiment.parts import Part
from silotune.experiment.prepare import client_shares
from silotune.federation.coordinator.privacy import CentralPrivacy, central_privacy, noise_in_shares
from silotune.federation.coordinator.protection import SEES, TRUSTED
from silotune.privacy.accountant import Spend, curve
from silotune.record.printable import counted
from silotune.settings.adapters import Lora
from silotune.settings.privacy import (
    ByClient,
    ByExample,
    Distributed,
    DpSettings,
    Guarantee,
    Local,
    NoGuarantee,
)
from silotune.settings.sections import PrivacySection
from silotune.training.release import release_of

CURVE_POINTS = 12
"""Rounds at which a curve is computed, at most: each takes a tenth of a second."""


@dataclass(frozen=True)
class Plan:
    """What a run of rounds is to cost.

    Attributes:
        privacy: The ``[privacy]`` section.
        rounds: Of the run.
        releases: What a round of each site releases; of client-level noise one entry, ``all``.
        sizes: Examples by client.
        points: Rounds of the curve.
        curves: Epsilon after these rounds, by the names of ``releases``.
    """

    privacy: PrivacySection
    rounds: int
    releases: Mapping[str, Spend]
    sizes: Mapping[str, int]
    points: Sequence[int]
    curves: Mapping[str, Sequence[float]]

    @property
    def epsilon(self) -> float:
        """The largest of any site after all rounds, within ``privacy.dp.epsilon``: what would pass it is refused."""
        largest = max(values[-1] for values in self.curves.values())
        return min(largest, self.privacy.guarantee.epsilon or largest)


def plan_of(config: Config, sizes: Mapping[str, int]) -> Plan | None:
    """The plan for clients with so many examples; None without differential privacy.

    None also for noise on single examples at sites whose numbers of examples are not known here: what it costs is for
    each site's own ledger to say.

    Raises:
        ConfigError: No noise keeps ``privacy.dp.epsilon``.
    """
    if not config.privacy.dp.is_promised or (config.privacy.dp.is_by_example and not any(sizes.values())):
        return None
    rounds = config.federation.rounds
    releases = (_of_sum if config.privacy.dp.is_on_sum else _of_sites)(config, sizes)
    points = _points(rounds)
    delta, accountant = config.privacy.guarantee.delta, config.privacy.guarantee.accountant
    known: dict[Spend, list[float]] = {}
    for spend in releases.values():
        if spend not in known:
            known[spend] = curve([spend], points, delta, accountant=accountant)
    curves = {name: known[spend] for name, spend in releases.items()}
    return Plan(config.privacy, rounds, releases, dict(sizes), points, curves)


def _of_sites(config: Config, sizes: Mapping[str, int]) -> dict[str, Spend]:
    rounds = config.federation.rounds
    by_size = {
        size: release_of(config.privacy, config.training, num_examples=size, rounds=rounds)
        for size in set(sizes.values())
    }
    return {name: by_size[size] for name, size in sizes.items()}


def _of_sum(config: Config, sizes: Mapping[str, int]) -> dict[str, Spend]:
    return {"all": central_privacy(config.privacy, config.federation, sizes, run="").release}


def _points(rounds: int) -> list[int]:
    steps = min(rounds, CURVE_POINTS)
    return sorted({round((place + 1) * rounds / steps) for place in range(steps)})


def plan_of_config(config: Config) -> Plan | None:
    """The plan of a configuration; its data are read, its model is not loaded."""
    dataset = load_examples(config.data, seed=config.seed)
    sizes = {name: len(share) for name, share in client_shares(config, dataset).items()}
    return plan_of(matched(config, tuple(sizes.values())), sizes)


def central_of(config: Config, part: Part, run: str) -> CentralPrivacy | None:
    """Noise on the sums of a part of a run and its account; None where the sites add noise each for itself."""
    if not config.privacy.dp.is_on_sum:
        return None
    sizes = {name: len(examples) for name, examples in part.clients.items()}
    return central_privacy(config.privacy, config.federation, sizes, run=run)


def collected(config: Config, part: Part) -> PrivacySection:
    """The section as the collector of a part's updates needs it: of noise in shares, how much and for what weights."""
    privacy, federation = config.privacy, config.federation
    if not privacy.dp.is_in_shares:
        return privacy
    clients = federation.clients_per_round or len(part.clients)
    release = noise_in_shares(privacy, clients, federation.rounds)
    most = federation.weighting.largest or 1
    dp = privacy.dp.model_copy(update={"noise_multiplier": release.noise_multiplier})
    protection = privacy.protection.model_copy(update={"max_examples": most})
    return privacy.model_copy(update={"dp": dp, "protection": protection})


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan for files and for ``--json``."""
    return {
        "dp": plan.privacy.dp.type,
        "delta": plan.privacy.guarantee.delta,
        "rounds": plan.rounds,
        "epsilon": plan.epsilon,
        "accountant": plan.privacy.guarantee.accountant,
        "clip_norm": plan.privacy.guarantee.clip_norm,
        "points": list(plan.points),
        "sites": {
            name: {
                "num_examples": plan.sizes.get(name),
                "sampling_rate": spend.sampling_rate,
                "steps_per_round": spend.steps,
                "noise_multiplier": spend.noise_multiplier,
                "epsilon": list(plan.curves[name])[-1],
                "curve": list(plan.curves[name]),
            }
            for name, spend in plan.releases.items()
        },
    }


def statement(privacy: PrivacySection, plan: Plan | None) -> list[str]:
    """What is to be promised, in three lines: what the server sees, what is protected, who is trusted.

    Args:
        privacy: The ``[privacy]`` section.
        plan: What it is to cost; None where that is for each site's ledger to say.
    """
    if plan is not None:
        return _lines(privacy, f"{plan.epsilon:.3g} (planned)", plan.rounds)
    most = privacy.dp.epsilon if isinstance(privacy.dp, Guarantee) else None
    capped = None if most is None else f"{most:.3g} at most (planned)"
    return _lines(privacy, capped or _UNKNOWN, "all")


def achieved(privacy: PrivacySection, result: Mapping[str, Any]) -> list[str]:
    """What a part of a run kept, in the same three lines, from what was spent.

    Args:
        privacy: The ``[privacy]`` section.
        result: The part's ``result.json``.
    """
    return _lines(privacy, spent_text(result.get("privacy") or {}), result["rounds"])


def spent_text(spent: Mapping[str, Any]) -> str:
    """The epsilon of a result in words, with the planned one beside it where they differ."""
    known, planned = (f"{spent[name]:.3g}" if spent.get(name) is not None else "" for name in ("epsilon", "planned"))
    return (known or _UNKNOWN) + (f" (planned: {planned})" if planned and planned != known else "")


_UNKNOWN = "what its institution's ledger says"


def _lines(privacy: PrivacySection, epsilon: str, rounds: int | str) -> list[str]:
    sees, protected, trusted = _STATEMENTS[type(privacy.dp)]
    if privacy.protection.is_sum:
        added = "; noise was added at the institutions" if privacy.dp.is_promised else ""
        sees = f"in a round {SEES[type(privacy.protection)]}{added}"
    if not privacy.dp.is_promised:
        what = "the sum, and the model made from it," if privacy.protection.is_sum else "an update"
        return [sees, protected.format(what=what), f"trusted: {TRUSTED[type(privacy.protection)]}"]
    over = counted(rounds, "round") if isinstance(rounds, int) else f"{rounds} rounds"
    figures = {"epsilon": epsilon, "delta": f"{privacy.guarantee.delta:g}", "rounds": over}
    if isinstance(privacy.dp, Distributed):
        figures["colluding"] = str(privacy.dp.colluding)
    return [sees, protected.format(**figures), trusted]


_STATEMENTS: Mapping[type[DpSettings], tuple[str, str, str]] = {
    NoGuarantee: (
        "the server sees every institution's update in the clear, its number of examples and its loss",
        "no record is protected: {what} can give away what it was trained on",
        "",
    ),
    ByExample: (
        "the server sees every institution's update, noised, and its number of examples; losses are withheld",
        "a record is protected with epsilon = {epsilon} at delta = {delta} over {rounds}, from the server too",
        "trusted: each institution with its own records; not the server, not the others",
    ),
    ByClient: (
        "the server sees every institution's update in the clear; models carry the noise",
        "an institution's whole data are protected with epsilon = {epsilon} at delta = {delta} over {rounds}, "
        "from whoever gets a model",
        "trusted: the server, to clip, to add noise and to keep updates to itself",
    ),
    Local: (
        "the server sees every institution's update, clipped and noised, and its number of examples",
        "an institution's whole data are protected with epsilon = {epsilon} at delta = {delta} over {rounds}, "
        "from the server as well",
        "trusted: each institution with its own data; not the server, not the others",
    ),
    Distributed: (
        "the server sees the sum of the institutions' updates, noised",
        "an institution's whole data are protected with epsilon = {epsilon} at delta = {delta} over {rounds}, "
        "from the server as well and from up to {colluding} others that work with it",
        "trusted: the other institutions, to add their shares of the noise; not the server",
    ),
}


def warnings(config: Config, sizes: Mapping[str, int], *, exposed: Exposed | None = None) -> list[str]:
    """What a guarantee's reader should know or change, one line each.

    Args:
        config: The whole configuration.
        sizes: Examples by client.
        exposed: What updates show of what the model reads, where the adapter is known.
    """
    if not config.privacy.dp.is_promised:
        return sgd_warnings(config, exposed)
    return _dp_warnings(config, sizes)


def _dp_warnings(config: Config, sizes: Mapping[str, int]) -> list[str]:
    privacy = config.privacy
    made: list[str] = []
    units = max(sizes.values()) if privacy.dp.is_by_example else len(sizes)
    unit = "examples of the largest client" if privacy.dp.is_by_example else "clients"
    if privacy.guarantee.delta * units >= 1:
        made.append(
            f"privacy.dp.delta = {privacy.guarantee.delta:g} is not below 1 / {units} ({unit}): it could give one away "
            "whole"
        )
    if isinstance(config.adapter, Lora) and config.federation.lora.is_plain:
        made.append(
            "noise on both LoRA factors multiplies: their product carries noise times noise; "
            "federation.lora = 'freeze-a' (Sun et al. 2024) loses less accuracy at the same epsilon, 'sb' less still"
        )
    if not privacy.dp.is_by_example and len(sizes) < 20:
        made.append(
            f"privacy.dp = {privacy.dp.type!r} hides one of {len(sizes)} institutions: with so few the noise outweighs "
            "what they have in common; privacy.dp = 'example' protects records at a fraction of it"
        )
    return made
