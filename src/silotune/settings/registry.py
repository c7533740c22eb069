"""A choice by name: which names there are, which settings each of them has, and what is true of each.

A choice such as ``federation.algorithm`` is written as a plain name, ``"fedadam"``, or as a table that also holds
settings of it, ``{ type = "fedadam", server_learning_rate = 0.02 }``. Either gives an instance of the class that has
this name. What is true of a choice (whether an algorithm learns nothing but a mean, for one) stands in that class too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, SerializerFunctionWrapHandler, ValidationError, model_serializer
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from silotune.errors import PluginError, unknown_choice
from silotune.settings import plugins
from silotune.settings.base import Needs, Section
from silotune.settings.plugins import Plugin

TYPE = "type"
"""The key of a table that holds the name of the choice."""


class Choice(Section):
    """The settings of one name of a choice: they are its fields; what is true of it are class variables.

    The first line of a subclass's docstring is what the reference of settings says of it.
    """

    type: ClassVar[str] = ""

    @classmethod
    def implementation(cls) -> Any:
        """What does the work of a plug-in's choice: the entry that silotune's own table of this choice would hold.

        A plug-in imports torch in here, and not beside its settings: a configuration is read without it.

        Raises:
            PluginError: The plug-in does not say.
        """
        raise PluginError(f"the plug-in {cls.type!r} ({cls.__module__}) has settings and no implementation")

    @model_serializer(mode="wrap")
    def _with_type(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {TYPE: self.type, **fields(self)}


def name_of(given: Any) -> Any:
    """The name of a choice as a document or a section gives it: as a plain name, a table or the choice itself.

    None where it is left open; whatever is no choice comes back as it is, for its field to refuse.
    """
    return given.get(TYPE) if isinstance(given, Mapping) else getattr(given, TYPE, given)


ChoiceType = TypeVar("ChoiceType", bound=Choice)
Made = TypeVar("Made")


class Table(Generic[ChoiceType]):
    """All names of one choice, in order; the first is that of a table without a ``type``.

    As the annotation of a field, ``Annotated[SerializeAsAny[...], TABLE]``, it reads what a configuration says.
    """

    def __init__(self, where: str, *classes: type[ChoiceType]) -> None:
        """``where`` is the dotted key of the choice."""
        self.where, self.group = where, plugins.GROUPS.get(where, "")
        self._classes: dict[str, type[ChoiceType]] = {}
        for each in classes:
            self._add(each)

    def _add(self, settings: type[ChoiceType]) -> None:
        name = settings.type
        if not name:
            raise ValueError(f"{self.where}: {settings.__name__} has no name: set its class variable type")
        if name in self._classes:
            raise ValueError(f"{self.where}: {name!r} of {settings.__name__} is defined already: take another name")
        self._classes[name] = settings

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, name: str) -> type[ChoiceType]:
        """The class of a name.

        Raises:
            KeyError: There is none.
            PluginError: A plug-in of this name cannot be used.
        """
        plugin = self.plugin(name)
        return self._classes[name] if plugin is None else self._brought(plugin)

    def __contains__(self, name: object) -> bool:
        return name in self._classes or (isinstance(name, str) and self.plugin(name) is not None)

    def plugin(self, name: str) -> Plugin | None:
        """The plug-in that brings a name; None for silotune's own, and for one that there is not.

        Raises:
            PluginError: The name is defined twice.
        """
        return plugins.named(self.group, name, is_own=name in self._classes) if self.group else None

    def _brought(self, plugin: Plugin) -> type[ChoiceType]:
        """The class that a plug-in brings, where it is one of this choice and of its own name."""
        brought, base = plugin.load(), self._base()
        if not (isinstance(brought, type) and issubclass(brought, base)):
            raise PluginError(
                f"the plug-in {plugin.name!r} of {plugin.origin} is no subclass of {base.__name__}, which "
                f"{self.where} takes"
            )
        if brought.type != plugin.name:
            raise PluginError(
                f"the plug-in {plugin.name!r} of {plugin.origin} calls itself type = {brought.type!r}: make both alike"
            )
        return brought

    def _base(self) -> type[ChoiceType]:
        """The class that all choices of this table are subclasses of."""
        first = self._classes[self.default]
        found: type[ChoiceType] = next(
            each
            for each in reversed(first.__mro__)
            if issubclass(each, Choice) and each is not Choice  # type: ignore[assignment]
        )
        return found

    def those(self, trait: str) -> list[str]:
        """The names of which something is true: ``trait`` is a class variable."""
        return [name for name, settings in self._classes.items() if getattr(settings, trait)]

    def owners(self, setting: str) -> list[str]:
        """The names that have a setting of this name."""
        return [name for name, settings in self._classes.items() if setting in settings.model_fields]

    def named(self, name: str) -> str:
        """A name of the choice, for lists of such.

        Raises:
            PydanticCustomError: It is unknown.
        """
        if name not in self:
            raise self._unknown_name(name)
        return name

    @property
    def default(self) -> str:
        """The name that a table without one means."""
        return next(iter(self))

    def put_over(self, below: Any, above: Any) -> Any:
        """What two documents together say of the choice, the second of them put over the first.

        A plain name takes the place of all that was said. A table adds settings to what was chosen below; where it
        names another choice, those settings stay that this one has, too.
        """
        if not isinstance(above, Mapping):
            return above
        kept = {TYPE: below} if isinstance(below, str) else dict(below) if isinstance(below, Mapping) else {}
        name = above.get(TYPE, kept.get(TYPE, self.default))
        if name not in self:
            return {**kept, **above}
        if name != kept.get(TYPE, self.default):
            kept = {key: value for key, value in kept.items() if key in self[name].model_fields}
        return overlay(self[name], kept, above)

    def read(self, given: Any) -> Any:
        """The settings that a name, or a table, stands for.

        Raises:
            ValidationError: The name is unknown, or a setting is wrong, or it is one of another choice.
        """
        if isinstance(given, Choice):
            return given
        if isinstance(given, str):
            given = {TYPE: given}
        if not isinstance(given, Mapping):
            raise PydanticCustomError("choice_type", "A name is needed, or a table with a type and its settings")
        name = given.get(TYPE, self.default)
        if not isinstance(name, str) or name not in self:
            raise self._unknown_name(str(name))
        settings = self[name]
        known = {key: value for key, value in given.items() if key in settings.model_fields}
        faults = [
            InitErrorDetails(type=self._unknown(str(key), name), loc=(str(key),), input=value)
            for key, value in given.items()
            if key not in known and key != TYPE
        ]
        try:
            made = settings.model_validate(known)
        except ValidationError as error:
            faults += [_again(fault) for fault in error.errors(include_url=False)]
        if faults:
            raise ValidationError.from_exception_data(self.where, faults)
        return made

    def _unknown_name(self, name: str) -> PydanticCustomError:
        return _fault(unknown_choice("value", name, plugins.offered(self.group, self)))

    def _unknown(self, key: str, name: str) -> PydanticCustomError:
        """What is wrong with a setting that the choice of this name does not have."""
        owners = " and ".join(map(repr, self.owners(key)))
        if owners:
            return _fault(f"this is a setting of {owners} and means nothing with {name!r}")
        return _fault(unknown_choice("key", key, (TYPE, *self[name].model_fields)))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))


FAULT = "choice"
"""The type of a fault whose text says all, but for the place."""


def _fault(text: str) -> PydanticCustomError:
    return PydanticCustomError(FAULT, "{text}", {"text": text})


def _again(fault: Mapping[str, Any]) -> InitErrorDetails:
    """A fault that pydantic has found already, to stand among others."""
    made: str | PydanticCustomError = fault["type"]
    try:
        PydanticKnownError(fault["type"], fault.get("ctx"))
    except KeyError:  # one of our own
        made = PydanticCustomError(fault["type"], "{text}", {"text": fault["msg"]})
    return InitErrorDetails(type=made, loc=fault["loc"], input=fault["input"], ctx=fault.get("ctx", {}))


def implemented(table: Mapping[type[Any], Made], choice: Choice) -> Made:
    """What does the work of a choice: silotune's own stand in a table, a plug-in's class says its own.

    Raises:
        PluginError: A plug-in does not say, or cannot be imported.
    """
    found = table.get(type(choice))
    made: Made = found if found is not None else implementation_of(type(choice))
    return made


def implementation_of(brought: type[Choice]) -> Any:
    """What does the work of a plug-in's choice, by its class.

    Raises:
        PluginError: The plug-in does not say, or cannot be imported.
    """
    try:
        return brought.implementation()
    except PluginError:
        raise
    except Exception as error:  # another's package: whatever it raises is told under its name
        raise PluginError(f"the implementation of the plug-in {brought.type!r} cannot be had: {error}") from error


def brought_by(section: BaseModel) -> Iterator[Plugin]:
    """The plug-ins that a section and what it holds make use of."""
    for name in type(section).model_fields:
        value, table = getattr(section, name), table_of(type(section), name)
        if table is not None and isinstance(value, Choice) and (plugin := table.plugin(value.type)) is not None:
            yield plugin
        if isinstance(value, BaseModel):
            yield from brought_by(value)


def table_of(section: type[BaseModel] | None, name: str) -> Table[Any] | None:
    """The table that a field of a section is read by; None for every other field."""
    field = section.model_fields.get(name) if section is not None else None
    return next((each for each in field.metadata if isinstance(each, Table)), None) if field is not None else None


def table_at(section: type[BaseModel], path: Sequence[str]) -> Table[Any] | None:
    """The table of the choice at a path of keys below a section, which may go through other choices."""
    sections, table = [section], None
    for key in path:
        table = next((found for each in sections if (found := table_of(each, key)) is not None), None)
        inner = [section_of(each, key) for each in sections] if table is None else [table[name] for name in table]
        sections = [each for each in inner if each is not None]
    return table


def section_of(section: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The section that a field holds: by itself, as the entries of a list, or as one of several types."""
    field = section.model_fields.get(name) if section is not None else None
    return next(_sections_in(field.annotation), None) if field is not None else None


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections_in(inner)


def depends_of(section: type[BaseModel] | None) -> Mapping[str, Needs]:
    """Key of a section -> what it needs of another key beside it to mean anything."""
    return section.depends if section is not None and issubclass(section, Section) else {}


def void_with(section: type[BaseModel] | None, said: Mapping[str, Any]) -> set[str]:
    """The keys of a section that mean nothing with what is said of the keys that they depend on."""
    return {
        key for key, needs in depends_of(section).items() if needs.key in said and not needs.is_met(said[needs.key])
    }


def overlay(section: type[BaseModel] | None, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A document of a section with the values of another one put over it, table by table.

    What was said below of a key that means nothing with a value above is left out: who asks for another scheme of a
    partition does not mean the field that the first one was dealt by.
    """
    void = void_with(section, above)
    result = {key: value for key, value in below.items() if key not in void}
    for key, value in above.items():
        table, old = table_of(section, key), result.get(key)
        if table is not None:
            result[key] = table.put_over(old, value)
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = overlay(section_of(section, key), old, value)
        else:
            result[key] = value
    return result
