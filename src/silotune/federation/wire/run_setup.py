"""The settings that both sides of a run act by, and the setup that tells them to sites and names no place.

``without_places`` removes from a configuration all that names a file, a folder or a service. A coordinator sends the
result, and a site refuses a setup that the function would still change. So no path from a coordinator reaches a site,
whoever wrote the setup.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from silotune.config import Config, plugins_of
from silotune.data.tasks import resolve
from silotune.errors import ConfigError, PolicyError
from silotune.record.environment import version_of
from silotune.record.plain_json import sha256, strict_object
from silotune.settings.base import Section, exactly
from silotune.settings.sections import (
    DataSection,
    EvaluationSection,
    FederationSection,
    FileSettings,
    ModelSection,
    PartitionSection,
    PrivacySection,
    RecordSection,
    TaskSection,
    TrainingSection,
)

MOST_SETUP_BYTES = 1 << 20
"""Most bytes of a setup as JSON, checked before it is parsed; a configuration takes a few thousand."""


class Setup(Section):
    """What a run tells its sites, once with every message: the settings they need, none of the coordinator's places.

    ``base`` is the fingerprint of the coordinator's base model; empty where it has none on disk. ``plugins`` are the
    packages whose plug-ins the configuration uses, with their versions.
    """

    config: Config
    plugins: dict[str, str] = {}
    base: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""


def without_places(config: Config) -> Config:
    """The configuration without all that names a file, a folder, a model or a service, and what is the coordinator's
    own business: how it scores, records, its simulated clock, and the adapter that training begins from, whose tensors
    travel in the first round. A site brings its own base model and its own examples, and takes part in no split
    training: what it would send is as good as its text.
    """
    data, definition = config.data, config.data.definition
    nowhere: dict[str, Any] = {name: DataSection.model_fields[name].default for name in _OF_DATA}
    if data.partition.scheme == "file" or data.partition.files:
        nowhere["partition"] = PartitionSection()
    if definition is not None:
        nowhere["definition"] = without_hub(definition)
    of_model = {name: ModelSection.model_fields[name].default for name in _OF_MODEL}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=of_model),
            "adapter": config.adapter.without_start(),
            "data": data.model_copy(update=nowhere),
            "federation": config.federation.model_copy(
                update={"clock": None, "split": None, "policies": {}, "engine": "in_process"}
            ),
            "privacy": config.privacy.without_ledger(),
            "evaluation": EvaluationSection(**{name: getattr(config.evaluation, name) for name in _OF_SCORING}),
            "record": RecordSection(checkpoint_every=config.record.checkpoint_every),
        }
    )


def without_hub(definition: TaskSection) -> TaskSection:
    """A task's definition without the data set that its rows may come from: a site's come from its own file."""
    return definition.model_copy(update={"hub_id": None, "hub_config": None})


_OF_DATA = ("source", "root", "train", "validation", "test", *FileSettings.model_fields)
_OF_SCORING = ("scoring", "batch_size", "max_new_tokens")
"""What sites score by, where they score on their own examples."""
_OF_MODEL = ("name", "revision", "device", "offline")


def setup_object(data: bytes) -> dict[str, Any]:
    """The JSON object that came beside a request as its run's setup, in its canonical form.

    Raises:
        PolicyError: The setup is longer than any run needs.
        MessageError: It is not an object within bounds.
    """
    if len(data) > MOST_SETUP_BYTES:
        raise PolicyError("setup", f"the run's setup has {len(data)} bytes, at most {MOST_SETUP_BYTES} are read")
    return strict_object(data, "setup", is_prose=True)


def read_setup(document: Mapping[str, Any]) -> Setup:
    """The setup that came with a request, every value exactly of its type, and none that names a place.

    Raises:
        PolicyError: It is not a valid setup, or it names a place at this site.
    """
    try:
        setup = exactly(Setup, document)
    except ValueError as error:
        raise PolicyError("setup", f"the run's setup is not valid at {str(error)!r}") from None
    if not setup.base:
        raise PolicyError("setup", "the run's setup names no base model by its fingerprint")
    if setup.plugins != plugins_of(setup.config):
        raise PolicyError("plugins", "the run's setup names other packages than those whose plug-ins it uses")
    wanted = without_places(setup.config)
    if wanted != setup.config:
        odd = next(differing(wanted.model_dump(mode="json"), setup.config.model_dump(mode="json")), "it")
        raise PolicyError(
            "setup", f"the run's setup sets {odd}: leave it out, a site takes such a place from its site.toml"
        )
    return setup


def check_plugins(document: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Refuses a setup whose plug-ins are not allowed, or not installed in that version; it imports none of them.

    Args:
        document: The setup, not yet read.
        allowed: Packages whose plug-ins may be used.

    Raises:
        PolicyError: A package is not allowed, not installed, or installed in another version.
    """
    named = document.get("plugins", {})
    if not isinstance(named, Mapping) or not all(isinstance(said, str) for said in named.values()):
        raise PolicyError("setup", "the run's setup does not say which plug-ins it uses")
    for package, version in named.items():
        if package not in allowed:
            raise PolicyError("plugins", f"the run uses plug-ins of {package!r}, which policy.toml does not allow")
        own = version_of(package)
        if own != version:
            here = f"version {own} is installed here" if own else "it is not installed here"
            raise PolicyError("plugins", f"the run uses {package!r} {version}, and {here}")


def differing(left: Mapping[str, Any], right: Mapping[str, Any], *, within: str = "") -> Iterator[str]:
    """Dotted names of the values that differ."""
    for name in (*left, *(name for name in right if name not in left)):
        one, other = left.get(name), right.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differing(one, other, within=f"{within}{name}.")
        else:
            yield f"{within}{name}"


MOST_LABELS, LONGEST_LABEL = 256, 256
"""Most options that clients score over, and most characters of one: a reply holds a number for every pair of
options."""


@dataclass(frozen=True)
class RunSettings:
    """What the clients of a run do, and what the coordinator believes of it.

    Attributes:
        training: How a local round trains.
        federation: The method, and how messages are compressed.
        privacy: The guarantee and the protection.
        evaluation: How clients score on their own examples.
        labels: The options that they score over; empty for open answers.
    """

    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    labels: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the settings; an order names it where no setup travels, as in a run in one process."""
        sections = (self.training, self.federation, self.privacy, self.evaluation)
        return sha256([*(section.model_dump(mode="json") for section in sections), list(self.labels)])


def run_settings(config: Config) -> RunSettings:
    """The settings of a run's federated mode."""
    labels = tuple(resolve(config.data).options)
    return RunSettings(config.training, config.federation, config.privacy, config.evaluation, labels)


def check_scorable(labels: tuple[str, ...]) -> None:
    """Refuses options that clients cannot score over.

    Raises:
        ConfigError: There are too many options, one is too long, or one stands twice.
    """
    if len(labels) > MOST_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
        raise ConfigError(
            f"clients score over at most {MOST_LABELS} options of {LONGEST_LABEL} characters each: "
            "leave evaluation.per_client out"
        )
    if len(set(labels)) != len(labels):
        raise ConfigError("an option of the task stands twice: clients cannot score over it")
