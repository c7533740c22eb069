"""What a site does with a run that reaches it: opens its own examples and the resident base for the run's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from silotune.config import Config, plugins_of, validated
from silotune.data.load import read_noted
from silotune.data.mixture import load_examples, tasks_of
from silotune.data.rows import Task, with_columns
from silotune.data.tasks import resolve
from silotune.errors import DataError, ModelError, unknown_choice
from silotune.experiment.examples import check_objective, encoded_apart, notes_of, spread
from silotune.experiment.held_back import hold_back, sampled
from silotune.experiment.prepare import adapted_of, client_shares
from silotune.experiment.scoring import encoder_for
from silotune.federation.site.layouts import expected_of
from silotune.federation.site.state import Site
from silotune.federation.wire.run_setup import Setup, run_settings, without_places
from silotune.methods.ranks import client_ranks
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.fingerprint import fingerprint, folder_of
from silotune.models.threads import threads_of
from silotune.record.environment import cores
from silotune.settings.sections import FileSettings, ModelSection, TaskSection
from silotune.structs import Example, Tensors
from silotune.training.encode import Encoded
from silotune.transports.trainer_host import Opened


@dataclass(frozen=True)
class Holdings:
    """What a site has: its name, its base model, its examples.

    Attributes:
        name: As the coordinator knows it.
        model: Folder of the base, or ``nano``; None for the one that the run names.
        device: Where it trains; None for what the run says.
        fingerprint: That the base must have; None for any that the run's coordinator has, too.
        task: The only task that its examples are for; empty where it has none of its own.
        definition: Of the task ``custom``: the only one that a run may have, as its setup has it; None for any over
            ``columns``.
        columns: Column that a task names -> column of the site's file.
        train: Its examples; None for its share of a task that is generated.
        files: How the file of its examples is read.
        threads: CPU threads; None for what the run says.
        is_simulated: It has its share of whatever data the run names: all data are in one place anyway.
    """

    name: str
    model: str | None = None
    device: str | None = None
    fingerprint: str | None = None
    task: str = ""
    definition: TaskSection | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    train: Path | None = None
    files: FileSettings = FileSettings()
    threads: int | None = None
    is_simulated: bool = False


def setup_of(config: Config, *, is_simulated: bool = False, base: str | None = None) -> dict[str, Any]:
    """The setup that a coordinator sends with a run, as plain JSON; a simulation's names its data.

    Raises:
        ModelError: The base model is not on this machine, so that its fingerprint cannot be told.
    """
    if is_simulated:
        return Setup(config=config, plugins=plugins_of(config)).model_dump(mode="json")
    found = fingerprint(folder_of(config.model)) if base is None else base
    return Setup(config=without_places(config), base=found, plugins=plugins_of(config)).model_dump(mode="json")


@dataclass
class Resident:
    """The base model in memory with its adapter, what it was made for, and how often a base was read from disk.

    ``threads`` are the process's own, while a run has others.
    """

    needs: Any = None
    adapted: Adapted | None = None
    initial: Tensors = field(default_factory=dict)
    loads: int = 0
    threads: int | None = None

    def use_threads(self, adapted: Adapted, asked: int | None) -> None:
        """The threads that suit a model, of as many as are asked for (no more than cores), or of the process's own."""
        import torch

        self.rest()
        self.threads = torch.get_num_threads()
        torch.set_num_threads(threads_of(adapted, asked and min(asked, cores())).an_operation)

    def rest(self) -> None:
        """The threads are the process's own again."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
            self.threads = None


Equip = Callable[[Site, Config], Site]
"""What a site adds to a run that it opens: its keys, its ledger."""


def _as_it_is(site: Site, config: Config) -> Site:
    return site


class SiteDesk:
    """Opens runs at one site; the base model stays in memory between them.

    Args:
        holdings: What the site has.
        equip: Gives the site of a run what is its own.
        resident: The base model; several sites of one process may share it.
    """

    def __init__(self, holdings: Holdings, equip: Equip = _as_it_is, *, resident: Resident | None = None) -> None:
        self._holdings, self._equip = holdings, equip
        self._resident = resident or Resident()

    def open(self, setup: Mapping[str, Any]) -> Opened:
        """The site for a run.

        Raises:
            ConfigError: The setup does not hold together.
            ModelError: The base is not the run's, or not on this machine.
            DataError: The examples are not for the run's task, or do not fit it.
        """
        asked = validated(Setup, dict(setup), source="a run's setup")
        config = self._own(asked.config)
        task = resolve(config.data)
        tasks, examples, notes = self._examples(config, task)
        for each in tasks:
            check_objective(config, each)
        adapted, initial = self._adapted(config, task, asked.base)
        encoded, places = encoded_apart(encoder_for(config, adapted.base), examples)
        notes = [*notes, *notes_of(encoded, places, "train", truncate=config.data.truncate)]
        own = [encoded[place] for place in spread(range(len(examples)), places)]
        base = adapted.base
        classes = len(base.labels)
        held = hold_back(own, config, client=self._holdings.name, tokenizer=base.tokenizer, classes=classes)
        site = self._equip(
            Site(
                self._holdings.name,
                held.trained,
                adapted,
                initial=initial,
                settings=run_settings(config),
                members=_attacked(held.members, config, "members"),
                reserve=_attacked(held.reserve, config, "reserve"),
            ),
            config,
        )
        expected = expected_of(config.federation, initial, rank=self._rank(config, initial))
        keep = config.record.checkpoint_every + 1
        return Opened(site, expected, keep=keep, zstd=config.federation.upload.zstd, notes=tuple(notes))

    def rest(self) -> None:
        """Keeps the base and its adapter; the threads are the process's own again."""
        self._resident.rest()

    def state(self) -> dict[str, Any]:
        """The base that is held, and how often one was read from disk."""
        adapted = self._resident.adapted
        return {"base": adapted.base.name if adapted else "", "base_loads": self._resident.loads}

    def _own(self, config: Config) -> Config:
        """The run's configuration with this site's own model and device."""
        own = {"name": self._holdings.model, "device": self._holdings.device}
        changes = {key: value for key, value in own.items() if value is not None}
        return config.model_copy(update={"model": config.model.model_copy(update=changes)})

    def _rank(self, config: Config, initial: Tensors) -> int | None:
        """This site's own rank, where the run gives it one."""
        name, federation = self._holdings.name, config.federation
        ranks = {name: federation.ranks[name]} if name in federation.ranks else {}
        memory = {name: federation.memory_mb[name]} if name in federation.memory_mb else {}
        value = config.training.optimizer.bytes_a_value
        found = client_ranks(initial, ranks, memory_mb=memory, most_values={}, bytes_a_value=value)
        return found.get(name)

    def _examples(self, config: Config, task: Task) -> tuple[Sequence[Task], Sequence[Example], Sequence[str]]:
        """The tasks that this site has examples of in the run, the examples, and notes on how they were read."""
        own, tasks = self._holdings, tasks_of(config.data)
        if own.task and own.task not in tasks:
            raise DataError(f"the run is for task {task.name!r}, this site's examples are for {own.task!r}")
        if own.train is not None:
            if not own.task:
                raise DataError("set data.task in site.toml: only the site says which columns of its file are read")
            task = task_at(own, tasks[own.task], config.data.definition)
            examples, notes = read_noted(own.train, task, own.files)
            return [tasks[own.task]], examples, notes
        strange = [name for name, each in tasks.items() if not each.embedded]
        if strange and not own.is_simulated:
            raise DataError(f"task {strange[0]!r} is not generated: set data.train in site.toml to this site's file")
        dataset = load_examples(config.data, seed=config.seed)
        shares = client_shares(config, dataset)
        if own.name not in shares:
            raise DataError(f"{unknown_choice('site', own.name, shares)}: it has no share of {task.name!r}")
        return dataset.tasks or (task,), [dataset.splits["train"][index] for index in shares[own.name]], ()

    def _adapted(self, config: Config, task: Task, base: str) -> tuple[Adapted, Tensors]:
        """The resident base with the run's adapter: as it is, with another adapter, or read from disk."""
        head = (task.options, config.seed) if config.training.objective.has_head else ()
        drawn = () if config.federation.lora.is_plain else (config.federation.lora, config.seed)
        needs = (config.model, config.adapter, head, drawn, base)
        held = self._resident
        if held.adapted is None or held.needs != needs:
            held.adapted = None  # before another is read: there may be no room for two
            check_base(config.model, base, self._holdings.fingerprint)
            made = adapted_of(config, task)
            held.needs, held.adapted, held.initial, held.loads = needs, made, adapters.read(made), held.loads + 1
        held.use_threads(held.adapted, self._holdings.threads or config.training.threads)
        return held.adapted, held.initial


def _attacked(examples: Sequence[Encoded], config: Config, purpose: str) -> list[Encoded]:
    """Those of a site's examples by which it measures what a model gives away; none where the run asks for none."""
    most = config.audit.max_examples if config.audit.leakage else 0
    return [examples[place] for place in sampled(len(examples), most, seed=config.seed, purpose=purpose)]


def task_at(own: Holdings, task: Task, definition: TaskSection | None) -> Task:
    """A task as a site's file has it: under the names of the site's own columns, and over none that it does not offer.

    Args:
        own: What the site has.
        task: As the run has it.
        definition: The run's, of the task ``custom``.

    Raises:
        DataError: The site has another definition, or the task reads a column that the site does not offer.
    """
    if task.name == "custom" and own.definition is None:
        task = _over(own.columns, task)
    elif task.name == "custom" and own.definition != definition:
        raise DataError("the run's own task is another than [data.definition] in site.toml says")
    else:
        known = {column for layout in task.layouts for column in (*layout.required(), *layout.columns.values())}
        strange = sorted(set(own.columns) - known)
        if strange:
            raise DataError(f"[data.columns] in site.toml: {unknown_choice('column of the task', strange[0], known)}")
    return with_columns(task, own.columns)


def _over(columns: Mapping[str, str], task: Task) -> Task:
    """A run's own task over the columns that a site offers, without the fields that it does not.

    Raises:
        DataError: It cannot be read without a column that the site does not offer.
    """
    for layout in task.layouts:
        strange = [name for name in layout.required() if name not in columns]
        if strange:
            raise DataError(
                f"the run's own task reads {strange[0]!r}, which [data.columns] in site.toml does not offer: add "
                f'{strange[0]} = "a column of this site\'s file" there if it may be read'
            )
    layouts = (
        replace(layout, fields={name: column for name, column in layout.fields.items() if column in columns})
        for layout in task.layouts
    )
    return replace(task, layouts=tuple(layouts), offered=tuple(columns.values()))


def check_base(section: ModelSection, wanted: str, pinned: str | None) -> None:
    """Refuses a base that is not the run's or not the one that the site's kit names.

    Raises:
        ModelError: The fingerprints differ, or the base is not on this machine.
    """
    if not wanted and pinned is None:
        return
    own = fingerprint(folder_of(section))
    for other, whose in ((wanted, "the coordinator's"), (pinned, "the one in site.toml")):
        if other and other != own:
            raise ModelError(f"base model {section.name!r} has fingerprint {own[:16]}..., {whose} has {other[:16]}...")
