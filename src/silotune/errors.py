"""Every exception a user can meet, as one tree, with the exit code the command line gives it.

    SilotuneError                1   anything below, caught at once
    ├── ConfigError              2   the configuration: unknown key, bad value, broken TOML
    │   └── PluginError          2   a package of the user's own that adds to a choice, and cannot be used
    ├── DataError                3   examples: missing file, empty silo, row that does not fit
    ├── ModelError               4   base model or adapter: not found, unknown target, wrong hash
    ├── TrainingError            5   a local round: loss not finite, nothing to supervise
    ├── FederationError          6   a round: too few replies, a client that failed
    │   ├── MessageError         6   a message that does not decode to what was expected
    │   ├── TrainerLostError     6   a site's trainer that died over its work, or did not come back
    │   └── ProtectionError      6   a protected sum that a party refused, or that too few were left for
    ├── RunFolderError           7   a run folder: not one, in use, disk full
    ├── MissingPackageError      8   an optional package that the request needs
    ├── GridError                9   a grid: one or more of its cells have no result
    ├── PolicyError             10   a site's policy forbids what is asked; names the rule
    ├── AuditError              11   an audit trail or a dossier that does not verify; names the first fault
    ├── KitError                12   a kit, key, certificate or charter that is missing or does not fit
    │   └── SignatureError      12   a key that cannot be used, or a signature that is not one
    └── PrivacyError            13   a guarantee that cannot be given
        └── BudgetError         13   a release that would overspend a privacy budget

Each message says what was given, what is allowed and what to do, and never repeats a client's text.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import ClassVar


class SilotuneError(Exception):
    """The base of all errors a user can meet; ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1

    @property
    def told(self) -> str:
        """The message for people at other machines than the one where the error happened."""
        return str(self)


class ConfigError(SilotuneError):
    """The configuration holds one or more faults; ``faults`` lists every one of them."""

    exit_code = 2

    def __init__(self, message: str, faults: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class PluginError(ConfigError):
    """A plug-in, which an installed package adds, cannot be used; the message names it."""


class DataError(SilotuneError):
    """Examples are missing or do not fit their task; ``beside`` says what a folder holds instead of the file."""

    exit_code = 3

    def __init__(self, message: str, *, beside: str = "") -> None:
        super().__init__(message)
        self.beside = beside

    def __str__(self) -> str:
        return f"{self.told}; {self.beside}" if self.beside else self.told

    @property
    def told(self) -> str:
        """The message without the other files of a folder, which are shown only at this machine."""
        return super().__str__()


class ModelError(SilotuneError):
    """A base model or an adapter that cannot be loaded or does not fit."""

    exit_code = 4


class TrainingError(SilotuneError):
    """A local round that cannot give a usable update."""

    exit_code = 5


class FederationError(SilotuneError):
    """A round that cannot be completed, with client, round and stage where they are known."""

    exit_code = 6


class MessageError(FederationError):
    """A message that does not decode to what its receiver expects."""


class TrainerLostError(FederationError):
    """The process that trains at a site died over a request every time, or did not come back."""


class ProtectionError(FederationError):
    """A protected sum that a site refuses to take part in, or that cannot be opened; nothing was revealed."""


class RunFolderError(SilotuneError):
    """A run folder that cannot be read, written or resumed."""

    exit_code = 7


class MissingPackageError(SilotuneError):
    """An optional package that is not installed."""

    exit_code = 8


class GridError(SilotuneError):
    """Some cells of a grid failed; the others have their results."""

    exit_code = 9


class PrivacyError(SilotuneError):
    """A privacy guarantee that cannot be given."""

    exit_code = 13


class BudgetError(PrivacyError):
    """A release that would overspend a privacy budget; nothing was trained or released."""


class PolicyError(SilotuneError):
    """A site's policy refuses a request; ``rule`` is the rule's name in ``policy.toml``."""

    exit_code = 10

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"policy rule {rule!r}: {reason}")
        self.rule = rule


class AuditError(SilotuneError):
    """An audit trail that does not verify."""

    exit_code = 11


class KitError(SilotuneError):
    """A kit, certificate, list of members or charter that cannot be used."""

    exit_code = 12


class SignatureError(KitError):
    """A key cannot be used, or a signature is not by the author that it names."""


def require(package: str, *, extra: str) -> ModuleType:
    """Imports an optional package, or says how to install it.

    Args:
        package: Import name, such as ``bitsandbytes``.
        extra: The extra of silotune that brings it, such as ``int4``.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{package} is needed here and is not installed: pip install 'silotune[{extra}]'"
        ) from error


def unknown_choice(kind: str, given: str, allowed: Iterable[str]) -> str:
    """One line for a name that is not in a table: what was given, the nearest match, what is allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {given!r}: {hint}allowed: {', '.join(names)}"
