"""The site policy: what a data holder allows, whatever a coordinator asks. It refuses when in doubt.

``policy.toml`` belongs to the site and lies outside every job. If the file is missing, broken or holds an unknown key,
everything is refused; a rule refuses, too, if the fact that it needs is not known. Rules are functions in four
tables, under the name of their key: rules about what is asked, which are checked before the site opens anything of its
own; rules about what serving it would cost; and rules about its privacy loss, which takes long to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from silotune.config import read_toml, validated
from silotune.errors import ConfigError, PolicyError, SignatureError, unknown_choice
from silotune.federation.kinds import Kind, kind_named
from silotune.federation.wire.signed_job import Sha256
from silotune.record.signatures import normal_public
from silotune.settings.base import PositiveNumber, Section
from silotune.settings.objectives import OBJECTIVES

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


COUNTS = ("num_examples", "support", "confusion")
"""Names of figures that count examples, wherever they stand in a reply's body."""
RATES = (
    "accuracy", "macro_f1", "unparsed", "ece", "preference_accuracy", "start_accuracy", "gain", "win_rate",
    "accuracy_interval", "macro_f1_interval", "preference_accuracy_interval", "gain_interval", "win_rate_interval",
    "auc", "auc_interval", "advantage",
)  # fmt: skip
"""Figures that are a share of the examples, or made of such shares."""
BY_CLASS = ("per_class", "confusion", "reliability", "by_task")
"""Figures about parts of the examples: anyone could compute the counts in one of them from another."""


FIGURES = (*RATES, *BY_CLASS, "loss", "loss_interval", "perplexity", "perplexity_interval", "margin", "epsilon")
"""All figures that a reply may hold, besides what an aggregate or the accounts need."""
_Count = Annotated[int, Field(ge=1, strict=True)]
_CountOrZero = Annotated[int, Field(ge=0, strict=True)]


def _checked_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name!r} is not a time zone, such as 'Europe/Madrid' or 'UTC'") from None
    return name


def _checked_key(line: str) -> str:
    try:
        return normal_public(line)
    except SignatureError as error:
        raise ValueError(str(error)) from None


def _checked_time(value: Any) -> Any:
    """Refuses a number as a time of day, which pydantic would accept."""
    if not isinstance(value, time) and not (isinstance(value, str) and ":" in value):
        raise ValueError(f"{value!r} is not a time of day, such as '08:00'")
    return value


def _checked_figure(name: str) -> str:
    if name not in FIGURES:
        raise ValueError(f"metrics: {unknown_choice('figure', name, FIGURES)}")
    return name


_Clock = Annotated[time, BeforeValidator(_checked_time)]


class WorkingHours(Section):
    """When requests are served, by the site's clock."""

    begin: _Clock
    end: _Clock
    days: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri")
    zone: Annotated[str, AfterValidator(_checked_zone)] = "UTC"

    @model_validator(mode="after")
    def _are_some(self) -> WorkingHours:
        faults = []
        if self.begin.tzinfo or self.end.tzinfo:
            faults.append("working_hours: begin and end are times of the zone and name none of their own")
        elif self.begin == self.end:
            faults.append("working_hours: begin and end are the same, so that nothing is ever served")
        if not self.days:
            faults.append("working_hours.days = []: nothing is ever served; name days, or leave it out")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def holds(self, now: datetime) -> bool:
        """True within the hours; hours that pass midnight belong to the day on which they begin."""
        local = now.astimezone(ZoneInfo(self.zone))
        clock, today = local.time(), _DAYS[local.weekday()]
        if self.begin <= self.end:
            return today in self.days and self.begin <= clock < self.end
        yesterday = _DAYS[local.weekday() - 1]
        return (today in self.days and clock >= self.begin) or (yesterday in self.days and clock < self.end)


ObjectiveName = Annotated[str, AfterValidator(OBJECTIVES.named)]
"""A name of `training.objective`."""


class Policy(Section):
    """``policy.toml``; a key that is left out restricts nothing, unless it has a default value here."""

    format: Annotated[int, Field(ge=1, le=1, strict=True)] = 1
    base_models: tuple[Sha256, ...] | None = Field(None, description="fingerprints of base models that may be tuned")
    tasks: tuple[str, ...] | None = Field(None, description="tasks that may be learnt")
    objectives: tuple[ObjectiveName, ...] | None = Field(None, description="objectives that may be trained with")
    smallest_adapter: _Count | None = Field(None, description="fewest values of an adapter")
    largest_adapter: _Count | None = Field(None, description="most values of an adapter")
    least_participants: _Count | None = Field(None, description="fewest sites of a run, this one counted in")
    least_cohort: _Count | None = Field(None, description="fewest sites of a sum that an update goes into")
    secure_aggregation: bool = Field(
        False,
        strict=True,
        description="true: no update leaves but inside a protected sum (secure_sum, or he of all values)",
    )
    plain_gradients: bool = Field(
        True,
        strict=True,
        description="false: no plain gradient leaves without noise of this site's, as words can be read off it exactly",
    )
    least_threshold: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        2 / 3, description="least share of a secure sum's sites that must stay to its end"
    )
    least_colluding: _CountOrZero | None = Field(
        None, description="sites without whose shares a sum's noise must be enough: they may work with the coordinator"
    )
    largest_epsilon_run: Annotated[float, Field(ge=0)] | None = Field(None, description="privacy loss of one run")
    largest_epsilon_total: Annotated[float, Field(ge=0)] | None = Field(None, description="of all runs together")
    delta: Annotated[float, Field(gt=0, le=0.01)] = Field(
        1e-5, description="at which these two are counted, whatever a run says: below 1 / your examples"
    )
    largest_upload_bytes: _Count | None = Field(None, description="most bytes of one reply")
    metrics: tuple[Annotated[str, AfterValidator(_checked_figure)], ...] | None = Field(
        None, description="figures that may leave; others are withheld"
    )
    smallest_count: _CountOrZero = Field(0, description="figures that count fewer examples stay here")
    working_hours: WorkingHours | None = None
    submitters: tuple[Annotated[str, AfterValidator(_checked_key)], ...] | None = Field(
        None, description="public keys of those who may submit runs"
    )
    generation: bool = Field(False, strict=True, description="true: text may be generated from the site's prompts")
    most_models: _Count = Field(
        2, description="different models that a round may be trained with: one, and one more after a crash"
    )
    most_scorings: _CountOrZero = Field(
        1, description="different models of a run that may be scored on the site's examples"
    )
    most_steps: _Count = Field(100_000, description="optimiser steps of one round")
    most_seconds: PositiveNumber = Field(86400.0, description="of one round or scoring; then it is broken off")
    leakage_audit: Literal["optional", "required"] = Field(
        "optional",
        description="required: runs must set audit.leakage, and no end of a run is signed whose model was not measured "
        "on this site's examples",
    )
    largest_membership_advantage: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="most that a model may give away of who was trained on, 2 AUC - 1 at the upper end of its "
        "interval: above it the site trains no more for the run and does not sign its end",
    )
    charter: Sha256 | None = Field(None, description="SHA-256 of the charter that a run must name")
    plugins: tuple[str, ...] = Field((), description="packages whose plug-ins a run may use; no others are imported")

    @model_validator(mode="after")
    def _can_be_met(self) -> Policy:
        """Refuses rules that no request can ever satisfy, because their owner must have meant something else."""
        faults = [
            f"{name} = []: nothing is ever allowed; name at least one, or leave it out"
            for name in ("base_models", "tasks", "objectives", "submitters")
            if getattr(self, name) == ()
        ]
        for low, high in (("smallest_adapter", "largest_adapter"), ("largest_epsilon_run", "largest_epsilon_total")):
            less, more = getattr(self, low), getattr(self, high)
            if less is not None and more is not None and less > more:
                faults.append(f"{low} = {less:g} is above {high} = {more:g}")
        if faults:
            raise ValueError("\n".join(faults))
        return self


@dataclass(frozen=True)
class Asked:
    """What a request asks, as far as the site knows; None for what it does not know.

    Attributes:
        kind: Of the request.
        now: The site's clock.
        tasks: What is to be learnt, all of it.
        objective: What is to be trained with; None where nothing is trained.
        base_sha256: Fingerprint of the base model that the site holds.
        adapter_values: Values in the adapter's tensors.
        participants: Sites that the job names, or fewer where a sum is to be over fewer.
        cohort: Number of sites that are left in the protected sum that the request belongs to, as the request says.
        threshold: Share of a secure sum's sites that must stay to its end; None where no sum begins.
        colluding: Sites whose shares of a sum's noise do not count; None where no sum with noise begins.
        shows_gradients: The update is plain gradient steps, and this site adds no noise to it.
        generates: Text is to be written from the site's prompts.
        steps: Optimiser steps of the round; None where nothing is trained.
        epsilon_run: Privacy loss of this run at this site once the request is served; None where nothing bounds it.
        epsilon_total: The same for all runs of the site.
        audits_leakage: The run measures what its final model gives away at this site.
        leaked: Membership advantage of the model of the run that was measured last; None where none was.
        submitter: Public key whose signature of the job was checked.
        charter_sha256: Of the charter that the job names.
        charter_until: Last day of that charter; None where the site does not hold it.
    """

    kind: str
    now: datetime
    tasks: tuple[str, ...] = ()
    objective: str | None = None
    base_sha256: str | None = None
    adapter_values: int | None = None
    participants: int | None = None
    cohort: int | None = None
    threshold: float | None = None
    colluding: int | None = None
    shows_gradients: bool = False
    generates: bool = False
    steps: int | None = None
    epsilon_run: float | None = None
    epsilon_total: float | None = None
    audits_leakage: bool = False
    leaked: float | None = None
    submitter: str | None = None
    charter_sha256: str | None = None
    charter_until: date | None = None

    @property
    def does(self) -> Kind:
        """What a request of this kind does."""
        return kind_named(self.kind)


_Rule = Callable[[Policy, Asked], "str | None"]


def _one_of(what: str, given: str | None, allowed: tuple[str, ...] | None) -> str | None:
    if allowed is None or given in allowed:
        return None
    return f"{what} {given!r} is not among those allowed" if given else f"{what} is not known"


def _at_most(what: str, given: float | None, limit: float | None) -> str | None:
    if limit is None or (given is not None and given <= limit):
        return None
    return f"{what} is {given:g}, at most {limit:g} is allowed" if given is not None else f"{what} is not known"


def _at_least(what: str, given: float | None, limit: float | None) -> str | None:
    if limit is None or (given is not None and given >= limit):
        return None
    return f"{what} is {given:g}, at least {limit:g} is asked" if given is not None else f"{what} is not known"


def _submitters(policy: Policy, asked: Asked) -> str | None:
    if policy.submitters is None or asked.submitter in policy.submitters:
        return None
    return "the submitter's key is not among those allowed"


def _tasks(policy: Policy, asked: Asked) -> str | None:
    if policy.tasks is None:
        return None
    found = [_one_of("task", task, policy.tasks) for task in asked.tasks] or ["the task is not known"]
    return next(filter(None, found), None)


def _working_hours(policy: Policy, asked: Asked) -> str | None:
    hours = policy.working_hours
    if hours is None or hours.holds(asked.now):
        return None
    return f"requests are served {hours.begin:%H:%M} to {hours.end:%H:%M} on {', '.join(hours.days)} ({hours.zone})"


def _charter(policy: Policy, asked: Asked) -> str | None:
    if policy.charter is not None and asked.charter_sha256 != policy.charter:
        return "the run names no charter" if asked.charter_sha256 is None else "the run names another charter"
    if asked.charter_until is None:
        return None if policy.charter is None else "the charter is not in this site's kit: its last day is not known"
    if asked.now.astimezone(UTC).date() > asked.charter_until:
        return f"the charter's last day was {asked.charter_until}"
    return None


def _secure_aggregation(policy: Policy, asked: Asked) -> str | None:
    if policy.secure_aggregation and asked.does.trains and not asked.does.is_protected:
        return "updates leave only inside a secure sum"
    return None


def _epsilon(asked: Asked, what: str, given: float | None, limit: float | None) -> str | None:
    if limit is not None and asked.does.scores:
        return "exact figures on this site's examples have no finite epsilon"
    return _at_most(what, given, limit) if asked.does.trains else None


def _plain_gradients(policy: Policy, asked: Asked) -> str | None:
    if policy.plain_gradients or not asked.shows_gradients or not asked.does.trains:
        return None
    return (
        "updates of plain gradient steps ('sgd', 'fedsgd') do not leave this site without noise of its own: take AdamW "
        "with local steps, or privacy.dp"
    )


RULES: Mapping[str, _Rule] = {
    "submitters": _submitters,
    "working_hours": _working_hours,
    "charter": _charter,
    "base_models": lambda policy, asked: _one_of("the base model", asked.base_sha256, policy.base_models),
    "tasks": _tasks,
    "objectives": lambda policy, asked: (
        _one_of("objective", asked.objective, policy.objectives) if asked.does.trains else None
    ),
    "least_participants": lambda policy, asked: _at_least(
        "the number of participants", asked.participants, policy.least_participants
    ),
    "least_cohort": lambda policy, asked: (
        _at_least("the number of sites in the sum", asked.cohort, policy.least_cohort)
        if asked.does.trains or asked.cohort is not None
        else None
    ),
    "secure_aggregation": _secure_aggregation,
    "plain_gradients": _plain_gradients,
    "least_threshold": lambda policy, asked: (
        None if asked.threshold is None else _at_least("the sum's threshold", asked.threshold, policy.least_threshold)
    ),
    "least_colluding": lambda policy, asked: (
        None
        if asked.colluding is None
        else _at_least("the number of sites whose noise does not count", asked.colluding, policy.least_colluding)
    ),
    "generation": lambda policy, asked: (
        "text may not be generated from this site's prompts" if asked.generates and not policy.generation else None
    ),
}
"""Key of ``policy.toml`` -> what refuses a request before anything of the site's is opened, as one line, or None."""


def _leakage_audit(policy: Policy, asked: Asked) -> str | None:
    return _unmeasured(asked) if policy.leakage_audit == "required" else None


def _advantage(policy: Policy, asked: Asked) -> str | None:
    most = policy.largest_membership_advantage
    if most is None or asked.does.audits:
        return None
    if asked.leaked is None:
        return _unmeasured(asked)
    return _at_most("the membership advantage of the run's model", asked.leaked, most)


def _unmeasured(asked: Asked) -> str | None:
    """Why nothing is known, or will be, of what a run's final model gives away; None where it is, or will be."""
    if not asked.audits_leakage:
        return "the run does not measure what its model gives away: audit.leakage = true, with audit.reserve above 0"
    if asked.does.ends_run and asked.leaked is None:
        return "the final model was not measured on this site's examples"
    return None


LEAKS: Mapping[str, _Rule] = {"leakage_audit": _leakage_audit, "largest_membership_advantage": _advantage}
"""The same for what the run's model was found to give away at this site."""
COSTS: Mapping[str, _Rule] = {
    "smallest_adapter": lambda policy, asked: (
        _at_least("the adapter's number of values", asked.adapter_values, policy.smallest_adapter)
        if asked.does.uses_examples
        else None
    ),
    "largest_adapter": lambda policy, asked: (
        _at_most("the adapter's number of values", asked.adapter_values, policy.largest_adapter)
        if asked.does.uses_examples
        else None
    ),
    "most_steps": lambda policy, asked: (
        None if asked.steps is None else _at_most("the number of optimiser steps", asked.steps, policy.most_steps)
    ),
}
"""The same for what serving a request would cost, which follows from the site's own examples and model."""
PRIVACY: Mapping[str, _Rule] = {
    "largest_epsilon_run": lambda policy, asked: _epsilon(
        asked, "epsilon of the run", asked.epsilon_run, policy.largest_epsilon_run
    ),
    "largest_epsilon_total": lambda policy, asked: _epsilon(
        asked, "epsilon of all runs", asked.epsilon_total, policy.largest_epsilon_total
    ),
}
"""The same for what it would cost in privacy, which is computed only once all other rules let a request pass."""


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        PolicyError: The file is missing, broken or holds an unknown key, so everything is refused.
    """
    if not path.is_file():
        raise PolicyError(path.name, f"everything is refused: there is no {str(path)!r}; an empty file allows most")
    try:
        return validated(Policy, read_toml(path), source=path.name)
    except ConfigError as error:
        raise PolicyError(path.name, f"everything is refused until this is mended: {error}") from None


def check(policy: Policy, asked: Asked, *, rules: Mapping[str, _Rule]) -> None:
    """Raises ``PolicyError`` with the first of these rules that refuses."""
    for name, rule in rules.items():
        reason = rule(policy, asked)
        if reason is not None:
            raise PolicyError(name, reason)


def released(policy: Policy, body: Mapping[str, Any], *, figures: tuple[str, ...]) -> dict[str, Any]:
    """A reply's body without the figures that may not leave.

    If any number of examples in a figure is above 0 and below ``smallest_count``, the whole figure is withheld, and so
    are all other figures about parts of the examples, because precision, recall and support together reveal the cells
    of a confusion matrix. Rates over all examples are rounded to steps of ``smallest_count`` examples, because an
    exact rate reveals a number of examples.

    Args:
        policy: The site's.
        body: What the client function made.
        figures: Names in the body that ``metrics`` decides on; those withheld become None.

    Raises:
        PolicyError: There are fewer than ``smallest_count`` examples in all.
    """
    smallest, count = policy.smallest_count, body.get("num_examples", policy.smallest_count)
    if count < smallest:
        raise PolicyError("smallest_count", f"the reply would speak of fewer than {smallest} examples")
    shown = [name for name in figures if policy.metrics is None or name in policy.metrics]
    has_small = any(_is_small(name, body[name], smallest) for name in figures if name in body)
    made = dict(body)
    for name in figures:
        if name not in made:
            continue
        is_withheld = name not in shown or (has_small and (name in BY_CLASS or _is_small(name, made[name], smallest)))
        made[name] = None if is_withheld else made[name]
        if name in RATES and smallest > 1:
            made[name] = _coarse(made[name], smallest / count)
    return made


def _coarse(figure: Any, step: float) -> Any:
    """A rate, or an interval of rates, rounded to a multiple of ``step`` and at most 1; None for what is neither."""
    if isinstance(figure, (list, tuple)):
        return [_coarse(value, step) for value in figure]
    return max(-1.0, min(1.0, round(round(figure / step) * step, 12))) if isinstance(figure, float) else None


def check_upload(policy: Policy, num_bytes: int) -> None:
    """Raises ``PolicyError`` when a reply is larger than allowed."""
    reason = _at_most("the reply's size in bytes", num_bytes, policy.largest_upload_bytes)
    if reason is not None:
        raise PolicyError("largest_upload_bytes", reason)


def _is_small(name: str, value: Any, smallest: int) -> bool:
    """True when a number of examples in a figure is above 0 and below ``smallest``."""
    if isinstance(value, Mapping):
        return any(_is_small(key, item, smallest) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(_is_small(name, item, smallest) for item in value)
    return name in COUNTS and type(value) is int and 0 < value < smallest
