"""The configuration of a run: strict sections, read from TOML with overrides, all faults reported at once."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from silotune.errors import ConfigError, unknown_choice

Precision = Literal["float32", "bfloat16", "int4"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
AdapterKind = Literal["lora", "qlora", "ia3", "none"]
Scheme = Literal["iid", "dirichlet", "field", "quantity", "file"]
Objective = Literal["sft", "choice", "classify"]
Wording = Literal["auto", "prompt", "text"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["constant", "cosine"]
Algorithm = Literal["fedavg", "fedprox"]
Mode = Literal["federated", "isolated", "centralized"]
Scoring = Literal["likelihood", "generation"]
Metric = Literal["accuracy", "macro_f1", "perplexity"]
AnswerFormat = Literal["label", "letter", "cloze", "text"]

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SectionType = TypeVar("SectionType", bound=Section)


class ModelSection(Section):
    """The base model that all institutions share."""

    name: str = Field("nano", description="Hub id, local folder, or 'nano' (shipped)")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    precision: Precision = Field("float32", description="weights of the base; int4 is bitsandbytes NF4")
    device: Device = Field("auto", description="auto takes cuda, then mps, then cpu")
    attention: Attention = Field("auto", description="implementation; auto leaves it to transformers")
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens of prompt and answer together")
    gradient_checkpointing: bool = Field(False, description="less memory, slower steps")
    autocast: bool = Field(False, description="bfloat16 autocast around the forward pass")
    offline: bool = Field(False, description="never ask the Hub, as HF_HUB_OFFLINE=1 does")


class AdapterSection(Section):
    """The small part that is trained and sent."""

    kind: AdapterKind = Field("lora", description="qlora is lora on an int4 base; none trains all weights")
    rank: Positive = Field(8, description="of lora and qlora")
    alpha: Annotated[float, Field(gt=0)] = Field(
        16, description="of lora and qlora: the update is scaled by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of lora and qlora")
    targets: Literal["auto", "all-linear"] | tuple[str, ...] = Field(
        "auto", description="'auto' (peft's map for the architecture), 'all-linear', or module names"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), Kalajdzievski 2023")
    dora: bool = Field(False, description="weight-decomposed LoRA, Liu et al. 2024")


class TaskSection(Section):
    """A task of the user's own: how a row becomes a prompt and an answer."""

    prompt: str = Field(description="template over the columns, e.g. 'Classify: {text}\\nAnswer:'")
    answer: str = Field(description="column that holds the answer")
    system: str = Field("", description="system message before every prompt")
    options: tuple[str, ...] = Field((), description="closed set of answers; empty for open answers")
    label_names: dict[str, str] = Field({}, description="raw value in the answer column -> option")
    metric: Metric = Field("accuracy", description="what ranks models; open answers always have perplexity")
    fields: tuple[str, ...] = Field((), description="columns that a partition may use")
    hub_id: str | None = Field(None, description="data set on the Hub, where no files are given")
    hub_config: str | None = Field(None, description="configuration of that data set")


class PartitionSection(Section):
    """How the training examples are spread over clients."""

    scheme: Scheme = Field("dirichlet", description="field: one client per value; file: one client per file")
    clients: Positive = Field(4, description="number of clients; schemes field and file make their own")
    alpha: Annotated[float, Field(gt=0)] = Field(0.3, description="Dirichlet concentration; small is skewed")
    field: str = Field("label", description="label, a field of the task such as subject, or both: subject+label")
    min_examples: Positive = Field(4, description="fewest examples a client may hold")
    files: dict[str, Path] = Field({}, description="scheme 'file': client name -> training file")


class DataSection(Section):
    """Where the examples come from."""

    task: str = Field("finance-news", description="a name from 'silotune tasks' or 'custom'")
    source: Literal["auto", "embedded", "local", "hub"] = Field(
        "auto", description="auto: local where files are given, else embedded, else hub"
    )
    root: Path | None = Field(None, description="folder that holds the task's own folder or files")
    train: Path | None = Field(None, description="training file instead of the task's own")
    validation: Path | None = Field(None, description="validation file; without one, 10 % of train are carved off")
    test: Path | None = Field(None, description="test file; without one, 20 % of train are carved off")
    num_train: Positive | None = Field(None, description="most training examples (all clients together)")
    num_validation: Positive | None = Field(None, description="most validation examples")
    num_test: Positive | None = Field(None, description="most test examples")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="pool all splits and draw this share as the test set, as datasets' train_test_split does"
    )
    holdout_seed: Annotated[int, Field(ge=0)] = Field(42, description="of that draw; it stays when the run's changes")
    prompt: str | None = Field(None, description="another template for a known task, over the same columns")
    definition: TaskSection | None = Field(None, description="a task of your own, used with task = 'custom'")
    partition: PartitionSection = PartitionSection()


class TrainingSection(Section):
    """One local round at a client."""

    objective: Objective = Field(
        "sft", description="sft: the answer's tokens; choice: softmax over the options; classify: a head on the model"
    )
    wording: Wording = Field(
        "auto", description="of classify: the whole prompt, or the row's text alone; auto: text for an encoder"
    )
    optimizer: Optimizer = Field("adamw", description="of the local steps")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="of the local steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the local steps")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of sgd")
    batch_size: Positive = Field(16, description="examples a batch")
    gradient_accumulation: Positive = Field(1, description="batches an optimiser step")
    max_steps: Positive | None = Field(None, description="optimiser steps a round; instead of epochs")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over a client's examples a round")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="bound on a step's gradient norm; 0 for none")
    schedule: Schedule = Field("constant", description="of the learning rate, over the rounds")
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="between rounds")
    threads: Positive | None = Field(None, description="CPU threads; default: as torch decides")


class FederationSection(Section):
    """Who takes part, and how updates become one model."""

    modes: tuple[Mode, ...] = Field(("federated",), description="what to run: federated, isolated, centralized")
    algorithm: Algorithm = Field("fedavg", description="how updates become one model")
    rounds: Positive = Field(5, description="of every mode")
    clients_per_round: Positive | None = Field(None, description="sampled each round; default: all")
    proximal_mu: Annotated[float, Field(ge=0)] = Field(0.01, description="fedprox: weight of the proximal term")
    server_learning_rate: Annotated[float, Field(gt=0)] = Field(1.0, description="the mean update is scaled by it")
    min_replies: Positive = Field(1, description="a round with fewer usable replies ends the run")
    encode: bool = Field(True, description="pass messages through the real encoder even in one process")
    workers: Positive | None = Field(
        None, description="clients trained side by side in one process; default: a core each for small models"
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="wait for a reply; unused in one process"
    )


class EvaluationSection(Section):
    """On what, how and when models are scored."""

    gold: str = Field("test", description="gold-standard set scored each round: a split, or a file")
    selection: str = Field("validation", description="set behind early stop and best round: a split, or a file")
    scoring: Scoring = Field("likelihood", description="of options; generation parses generated text")
    batch_size: Positive = Field(64, description="examples a forward pass")
    max_examples: Positive | None = Field(None, description="most examples of a scored set")
    every: Positive = Field(1, description="rounds between two scorings of the global model")
    per_client: bool = Field(False, description="score the global model on each client's own examples at the end")
    patience: Positive | None = Field(None, description="stop after so many rounds without a better selection metric")
    keep: Literal["last", "best"] = Field("last", description="which round's adapter is the result")
    forgetting: str = Field(
        "",
        description="general text whose perplexity is taken before and after: a .txt or .jsonl file (key text), "
        "'embedded' (everyday chats), or nothing",
    )
    forgetting_tokens: Annotated[int, Field(ge=2)] = Field(8192, description="most tokens of that text")
    max_new_tokens: Positive = Field(16, description="of a generated answer")
    bootstrap_samples: Annotated[int, Field(ge=0)] = Field(1000, description="behind the 95 % intervals; 0 for none")


class RecordSection(Section):
    """Where results go."""

    folder: Path = Field(Path("runs"), description="where run folders are made")
    name: str | None = Field(None, description="name of the run folder; default: made from task, model, adapter")
    checkpoint_every: Positive = Field(1, description="rounds between checkpoints")
    energy: bool = Field(True, description="meter joules and CO2 with codecarbon, where silotune[energy] is installed")
    country: Annotated[str, Field(pattern="^[A-Z]{3}$")] = Field(
        "ESP", description="ISO 3166 code of three letters: whose electricity, for CO2"
    )


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of data, partition, adapter and training")
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    evaluation: EvaluationSection = EvaluationSection()
    record: RecordSection = RecordSection()

    @model_validator(mode="before")
    @classmethod
    def _qlora_implies_int4(cls, document: Any) -> Any:
        """An ``adapter.kind = 'qlora'`` without a precision means int4: that is what the name says."""
        if not isinstance(document, Mapping) or _get(document, "adapter", "kind") != "qlora":
            return document
        model = document.get("model", {})
        return {**document, "model": {"precision": "int4", **model}} if isinstance(model, Mapping) else document

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        faults: list[str] = []
        federation, partition = self.federation, self.data.partition
        if self.adapter.kind == "qlora" and self.model.precision != "int4":
            faults.append("adapter.kind = 'qlora' needs model.precision = 'int4'")
        if self.adapter.kind == "none" and self.model.precision == "int4":
            faults.append("adapter.kind = 'none' trains all weights and cannot use model.precision = 'int4'")
        if partition.scheme == "file" and not partition.files:
            faults.append("data.partition.scheme = 'file' needs [data.partition.files]: client name = path")
        known = partition.clients if partition.scheme in ("iid", "dirichlet", "quantity") else None
        if federation.clients_per_round and known and federation.clients_per_round > known:
            faults.append(
                f"federation.clients_per_round = {federation.clients_per_round} exceeds "
                f"data.partition.clients = {known}"
            )
        if self.data.task == "custom" and self.data.definition is None:
            faults.append("data.task = 'custom' needs a section [data.definition]")
        if self.data.task == "custom" and self.data.prompt is not None:
            faults.append("data.prompt is for known tasks; one of your own has data.definition.prompt")
        faults += _classify_faults(self.training, self.evaluation)
        if not federation.modes or len(set(federation.modes)) != len(federation.modes):
            faults.append("federation.modes must name at least one mode, each once")
        if faults:
            raise ValueError("\n".join(faults))
        return self


def _classify_faults(training: TrainingSection, evaluation: EvaluationSection) -> list[str]:
    """What does not go together with a classification head, or needs one."""
    if training.objective != "classify":
        is_default = training.wording == "auto"
        return [] if is_default else [f"training.wording = {training.wording!r} needs training.objective = 'classify'"]
    faults = []
    if evaluation.scoring == "generation":
        faults.append("training.objective = 'classify' writes no text and cannot use evaluation.scoring = 'generation'")
    if evaluation.forgetting:
        faults.append("training.objective = 'classify' writes no text: leave evaluation.forgetting out")
    return faults


def _get(document: Mapping[str, Any], section: str, key: str) -> Any:
    part = document.get(section)
    return part.get(key) if isinstance(part, Mapping) else None


def parse_override(text: str) -> tuple[list[str], Any]:
    """Splits ``a.b=c`` into its path and value; nothing after ``=`` unsets, else it is TOML, else a string.

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
        return keys, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, raw.strip()


def overlaid(document: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the values of other documents put over it, section by section; the inputs are left alone."""
    result = _copy(document)
    for change in changes:
        for key, value in change.items():
            old = result.get(key)
            result[key] = overlaid(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return _copy(result)


def merge(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The document with ``a.b=c`` overrides applied, in order; the input is left alone."""
    result = _copy(document)
    for text in overrides:
        keys, value = parse_override(text)
        place = result
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {text!r}: {key!r} is not a section")
        place[keys[-1]] = value
    return result


def _copy(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in document.items()}


def from_mapping(document: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validates a mapping of sections.

    Raises:
        ConfigError: With every fault, one line each, in ``faults``.
    """
    return validated(Config, document, source=source)


def validated(schema: type[SectionType], document: Mapping[str, Any], *, source: str) -> SectionType:
    """A mapping as the given section, every key checked.

    Raises:
        ConfigError: With every fault, one line each, in ``faults``.
    """
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise faulty([line for fault in error.errors() for line in _explain(fault, schema)], source=source) from None


def faulty(faults: Sequence[str], *, source: str) -> ConfigError:
    """The error that lists these faults."""
    summary = faults[0] if len(faults) == 1 else f"{len(faults)} faults: " + "; ".join(faults)
    return ConfigError(f"{source}: {summary}", faults)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies ``a.b=c`` overrides, and validates the result.

    Args:
        path: The TOML file.
        overrides: As given to ``--set``.

    Raises:
        ConfigError: The file is missing or broken, or holds faults (all of them are listed).
    """
    return from_mapping(merge(read_toml(path), overrides), source=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file; ``ConfigError`` with line and column when it cannot be."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}; 'silotune configs list' shows those shipped") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _explain(fault: Mapping[str, Any], schema: type[BaseModel]) -> list[str]:
    where = [str(part) for part in fault["loc"]]
    dotted = ".".join(where)
    if fault["type"] == "extra_forbidden":
        return [f"{dotted}: {unknown_choice('key', where[-1], _keys_at(where[:-1], schema))}"]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"]).splitlines()
    if fault["type"] == "literal_error":
        allowed = [name.strip(" '") for name in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return [f"{dotted}: {unknown_choice('value', str(fault['input']), allowed)}"]
    return [f"{dotted} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"]


def _keys_at(where: Sequence[str], schema: type[BaseModel]) -> list[str]:
    section = schema
    for name in where:
        if name.isdigit():  # a place in a list: its entries are looked at already
            continue
        field = section.model_fields.get(name)
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        found = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not found:
            return []
        section = found[0]
    return list(section.model_fields)
