"""Packages that a configuration needs beside silotune's own: a run stops at them before it loads anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from silotune.config import Config, from_mapping
from silotune.errors import MissingPackageError
from silotune.record import environment
from silotune.record.runs import RunFolder
from silotune.settings.privacy import EncryptedSum


@dataclass(frozen=True)
class Need:
    """A package that some settings need.

    Attributes:
        setting: What asks for it, in the words of a configuration.
        is_asked: Whether a configuration does.
        package: The distribution.
        extra: The extra of silotune that brings it.
    """

    setting: str
    is_asked: Callable[[Config], bool]
    package: str
    extra: str


NEEDS = (
    Need("model.precision = 'int4'", lambda config: config.model.precision == "int4", "bitsandbytes", "int4"),
    Need("privacy.dp", lambda config: config.privacy.dp.is_promised, "dp-accounting", "dp"),
    Need(
        "privacy.protection = 'he'", lambda config: isinstance(config.privacy.protection, EncryptedSum), "tenseal", "he"
    ),
    Need("federation.engine = 'ray'", lambda config: config.federation.engine == "ray", "ray", "ray"),
    Need(
        "federation.budget.joules", lambda config: config.federation.budget.joules is not None, "codecarbon", "energy"
    ),
    Need(
        "zstd of federation.upload or federation.download",
        lambda config: bool(config.federation.upload.zstd or config.federation.download.zstd),
        "zstandard",
        "zstd",
    ),
)


def missing_packages(config: Config) -> list[str]:
    """A line for each package that the configuration needs and that is not installed."""
    return [
        f"{need.setting} needs {need.package}: pip install 'silotune[{need.extra}]'"
        for need in NEEDS
        if need.is_asked(config) and environment.version_of(need.package) is None
    ]


def check_packages(config: Config) -> None:
    """Raises ``MissingPackageError`` that names all of them."""
    missing = missing_packages(config)
    if missing:
        raise MissingPackageError("; ".join(missing))


def config_of(folder: RunFolder) -> Config:
    """The resolved configuration of a run.

    Raises:
        MissingPackageError: The run used plug-ins of a package that is not installed here.
        ConfigError: The configuration is not valid.
    """
    used = folder.read_json("versions").get("plugins", {}) if folder.has("versions") else {}
    if absent := [f"{name} {version}" for name, version in used.items() if environment.version_of(name) is None]:
        raise MissingPackageError(
            f"{str(folder.path)!r} was made with plug-ins of {' and of '.join(absent)}: install them first"
        )
    return from_mapping(folder.read_json("config"), source=f"{folder.path}/config.json")
