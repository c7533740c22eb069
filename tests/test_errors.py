from __future__ import annotations

import inspect

import pytest

from silotune import errors
from silotune.errors import ConfigError, MissingPackageError, SilotuneError, require, unknown_choice

CODES = {
    "SilotuneError": 1,
    "ConfigError": 2,
    "PluginError": 2,
    "DataError": 3,
    "ModelError": 4,
    "TrainingError": 5,
    "FederationError": 6,
    "MessageError": 6,
    "TrainerLostError": 6,
    "ProtectionError": 6,
    "RunFolderError": 7,
    "MissingPackageError": 8,
    "GridError": 9,
    "PrivacyError": 13,
    "BudgetError": 13,
    "PolicyError": 10,
    "AuditError": 11,
    "KitError": 12,
    "SignatureError": 12,
}


def test_exit_codes_are_those_documented() -> None:
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, SilotuneError)
    }
    assert found == CODES


def test_docstring_draws_every_error_with_its_code() -> None:
    drawn = dict.fromkeys(CODES, 0)
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("├──", "").replace("└──", "").replace("│", "").split()
        if words and words[0] in drawn:
            drawn[words[0]] = int(words[1])
    assert drawn == CODES


def test_config_error_lists_its_faults() -> None:
    error = ConfigError("two", ["a", "b"])
    assert error.faults == ("a", "b")
    assert str(error) == "two"
    assert ConfigError("none").faults == ()


def test_require_gives_the_module_or_says_how_to_install_it() -> None:
    assert require("json", extra="int4").dumps([1]) == "[1]"
    with pytest.raises(MissingPackageError, match=r"no_such_package .* pip install 'silotune\[int4\]'"):
        require("no_such_package", extra="int4")


def test_unknown_choice_names_the_nearest_and_all_allowed() -> None:
    text = unknown_choice("task", "fpd", ["tfns", "fpb"])
    assert text == "unknown task 'fpd': did you mean 'fpb'? allowed: fpb, tfns"


def test_unknown_choice_without_a_near_match_has_no_hint() -> None:
    assert unknown_choice("task", "zzz", ["fpb"]) == "unknown task 'zzz': allowed: fpb"
