"""The base of every section of settings, which is strict and immutable, and limits that many sections share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from silotune.errors import unknown_choice

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def _expanded(path: Path) -> Path:
    """The path with the home folder in place of ~; unchanged where there is no such home."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


Place = Annotated[Path, AfterValidator(_expanded)]
"""A path; ~ is the home folder."""


def composed(text: str) -> str:
    """The text with each accent in one character with its letter (NFC), so that both forms of it compare equal."""
    return unicodedata.normalize("NFC", text)


Name = Annotated[str, AfterValidator(composed)]
"""The name of a column, an option or a value, which rows may write with accents in another form."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
"""A valid name of a file or a folder of a run: it cannot lead out of its folder, or be taken for an option."""
NAME_RULE = "use at most 200 letters, digits and . _ + -, with a letter, a digit or _ first"


def _named(text: str) -> str:
    if not NAME.fullmatch(text):
        raise PydanticCustomError("folder_name", "It cannot name a folder: {rule}", {"rule": NAME_RULE})
    return text


FolderName = Annotated[str, AfterValidator(_named)]
"""The name of a folder."""


DEVICES = ("auto", "cpu", "cuda", "mps")
"""Devices by kind; one of several GPUs is ``cuda:`` and its number."""


def _device(text: str) -> str:
    if text not in DEVICES and not re.fullmatch(r"cuda:[0-9]{1,2}", text):
        said = unknown_choice("device", text, (*DEVICES, "cuda:1"))
        raise PydanticCustomError("device", "{said}, or another number", {"said": said})
    return text


Device = Annotated[str, AfterValidator(_device)]
"""Where a model lies."""


@dataclass(frozen=True)
class Needs:
    """What a setting needs of another one beside it, without which it would do nothing.

    Attributes:
        key: The other setting.
        values: Those with which it means something; empty where the other setting only has to be given.
    """

    key: str
    values: tuple[object, ...] = ()

    def is_met(self, chosen: object) -> bool:
        """Whether the setting means something with this value of the other one."""
        return chosen in self.values if self.values else bool(chosen)

    def told(self, where: str, chosen: object) -> str:
        """Why the setting, of the section at ``where``, means nothing with this value of the other one."""
        other = f"{where}.{self.key}"
        if not self.values:
            return f"is for {other}, which is not given"
        if self.values == (None,):
            return f"means nothing beside {other} = {_written(chosen)}: leave one of them out"
        return f"is for {other} = {' or '.join(map(_written, self.values))} (now {_written(chosen)})"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


class Section(BaseModel):
    """A part of the configuration: immutable; it refuses unknown keys, NaN and infinite numbers."""

    depends: ClassVar[Mapping[str, Needs]] = {}
    """Key -> what it needs of another key beside it to mean anything."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a truth value or a text in place of a number, which pydantic would accept."""
        kinds = _numbers(cls).get(str(info.field_name), ())
        if kinds and ((isinstance(value, bool) and bool not in kinds) or _is_text(value, kinds)):
            raise PydanticCustomError("number_needed", "A number is needed")
        return value


SectionType = TypeVar("SectionType", bound=Section)


def exactly(kind: type[SectionType], document: Mapping[str, Any]) -> SectionType:
    """A section from JSON in which every value is exactly of its field's type: ``true`` is no number, 3.0 no integer.

    An integer may stand where a float is expected; a value that is left out has its default.

    Raises:
        ValueError: A value is missing, unknown, not allowed, or would be converted to another; the text is the dotted
            name of the first such value.
    """
    try:
        made = kind.model_validate(document)
    except ValidationError as error:
        where = error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"]
        raise ValueError(".".join(map(str, where))) from None
    odd = _read_otherwise(document, made.model_dump(mode="json", by_alias=True))
    if odd is not None:
        raise ValueError(odd.lstrip("."))
    return made


def _read_otherwise(given: Any, read: Any, where: str = "") -> str | None:
    """The dotted name of the first value that was converted when it was read; None if no value was."""
    if isinstance(given, Mapping) and isinstance(read, dict):
        found = (_read_otherwise(item, read.get(name), f"{where}.{name}") for name, item in given.items())
    elif isinstance(given, (list, tuple)) and isinstance(read, list) and len(given) == len(read):
        found = (_read_otherwise(*pair, f"{where}.{place}") for place, pair in enumerate(zip(given, read, strict=True)))
    else:
        is_same = given == read and (type(given) is type(read) or (type(given), type(read)) == (int, float))
        return None if is_same else where
    return next(filter(None, found), None)


@cache  # messages hold thousands of sections
def _numbers(section: type[Section]) -> Mapping[str, Collection[Any]]:
    """Fields that accept a number, and all types and values that each of them accepts."""
    found = {name: frozenset(_kinds(field.annotation)) for name, field in section.model_fields.items()}
    return {name: kinds for name, kinds in found.items() if kinds & {int, float}}


def _is_text(value: Any, kinds: Collection[Any]) -> bool:
    return isinstance(value, str) and not {str, Path, value} & set(kinds)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows for the value itself, and its literal values."""
    if get_origin(annotation) in (UnionType, Union, Annotated):
        for inner in get_args(annotation):
            yield from _kinds(inner)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        yield annotation
