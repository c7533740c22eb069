"""Uses a trained adapter again: load it for generation, score it on another set, export it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.config import Config
from silotune.data.load import Dataset, read_whole
from silotune.data.mixture import load_examples, load_scored_examples
from silotune.data.rows import Task, to_example
from silotune.data.tasks import resolve
from silotune.errors import DataError, ModelError, RunFolderError
from silotune.experiment.card import model_card
from silotune.experiment.needs import config_of
from silotune.experiment.prepare import base_of
from silotune.experiment.scoring import closed_labels, scored_examples, scorer_of
from silotune.experiment.start import read_adapter
from silotune.lora import padded
from silotune.models import adapters
from silotune.models.adapters import Adapted
from silotune.models.load import load_base, load_generation, load_tokenizer
from silotune.models.threads import operation_threads, threads_of
from silotune.record.files import new_folder
from silotune.record.runs import RunFolder, is_run
from silotune.record.tensor_files import writing
from silotune.settings.adapters import Lora
from silotune.settings.sections import FileSettings, ModelSection
from silotune.structs import Example, Row
from silotune.training.probe import probed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tuned(path: str | Path, *, mode: str = "federated", base: bool = False) -> Adapted:
    """The base model of a run with the adapter of one of its parts, to write text with.

    Args:
        path: A run folder; or a model's folder, Hub id or ``nano``, which is loaded as it is.
        mode: ``federated``, ``centralized`` or ``isolated/<client>``.
        base: Leave the adapter at its initial values, which do not change the base.

    Raises:
        RunFolderError: The part has no adapter.
        ModelError: The base model is not found, the adapter does not fit it, or it is a classifier.
    """
    if not is_run(path):
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise RunFolderError(
                f"{str(path)!r} is neither a run folder nor a model: give the folder that 'silotune run' printed, or "
                "one that 'silotune export --merge' made"
            )
        found = load_base(ModelSection(name=str(path), max_length=8))
        return Adapted(found, found.model, {}, {})
    folder = RunFolder.open(path)
    config = config_of(folder)
    if _is_classifier(config):
        raise ModelError(
            f"{str(path)!r} holds a classifier (training.objective = {config.training.objective.type!r}), which writes "
            "no text; score it with 'silotune evaluate'"
        )
    if base:
        return adapters.attach(load_base(config.model), config.adapter, seed=config.seed)
    return _load(folder, config, mode)


def _load(folder: RunFolder, config: Config, mode: str, *, knows_start: bool = False) -> Adapted:
    """The base model that a configuration names, with the adapter of one part of a run.

    ``knows_start`` reads what training began with, too; to write text or to merge it need no longer be there.
    """
    tensors, saved = _part(folder, mode).load_adapter()
    section = config.adapter
    if isinstance(section, Lora):  # a residual of the federated rounds makes the saved rank larger than the trained one
        section = section.model_copy(update={"rank": saved["r"], "alpha": saved["lora_alpha"]})
    base = base_of(config, resolve(config.data))
    adapted = adapters.attach(base, section, seed=config.seed, known_rank=saved.get("r", 0))
    if knows_start and section.begins_from is not None:
        adapted = adapters.begin_from(adapted, padded(read_adapter(section.begins_from), saved.get("r")))
    adapters.write(adapted, tensors)
    return adapted


def next_command(path: str | Path) -> str:
    """What a person may type to try the model of a finished run."""
    folder = RunFolder.open(path)
    config = config_of(folder)
    modes = [str(part.parent.relative_to(folder.path)) for part in sorted(folder.path.rglob("adapter/"))]
    chosen = [] if "federated" in config.federation.modes or not modes else ["--mode", modes[0]]
    return shlex.join(["silotune", "evaluate" if _is_classifier(config) else "chat", str(path), *chosen])


def _is_classifier(config: Config) -> bool:
    return config.training.objective.has_head


def evaluate(
    path: str | Path,
    *,
    mode: str = "federated",
    split: str = "test",
    data: str | Path | Sequence[Row] | None = None,
    scoring: str | None = None,
) -> dict[str, Any]:
    """Scores the adapter of a run on a split of its data, or on a file or rows of the same task.

    Of a run over sites, the training examples are not here: it is scored on what its coordinator scores on.

    Returns:
        The figures, with ``model`` (which adapter), ``split`` (on what) and ``notes`` on how a file was read, and on
        what was cut.

    Raises:
        SilotuneError: Run, adapter, split or file are not there.
    """
    folder = RunFolder.open(path)
    config = config_of(folder)
    changes: dict[str, Any] = {} if scoring is None else {"scoring": scoring}
    task = resolve(config.data)
    if scoring == "generation" and not task.options and task.answer != "mixture":
        raise DataError(f"scoring = 'generation' compares with options, and task {task.name!r} has none: leave it out")
    if data is not None:
        name, examples, notes = _other_examples(data, task, config.data)
        dataset = Dataset(task, {name: examples})
        changes["max_examples"] = None
    else:
        read = load_scored_examples if folder.is_of_sites() else load_examples
        dataset, name, notes = read(config.data, seed=config.seed), split, []
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changes)})
    adapted = probed(_load(folder, config, mode, knows_start=True), config.model)
    scored, _ = scored_examples(config, dataset, name)
    scorer, _, note = scorer_of(config, adapted, dataset, scored, name=name)
    with operation_threads(threads_of(adapted, config.training.threads).an_operation):
        figures = scorer(adapters.read(adapted))
    return {
        "model": f"{config.model.name} + {folder.path.name}/{mode}",
        **figures,
        "notes": [*notes, *([note] if note else [])],
    }


def _other_examples(
    data: str | Path | Sequence[Row], task: Task, files: FileSettings
) -> tuple[str, tuple[Example, ...], list[str]]:
    """What examples that are no split are called in results, and the examples, of a file or of rows, with notes."""
    if isinstance(data, str | Path):
        return (str(data), *read_whole(data, task, files))
    name = "given rows"
    rows = enumerate(data, start=1)
    return name, tuple(to_example(task, row, where=name, number=number) for number, row in rows), []


def sample_prompts(path: str | Path, count: int) -> list[tuple[tuple[tuple[str, str], ...], str]]:
    """Prompts (as messages) with their right answers, spread over the classes of a run's test split.

    Raises:
        DataError: The test split is empty.
    """
    config = config_of(RunFolder.open(path))
    examples = load_examples(config.data, seed=config.seed).splits["test"]
    if not examples:
        raise DataError("the test split holds no examples")
    by_label: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(place)
    turns = [places[turn] for turn in range(count) for places in by_label.values() if turn < len(places)]
    return [(examples[place].messages, examples[place].answer) for place in turns[:count]]


def export(path: str | Path, out: str | Path, *, merge: bool, mode: str = "federated") -> Path:
    """Writes an adapter in peft's format, or the base with the adapter merged in, that plain transformers loads.

    Both come with the tokenizer, its chat template, and where answers end.

    Args:
        path: A run folder.
        out: A folder that does not exist yet.
        merge: Merge the adapter into the base's weights.
        mode: ``federated``, ``centralized`` or ``isolated/<client>``.

    Raises:
        RunFolderError: ``out`` exists, the part has no adapter, or the disk is full; nothing is left behind.
        ModelError: There is no adapter apart from the weights (``adapter.type = 'none'`` without ``merge``), or the
            base is not there.
    """
    target = Path(out)
    if target.exists():
        raise RunFolderError(f"{str(target)!r} is already there; give a folder that does not exist")
    folder = RunFolder.open(path)
    part, config = _part(folder, mode), config_of(folder)
    part.load_adapter()
    if not merge and config.adapter.is_whole:
        raise ModelError("a run with adapter.type = 'none' has no separate adapter; export it with --merge")
    with new_folder(target) as building:
        if merge:
            _save_merged(folder, config, mode, building)
            card = model_card(
                config,
                mode.split("/")[0],
                resolve(config.data),
                part.read_json("result"),
                is_merged=True,
            )
            (building / "README.md").write_text(card, encoding="utf-8")
        else:
            part.copy_adapter(building)
            _save_words(config, load_tokenizer(config.model), building)
    return target


def loader_of(path: str | Path, out: str | Path, *, merge: bool) -> str:
    """The line of code with which peft or transformers loads what ``export`` wrote from a run."""
    config = config_of(RunFolder.open(path))
    has_head = _is_classifier(config)
    purpose = "SequenceClassification" if has_head else "CausalLM"
    place = repr(str(out))
    if merge:
        return f"transformers.AutoModelFor{purpose}.from_pretrained({place})"
    # an adapter's file does not name the classes, and peft takes two
    named = f", id2label={dict(enumerate(closed_labels(resolve(config.data))))}" if has_head else ""
    if config.model.name != "nano":
        return f"peft.AutoPeftModelFor{purpose}.from_pretrained({place}{named})"
    base = f"transformers.AutoModelFor{purpose}.from_pretrained(silotune.models.load.nano_folder(){named})"  # no Hub id
    return f"peft.PeftModel.from_pretrained({base}, {place})"


def _save_words(config: Config, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """What is needed to use a model without its run: the tokenizer with its chat template, and where answers end.

    Raises:
        ModelError: The base is not there.
    """
    with writing(out):
        tokenizer.save_pretrained(out)
        if not _is_classifier(config):  # written as it is: some bases sample by settings that a check refuses to save
            load_generation(config.model, tokenizer).to_json_file(out / "generation_config.json")


def _save_merged(folder: RunFolder, config: Config, mode: str, out: Path) -> None:
    if config.model.precision == "int4":
        # An int4 base cannot hold the sum: the adapter is merged into the base's weights in float32.
        config = config.model_copy(
            update={
                "model": config.model.model_copy(update={"precision": "float32"}),
                "adapter": config.adapter.on_whole_weights(),
            }
        )
    adapted = _load(folder, config, mode)
    model = adapters.merged(adapted)
    model.config.use_cache = True
    with writing(out):
        model.save_pretrained(out)
    tokenizer = adapted.base.tokenizer
    if adapted.base.labels and tokenizer.pad_token_id is None:  # batches are padded with what the model looks for
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(adapted.base.pad_id)
    _save_words(config, tokenizer, out)


def _part(folder: RunFolder, mode: str) -> RunFolder:
    names = mode.split("/")
    part = folder.part(*names)
    if not (part.path / "adapter").is_dir():
        found = sorted(str(place.parent.relative_to(folder.path)) for place in folder.path.rglob("adapter/"))
        there = ", ".join(found) if found else "none yet: 'silotune resume' finishes the run"
        raise RunFolderError(f"{str(folder.path)!r} has no adapter of {mode!r}; there is: {there}")
    return part
