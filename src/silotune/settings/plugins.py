"""Plug-ins: installed packages that add names to a choice. They are found by their entry points.

A package says in its ``pyproject.toml`` under which name it adds what, for instance::

    [project.entry-points."silotune.algorithms"]
    diloco = "silotune_diloco:DiLoCo"

Nothing of a package is imported before a configuration names what it adds, or ``silotune plugins`` looks at it. A site
sees only those packages that its policy allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, distributions, entry_points
from types import MappingProxyType
from typing import Any

from silotune.errors import PluginError

GROUPS: Mapping[str, str] = {
    "data.task": "tasks",
    "adapter": "adapters",
    "federation.algorithm": "algorithms",
    "federation.aggregation": "aggregations",
    "training.objective": "objectives",
}
"""Key of a choice that a package can add to -> its group of entry points: ``silotune.tasks`` and so on."""
_VISIBLE: ContextVar[frozenset[str] | None] = ContextVar("visible_plugins", default=None)


@dataclass(frozen=True)
class Plugin:
    """One name that an installed package adds.

    Attributes:
        group: What it adds to, one of the values of ``GROUPS``.
        name: The name, as a configuration writes it.
        package: The distribution that brings it.
        version: Of that distribution.
        place: Where it is, as ``module:object``.
    """

    group: str
    name: str
    package: str
    version: str
    place: str
    entry: EntryPoint = field(repr=False, compare=False)

    @property
    def origin(self) -> str:
        """The package with its version, for messages."""
        return f"{self.package} {self.version}"

    def load(self) -> Any:
        """What the package brings under this name.

        Raises:
            PluginError: It cannot be imported.
        """
        try:
            return self.entry.load()
        except Exception as error:  # a package of others: the message names it, whatever it raises
            said = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
            raise PluginError(
                f"the plug-in {self.name!r} of {self.origin} cannot be imported ({reason}): repair or uninstall it"
            ) from error


@cache  # reading what is installed takes milliseconds, and a run reads its settings many times
def installed() -> Mapping[str, tuple[Plugin, ...]]:
    """Group -> all names that installed packages add to it."""
    found: dict[str, tuple[Plugin, ...]] = {}
    for group in GROUPS.values():
        entries = sorted(entry_points(group=f"silotune.{group}"), key=lambda entry: (entry.name, entry.value))
        found[group] = tuple(
            Plugin(
                group,
                entry.name,
                entry.dist.name if entry.dist is not None else entry.module,
                entry.dist.version if entry.dist is not None else "",
                entry.value,
                entry,
            )
            for entry in entries
        )
    return MappingProxyType(found)


def visible(group: str) -> tuple[Plugin, ...]:
    """The plug-ins of one group that may be used here."""
    allowed = _VISIBLE.get(None)
    return tuple(each for each in installed()[group] if allowed is None or each.package in allowed)


def offered(group: str, own: Iterable[str]) -> list[str]:
    """All names that may be chosen here: silotune's own, and those of plug-ins."""
    return [*own, *(each.name for each in (visible(group) if group else ()))]


def strangers() -> list[tuple[str, str]]:
    """Groups of entry points that look like silotune's and are none, with the packages that name them."""
    known = {f"silotune.{group}" for group in GROUPS.values()}
    named = {(entry.group, each.name) for each in distributions() for entry in each.entry_points}
    return sorted((group, package) for group, package in named if group.startswith("silotune.") and group not in known)


@contextmanager
def only(packages: Collection[str]) -> Iterator[None]:
    """Within the block, only the plug-ins of these packages are visible."""
    token = _VISIBLE.set(frozenset(packages))
    try:
        yield
    finally:
        _VISIBLE.reset(token)


def named(group: str, name: str, *, is_own: bool) -> Plugin | None:
    """The plug-in of a name; None where no package adds it.

    Args:
        group: What it adds to.
        name: As a configuration writes it.
        is_own: Silotune itself has a choice of this name.

    Raises:
        PluginError: The name is defined twice.
    """
    found = [each for each in visible(group) if each.name == name]
    origins = [*(["silotune"] if is_own else []), *(each.origin for each in found)]
    if len(origins) > 1:
        raise PluginError(
            f"{name!r} is defined twice, by {' and by '.join(origins)}: rename it in {found[0].package}, or uninstall "
            "that package"
        )
    return found[0] if found else None
