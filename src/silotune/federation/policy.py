"""The site policy: what a data holder allows, whatever a coordinator asks. It fails closed.

``policy.toml`` belongs to the site and lies outside every job. A file that is missing, broken or holds an unknown key
refuses everything; a rule whose fact is not known refuses too. Rules are functions in a table, named like their key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field

from silotune.config import read_toml, validated
from silotune.errors import ConfigError, PolicyError, SignatureError
from silotune.federation.jobs import Sha256
from silotune.record.signatures import normal_public
from silotune.sections import Objective
from silotune.settings import Positive, Section

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True)
class Kind:
    """What a kind of request does with a site's examples.

    Attributes:
        trains: What it sends back is learnt from them.
        generates: Text is written from their prompts.
        carries_adapter: Its tensors are an adapter.
        is_protected: What it sends back is seen by nobody but within a sum.
        scores: Exact figures on them are sent back.
    """

    trains: bool = True
    generates: bool = True
    carries_adapter: bool = True
    is_protected: bool = False
    scores: bool = False


_STEP = Kind(trains=False, generates=False, carries_adapter=False, is_protected=True)
KINDS: Mapping[str, Kind] = {
    "train": Kind(generates=False),
    "personalize": Kind(generates=False),
    "evaluate": Kind(trains=False, generates=False, scores=True),
    "countersign": Kind(trains=False, generates=False, carries_adapter=False),
    "secure_sum.keys": _STEP,
    "secure_sum.shares": _STEP,
    "secure_sum.accept": _STEP,
    "secure_sum.input": Kind(generates=False, is_protected=True),
    "secure_sum.check": _STEP,
    "secure_sum.unmask": _STEP,
    "he.weight": _STEP,
    "he.input": Kind(generates=False, is_protected=True),
    "he.open": _STEP,
}
"""Kind of request -> what it does; one that is not in the table counts as doing all of it, unprotected."""


def kind_named(name: str) -> Kind:
    """What a request of this kind does; an unknown one does everything, unprotected."""
    return KINDS.get(name, Kind())


EPSILON_RULES = ("largest_epsilon_run", "largest_epsilon_total")
"""Rules that refuse because the owner's privacy budget is spent."""
COUNTS = ("num_examples", "support", "confusion")
"""Names of figures that count examples, wherever they stand in a reply's body."""


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


class WorkingHours(Section):
    """When requests are served, by the site's clock."""

    begin: time
    end: time
    days: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri")
    zone: Annotated[str, AfterValidator(_checked_zone)] = "UTC"

    def holds(self, now: datetime) -> bool:
        """True within the hours; hours that pass midnight belong to the day on which they begin."""
        local = now.astimezone(ZoneInfo(self.zone))
        clock, today = local.time(), _DAYS[local.weekday()]
        if self.begin <= self.end:
            return today in self.days and self.begin <= clock < self.end
        yesterday = _DAYS[local.weekday() - 1]
        return (today in self.days and clock >= self.begin) or (yesterday in self.days and clock < self.end)


class Policy(Section):
    """``policy.toml``; a rule that is left out does not restrict, but for ``generation``, which is off."""

    format: Literal[1] = 1
    base_models: tuple[Sha256, ...] | None = Field(None, description="fingerprints of base models that may be tuned")
    tasks: tuple[str, ...] | None = Field(None, description="tasks that may be learnt")
    objectives: tuple[Objective, ...] | None = Field(None, description="objectives that may be trained with")
    smallest_adapter: Positive | None = Field(None, description="fewest values of an adapter")
    largest_adapter: Positive | None = Field(None, description="most values of an adapter")
    least_participants: Positive | None = Field(None, description="fewest sites of a run, this one counted in")
    least_cohort: Positive | None = Field(None, description="fewest sites of a sum that an update goes into")
    secure_aggregation: bool = Field(
        False,
        description="true: no update leaves but inside a protected sum (secure_sum, or he of all values)",
    )
    least_threshold: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        2 / 3, description="least share of a secure sum's sites that must stay to its end"
    )
    least_colluding: Annotated[int, Field(ge=0)] | None = Field(
        None, description="sites without whose shares a sum's noise must be enough: they may work with the coordinator"
    )
    largest_epsilon_run: Annotated[float, Field(ge=0)] | None = Field(None, description="privacy loss of one run")
    largest_epsilon_total: Annotated[float, Field(ge=0)] | None = Field(None, description="of all runs together")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="at which these two are counted, whatever a run says: below 1 / your examples"
    )
    largest_upload_bytes: Positive | None = Field(None, description="most bytes of one reply")
    metrics: tuple[str, ...] | None = Field(None, description="figures that may leave; others are withheld")
    smallest_count: Annotated[int, Field(ge=0)] = Field(0, description="figures that count fewer examples stay here")
    working_hours: WorkingHours | None = None
    submitters: tuple[Annotated[str, AfterValidator(_checked_key)], ...] | None = Field(
        None, description="public keys of those who may submit runs"
    )
    generation: bool = Field(False, description="true: text may be generated from the site's prompts")
    charter: Sha256 | None = Field(None, description="SHA-256 of the charter that a run must name")


@dataclass(frozen=True)
class Asked:
    """What a request asks, as far as the site knows; None for what it does not know.

    Attributes:
        kind: Of the request.
        now: The site's clock.
        task: What is to be learnt.
        objective: What is to be trained with; None where nothing is trained.
        base_sha256: Fingerprint of the base model that the site holds.
        adapter_values: Values in the adapter's tensors.
        participants: Sites that the job names, or fewer where a sum is to be over fewer.
        cohort: Sites of the protected sum that the request belongs to, as many as it says are left.
        threshold: Share of a secure sum's sites that must stay to its end; None where no sum begins.
        colluding: Sites whose shares of a sum's noise do not count; None where no sum with noise begins.
        is_open: A part of the update is to travel in the clear beside its encrypted rest.
        epsilon_run: Privacy loss of this run at this site once the request is served; None where nothing bounds it.
        epsilon_total: The same for all runs of the site.
        submitter: Public key that signed the job, and whose signature fits.
        submitter_fault: Why there is no such key.
        charter_sha256: Of the charter that the job names.
        charter_until: Last day of that charter; None where the site does not hold it.
    """

    kind: str
    now: datetime
    task: str | None = None
    objective: str | None = None
    base_sha256: str | None = None
    adapter_values: int | None = None
    participants: int | None = None
    cohort: int | None = None
    threshold: float | None = None
    colluding: int | None = None
    is_open: bool = False
    epsilon_run: float | None = None
    epsilon_total: float | None = None
    submitter: str | None = None
    submitter_fault: str = "the request carries no signed job"
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
    return asked.submitter_fault if asked.submitter is None else "the submitter's key is not among those allowed"


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
    if not policy.secure_aggregation or not asked.does.trains:
        return None
    if not asked.does.is_protected:
        return "updates leave only inside a secure sum"
    return "a part of the update would leave in the clear" if asked.is_open else None


def _epsilon(asked: Asked, what: str, given: float | None, limit: float | None) -> str | None:
    if limit is not None and asked.does.scores:
        return "exact figures on this site's examples are bounded by no epsilon"
    return _at_most(what, given, limit) if asked.does.trains else None


RULES: Mapping[str, _Rule] = {
    "submitters": _submitters,
    "working_hours": _working_hours,
    "charter": _charter,
    "base_models": lambda policy, asked: _one_of("the base model", asked.base_sha256, policy.base_models),
    "tasks": lambda policy, asked: _one_of("task", asked.task, policy.tasks),
    "objectives": lambda policy, asked: (
        _one_of("objective", asked.objective, policy.objectives) if asked.does.trains else None
    ),
    "smallest_adapter": lambda policy, asked: (
        _at_least("the adapter's number of values", asked.adapter_values, policy.smallest_adapter)
        if asked.does.carries_adapter
        else None
    ),
    "largest_adapter": lambda policy, asked: (
        _at_most("the adapter's number of values", asked.adapter_values, policy.largest_adapter)
        if asked.does.carries_adapter
        else None
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
    "least_threshold": lambda policy, asked: (
        None if asked.threshold is None else _at_least("the sum's threshold", asked.threshold, policy.least_threshold)
    ),
    "least_colluding": lambda policy, asked: (
        None
        if asked.colluding is None
        else _at_least("the number of sites whose noise does not count", asked.colluding, policy.least_colluding)
    ),
    "largest_epsilon_run": lambda policy, asked: _epsilon(
        asked, "epsilon of the run", asked.epsilon_run, policy.largest_epsilon_run
    ),
    "largest_epsilon_total": lambda policy, asked: _epsilon(
        asked, "epsilon of all runs", asked.epsilon_total, policy.largest_epsilon_total
    ),
    "generation": lambda policy, asked: (
        "text may not be generated from this site's prompts" if asked.does.generates and not policy.generation else None
    ),
}
"""Key of ``policy.toml`` -> what refuses a request, as one line, or None."""


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        PolicyError: It is missing, broken or holds an unknown key, so everything is refused.
    """
    if not path.is_file():
        raise PolicyError(path.name, f"everything is refused: there is no {str(path)!r}; an empty file allows most")
    try:
        return validated(Policy, read_toml(path), source=path.name)
    except ConfigError as error:
        raise PolicyError(path.name, f"everything is refused until this is mended: {error}") from None


def check(policy: Policy, asked: Asked) -> None:
    """Raises ``PolicyError`` with the first rule that refuses."""
    for name, rule in RULES.items():
        reason = rule(policy, asked)
        if reason is not None:
            raise PolicyError(name, reason)


def released(policy: Policy, body: Mapping[str, Any], *, figures: tuple[str, ...]) -> dict[str, Any]:
    """A reply's body without the figures that may not leave.

    A figure in which any number of examples is above 0 and below ``smallest_count`` is withheld whole: its other
    parts would give the small one away.

    Args:
        policy: The site's.
        body: What the client function made.
        figures: Names in the body that ``metrics`` decides on; those withheld become None.

    Raises:
        PolicyError: There are fewer than ``smallest_count`` examples in all.
    """
    if body.get("num_examples", policy.smallest_count) < policy.smallest_count:
        raise PolicyError("smallest_count", f"the reply would speak of fewer than {policy.smallest_count} examples")
    may_leave = policy.metrics is None
    made = dict(body)
    for name in figures:
        is_allowed = may_leave or name in (policy.metrics or ())
        if name in made and (not is_allowed or _is_small(name, made[name], policy.smallest_count)):
            made[name] = None
    return made


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
    return name in COUNTS and not isinstance(value, bool) and isinstance(value, int) and 0 < value < smallest
