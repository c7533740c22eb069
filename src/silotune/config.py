"""The configuration of a run: all sections, read from TOML with overrides; all faults are reported at once."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError, model_validator

from silotune.errors import ConfigError, unknown_choice
from silotune.settings import plugins, presets
from silotune.settings.adapters import ADAPTERS
from silotune.settings.base import Section
from silotune.settings.limits import faults, limits
from silotune.settings.places import anchored
from silotune.settings.registry import (
    FAULT,
    TYPE,
    brought_by,
    depends_of,
    name_of,
    overlay,
    section_of,
    table_at,
    void_with,
)
from silotune.settings.sections import Sections

SectionType = TypeVar("SectionType", bound=Section)


class Config(Sections):
    """A whole run, whose sections go together."""

    @model_validator(mode="before")
    @classmethod
    def _qlora_implies_int4(cls, document: Any) -> Any:
        """Sets the precision to int4 where it is left open and the adapter needs an int4 base."""
        if not isinstance(document, Mapping) or name_of(document.get("adapter")) not in ADAPTERS.those("needs_int4"):
            return document
        model = document.get("model", {})
        if not isinstance(model, Mapping) or model.get("precision", "auto") != "auto":
            return document
        return {**document, "model": {**model, "precision": "int4"}}

    @model_validator(mode="before")
    @classmethod
    def _preset_fills(cls, document: Any) -> Any:
        return presets.filled(document) if isinstance(document, Mapping) else document

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        engine = self.federation.engine
        found = [*faults(self), *(f"federation.engine = {engine!r}: {line}" for line in limits(engine, self))]
        if found:
            raise ValueError("\n".join(found))
        return self


def plugins_of(config: Config) -> dict[str, str]:
    """The packages whose plug-ins a run uses -> their versions.

    Raises:
        PluginError: A name is defined twice.
    """
    used = [*brought_by(config)]
    for task in (config.data.task, *config.data.mixture):
        used += [each for each in plugins.visible("tasks") if each.name == task]
    return {each.package: each.version for each in used}


def parse_override(text: str) -> tuple[list[str], Any]:
    """Splits ``a.b=c`` into its path and value: None for an empty value, else a TOML value, else a string.

    Raises:
        ConfigError: There is no ``=`` or the path is empty.
    """
    path, separator, raw = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or not all(keys):
        raise ConfigError(f"--set {text!r} is not of the form section.key=value")
    if not raw.strip():
        return keys, None
    try:
        return keys, parsed_toml(f"value = {raw}")["value"]
    except ValueError:
        return keys, raw.strip()


def overlaid(document: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the values of other documents put over it, section by section; the inputs are left alone.

    For a choice such as ``federation.algorithm``, a plain name replaces the whole choice, and a table adds settings.
    """
    result = _copy(document)
    for change in changes:
        result = overlay(Config, result, change)
    return _copy(result)


def merge(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The document with ``a.b=c`` overrides applied, in order; the input is left alone.

    Names of choices are applied before their settings, wherever they stand: ``federation.algorithm=fedadam`` replaces
        the document's algorithm, but not the settings that another override gives.
    """
    result = _copy(document)
    parsed = [(text, *parse_override(text)) for text in overrides]
    for text, keys, value in sorted(parsed, key=lambda each: _depth_of_name(each[1])):
        _set(result, keys, value, text)
    return result


def _depth_of_name(keys: Sequence[str]) -> int:
    """The depth of the choice that these keys name; a number above every depth for keys that name none."""
    path = keys[:-1] if keys[-1] == TYPE else keys
    leads = any(keys[-1] == needs.key for needs in depends_of(_section_at(keys[:-1])).values())
    return len(path) if leads or table_at(Config, path) is not None else _DEEPEST


_DEEPEST = 1 << 10


def _section_at(keys: Sequence[str]) -> type[BaseModel] | None:
    """The section at a path of keys; None where there is none."""
    return reduce(section_of, keys, cast("type[BaseModel] | None", Config))


def _set(document: dict[str, Any], keys: Sequence[str], value: Any, text: str) -> None:
    """Puts a value into a document at a path of keys; below a choice, it sets one of the choice's settings."""
    place = document
    for depth, key in enumerate(keys[:-1], start=1):
        table = table_at(Config, keys[:depth])
        if table is not None:
            for inner in reversed(keys[depth:]):
                value = {inner: value}
            place[key] = table.put_over(place.get(key), value)
            return
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {text!r}: {key!r} is not a section")
    place[keys[-1]] = value
    for void in void_with(_section_at(keys[:-1]), {keys[-1]: value}) & place.keys():
        del place[void]


def _copy(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in document.items()}


def from_mapping(document: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validates a mapping of sections.

    Raises:
        ConfigError: With every fault, one line each, in ``faults``.
    """
    return validated(Config, document, source=source)


def validated(
    schema: type[SectionType], document: Mapping[str, Any], *, source: str, is_named: bool = False
) -> SectionType:
    """A mapping as the given section, every key checked.

    Args:
        schema: The section.
        document: The mapping.
        source: Where it comes from, such as a file's path.
        is_named: Every fault names the source, which is a file that the command line does not name.

    Raises:
        ConfigError: With every fault, one line each, in ``faults``.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"{source}: holds no keys with values")
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        own = _own(error.errors())
    lines = [line for fault in own for line in _explain(fault, schema)]
    dropped = [".".join(map(str, fault["loc"])) for fault in own if fault["loc"]]
    try:  # pydantic checks sections as a whole only if every value is right: so once more without wrong values
        schema.model_validate(_without(document, [fault["loc"] for fault in own]))
    except ValidationError as error:
        more = [line for fault in error.errors() if not fault["loc"] for line in _explain(fault, schema)]
        lines += [line for line in more if line not in lines and not any(name in line for name in dropped)]
    raise faulty(lines, source=source, is_named=is_named)


def _own(faults: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Faults without those that follow from others, each at the key that a user wrote.

    For a type with several branches, pydantic gives a fault for each branch, with the branch in its place.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for fault in faults:
        if not _follows(fault, faults):
            place = tuple(part for part in fault["loc"] if not str(part).startswith(_BRANCHES))
            found.setdefault(place, {**fault, "loc": place})
    deeper = {place[:-1] for place in found if place and isinstance(place[-1], int)}
    return [fault for place, fault in found.items() if place not in deeper]


_BRANCHES = ("literal[", "tuple[")


def _without(document: Mapping[str, Any], places: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """A copy without the values at these places."""
    copied = _copy(document)
    for place in places:
        inner: Any = copied
        for part in place[:-1]:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if place and isinstance(inner, dict):
            inner.pop(place[-1], None)
    return copied


def _follows(fault: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether pydantic calls a list too short only because its entries have faults."""
    where = fault["loc"]
    return fault["type"] == "too_short" and any(
        len(other["loc"]) > len(where) and other["loc"][: len(where)] == where for other in others
    )


def faulty(faults: Sequence[str], *, source: str, is_named: bool = False) -> ConfigError:
    """The error that lists these faults; each names the source where ``is_named``."""
    summary = faults[0] if len(faults) == 1 else f"{len(faults)} faults: " + "; ".join(faults)
    return ConfigError(f"{source}: {summary}", [f"{source}: {fault}" for fault in faults] if is_named else faults)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies ``a.b=c`` overrides, and validates the result.

    A relative path in the file begins at the file's folder, one in an override at the working directory.

    Args:
        path: The TOML file.
        overrides: As given to ``--set``.

    Raises:
        ConfigError: The file is missing or broken, or holds faults (all of them are listed).
    """
    document = anchored(read_toml(path), Path(path).absolute().parent)
    return from_mapping(anchored(merge(document, overrides), Path.cwd()), source=str(path))


def load_for_elsewhere(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """As ``load_config``, for a run on another machine: relative paths stay as they are written.

    Raises:
        ConfigError: The file is missing or broken, or holds faults (all of them are listed).
    """
    return from_mapping(merge(read_toml(path), overrides), source=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file; raises ``ConfigError``, with line and column for a fault in the TOML."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}; 'silotune configs list' shows those shipped") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
    try:
        return parsed_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def parsed_toml(text: str) -> dict[str, Any]:
    """A TOML document; ``ValueError`` says where it is not valid, or that it nests too deep to be read."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("lists and tables are nested too deep") from None


MOVED: Mapping[str, str] = {
    "federation.proximal_mu": "federation.algorithm.proximal_mu",
    "federation.scaffold_option": "federation.algorithm.option",
    "federation.feddyn_alpha": "federation.algorithm.alpha",
    "federation.server_learning_rate": "federation.algorithm.server_learning_rate",
    "federation.server_momentum": "federation.algorithm.server_momentum",
    "federation.server_beta1": "federation.algorithm.server_beta1",
    "federation.server_beta2": "federation.algorithm.server_beta2",
    "federation.server_tau": "federation.algorithm.server_tau",
    "federation.trim": "federation.aggregation.trim",
    "federation.norm_bound": "federation.aggregation.bound",
    "federation.malicious": "federation.aggregation.malicious",
    "federation.fairness_q": "federation.weighting.fairness_q",
    "federation.weight_cap": "federation.weighting.cap",
    "federation.ditto_lambda": "federation.personalization.pull",
    "federation.attack.kind": "federation.attack.type",
    "adapter.kind": "adapter.type",
    "training.turns": "training.objective.turns",
    "training.packing": "training.objective.packing",
    "training.wording": "training.objective.wording",
    "training.beta": "training.objective.beta",
    "training.preference_loss": "training.objective.preference_loss",
    "training.label_smoothing": "training.objective.label_smoothing",
    "training.desirable_weight": "training.objective.desirable_weight",
    "training.undesirable_weight": "training.objective.undesirable_weight",
    "training.momentum": "training.optimizer.momentum",
    "privacy.epsilon": "privacy.dp.epsilon",
    "privacy.delta": "privacy.dp.delta",
    "privacy.noise_multiplier": "privacy.dp.noise_multiplier",
    "privacy.clip_norm": "privacy.dp.clip_norm",
    "privacy.accountant": "privacy.dp.accountant",
    "privacy.ledger": "privacy.dp.ledger",
    "privacy.report_costs": "privacy.dp.report_costs",
    "privacy.colluding": "privacy.dp.colluding",
    "privacy.clipping": "privacy.dp.clipping",
    "privacy.client_sampling": "privacy.dp.client_sampling",
    "privacy.threshold": "privacy.protection.threshold",
    "privacy.least_clients": "privacy.protection.least_clients",
    "privacy.bound": "privacy.protection.bound",
    "privacy.max_examples": "privacy.protection.max_examples",
    "privacy.ring_bits": "privacy.protection.ring_bits",
    "privacy.he_packing": "privacy.protection.packing",
    "privacy.clip_quantile": "privacy.dp.clipping.quantile",
    "privacy.clip_learning_rate": "privacy.dp.clipping.learning_rate",
}
"""Keys of earlier configurations -> the keys that have replaced them."""


def _moved(old: str, value: Any) -> str:
    """Says what has replaced a key of an earlier configuration, as a file and as a command line write it."""
    new = MOVED[old]
    section, _, key = new.rpartition(".")
    table = table_at(Config, section.split("."))
    owners = table.owners(key) if table is not None else []
    beside = f" beside type = {json.dumps(owners[0])}" if len(owners) == 1 else ""
    shown = json.dumps(value, default=str)
    return f"{old} moved: write {key} = {shown}{beside} in [{section}], or --set {new}={value}"


def _explain(fault: Mapping[str, Any], schema: type[BaseModel]) -> list[str]:
    where = [str(part) for part in fault["loc"]]
    dotted = ".".join(where)
    if dotted in MOVED:
        return [_moved(dotted, fault["input"])]
    if fault["type"] == FAULT:
        return [f"{dotted}: {fault['msg']}"]
    if fault["type"] == "extra_forbidden":
        return [f"{dotted}: {unknown_choice('key', where[-1], _keys_at(where[:-1], schema))}"]
    if fault["type"] == "missing":
        return [f"{dotted}: this key is missing, and has no default: add it"]
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{dotted} = {fault['input']!r}: a section with keys is needed, such as [{dotted}]"]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"]).splitlines()
    if fault["type"] == "tuple_type":
        return [f"{dotted} = {fault['input']!r}: a list is needed, such as [{json.dumps(str(fault['input']))}]"]
    if fault["type"] == "literal_error":
        allowed = [name.strip(" '") for name in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return [f"{dotted}: {unknown_choice('value', str(fault['input']), allowed)}"]
    return [f"{dotted} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"]


def _keys_at(where: Sequence[str], schema: type[BaseModel]) -> list[str]:
    section: type[BaseModel] | None = schema
    for name in where:
        if not name.isdigit():  # an index in a list, whose entries are the current section
            section = section_of(section, name)
    return [] if section is None else list(section.model_fields)
