"""The strict sections of a run's configuration: every choice and setting, with its limits and what it is for."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, field_validator

from silotune.errors import PrivacyError, ProtectionError
from silotune.settings.adapters import Adapter, Lora
from silotune.settings.aggregation import Aggregation, ByExamples, Mean, Weighting
from silotune.settings.algorithms import Algorithm, FedAvg
from silotune.settings.attacks import Attack, NoAttack
from silotune.settings.base import Device, FolderName, Name, Needs, Place, Positive, PositiveNumber, Section
from silotune.settings.links import ClockSection, CompressionSection, DownloadSection
from silotune.settings.lora_rules import Factors, LoraRule, NoModels, Personalization
from silotune.settings.objectives import AdamW, Objective, Optimizer, Sft
from silotune.settings.privacy import (
    DifferentialPrivacy,
    EncryptedSum,
    Guarantee,
    NoGuarantee,
    NoProtection,
    Protection,
    SecureSum,
    SumSettings,
)
from silotune.settings.split import SplitSection

Precision = Literal["auto", "float32", "bfloat16", "int4"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Scheme = Literal["iid", "dirichlet", "field", "quantity", "file"]
Schedule = Literal["constant", "cosine"]
Mode = Literal["federated", "isolated", "centralized"]
Preset = Literal["none", "auto"]
BudgetMatch = Literal["compute", "time"]
Engine = Literal["in_process", "ray"]
Shortfall = Literal["stop", "wait", "skip"]
Scoring = Literal["likelihood", "generation"]
Metric = Literal["accuracy", "macro_f1", "perplexity", "preference_accuracy"]
Truncate = Literal["left", "right", "middle"]
AnswerFormat = Literal["label", "letter", "cloze", "text", "preference", "document", "mixture"]


LONGEST_PROMPT, MOST_PLACES = 4096, 32
"""Characters of a prompt's template, and places in it that a row fills: every example is written out so long."""
MOST_OPTIONS = 2048
"""Answers of a closed set: every example is scored over all of them."""


def _check_length(text: str, name: str) -> None:
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"{name}: a text of {len(text)} characters, at most {LONGEST_PROMPT} are taken")


def _check_template(text: str, name: str) -> None:
    """Refuses a template larger than any prompt needs; braces that do not fit are told where it is resolved."""
    _check_length(text, name)
    try:
        places = sum(field is not None for _, field, _, _ in Formatter().parse(text))
    except ValueError:
        return
    if places > MOST_PLACES:
        raise ValueError(f"{name}: a template of {places} placeholders, at most {MOST_PLACES} are taken")


class ModelSection(Section):
    """The base model that all institutions share."""

    name: str = Field("nano", description="Hub id, local folder, or 'nano' (shipped)")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    precision: Precision = Field(
        "float32",
        description="weights of the base; int4 is bitsandbytes NF4, auto is bfloat16 where the device multiplies it "
        "(AVX-512 BF16, AMX, a GPU from Ampere on), else float32",
    )
    device: Device = Field(
        "auto",
        description="auto (which takes cuda, then mps, then cpu), cpu, mps, cuda, or cuda:1 for one of several GPUs",
    )
    attention: Attention = Field("auto", description="auto: as transformers, with short texts faster on a CPU")
    fast: Literal["auto", "off"] = Field(
        "auto", description="auto: every shortcut that gives this model's plain losses and gradients; off: none"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens of prompt and answer together")
    gradient_checkpointing: bool = Field(False, description="less memory, slower steps")
    autocast: bool = Field(False, description="bfloat16 autocast around the forward pass")
    date: str = Field("2024-07-26", description="today's date, for a chat template that writes it into every prompt")
    offline: bool = Field(False, description="never ask the Hub for the model; HF_HUB_OFFLINE=1 holds for data, too")

    @field_validator("date")
    @classmethod
    def _is_day(cls, text: str) -> str:
        try:
            day = date.fromisoformat(text)
        except ValueError:
            day = None
        if day is None or day.isoformat() != text:
            raise ValueError("must be a day such as '2024-07-26'")
        return text


class TaskSection(Section):
    """A task of the user's own: how a row becomes a prompt and an answer."""

    prompt: str = Field(description="template over the columns, e.g. 'Classify: {text}\\nAnswer:'")
    answer: Name = Field(description="column that holds the answer, of pairs the preferred one")
    columns: dict[Name, Name] = Field({}, description="name in the prompt -> column, where they differ")
    choices: tuple[Name, ...] = Field(
        (), description="columns of a row's own options, or one column with all; the prompt shows them as {options}"
    )
    rejected: Name = Field("", description="column that holds the worse of two answers; makes a task of pairs")
    system: str = Field("", description="system message before every prompt")
    options: tuple[Name, ...] = Field(
        (), description="closed set of answers, with choices their letters; empty for open answers"
    )
    label_names: dict[Name, Name] = Field({}, description="raw value in the answer column -> option")
    metric: Metric | None = Field(
        None,
        description="what ranks models; default: accuracy with options, preference_accuracy of pairs, perplexity of "
        "open answers",
    )
    fields: tuple[Name, ...] = Field((), description="columns that a partition may use")
    hub_id: str | None = Field(None, description="data set on the Hub, where no files are given")
    hub_config: str | None = Field(None, description="configuration of that data set")

    @field_validator("prompt")
    @classmethod
    def _is_no_flood(cls, text: str) -> str:
        _check_template(text, "data.definition.prompt")
        return text

    @field_validator("options")
    @classmethod
    def _are_few(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        if len(options) > MOST_OPTIONS:
            raise ValueError(f"data.definition.options: {len(options)} options, at most {MOST_OPTIONS} are taken")
        return options

    @field_validator("system")
    @classmethod
    def _is_short(cls, text: str) -> str:
        _check_length(text, "data.definition.system")
        return text


class PartitionSection(Section):
    """How the training examples are spread over clients."""

    depends = {
        "clients": Needs("scheme", ("iid", "dirichlet", "quantity")),
        "alpha": Needs("scheme", ("dirichlet", "quantity")),
        "field": Needs("scheme", ("dirichlet", "field")),
        "files": Needs("scheme", ("file",)),
    }

    scheme: Scheme = Field("dirichlet", description="field: one client per value; file: one client per file")
    clients: Positive = Field(4, description="number of clients; schemes field and file make their own")
    alpha: Annotated[float, Field(gt=0)] = Field(0.3, description="Dirichlet concentration; small is skewed")
    field: Name = Field("label", description="label, a field of the task such as subject, or both: subject+label")
    min_examples: Positive = Field(4, description="fewest examples a client may hold")
    files: dict[str, Place] = Field({}, description="scheme 'file': client name -> training file")


class FileSettings(Section):
    """How files of examples are read."""

    delimiter: str | None = Field(
        None, description="one character that parts the cells of a CSV file, or 'tab'; default: found (, ; tab |)"
    )
    encoding: str | None = Field(
        None, description="of text files, such as 'cp1252'; default: found (UTF-8, UTF-16, else cp1252 with a note)"
    )
    quotes: Literal["cells", "text"] | None = Field(
        None,
        description="of CSV files. cells: a quote at the beginning of a cell encloses it; text: a character like "
        "others; default: cells, or text with a note where that alone fits",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="rows that do not fit: name them all and stop, or leave them out and count them in a note"
    )

    @field_validator("delimiter")
    @classmethod
    def _is_one_character(cls, text: str | None) -> str | None:
        made = {"tab": "\t", "\\t": "\t"}.get(text, text) if text is not None else None
        if made is not None and (len(made) != 1 or made in '"\r\n\0' or made.isalnum()):
            raise ValueError(
                f"data.delimiter = {text!r}: one character such as ',', ';', '|' or 'tab' is needed, "
                "no letter, digit, quote or end of line"
            )
        return made

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        try:
            " ".encode(name or "utf-8")
        except (LookupError, UnicodeError):  # one that is not of text, such as hex, is a LookupError
            raise ValueError(
                f"data.encoding = {name!r}: Python knows no such encoding of text; use 'utf-8', 'utf-16', 'cp1252', ..."
            ) from None
        return name


class DataSection(FileSettings):
    """Where the examples come from, and how their files are read."""

    depends = {"holdout_seed": Needs("holdout")}

    task: str = Field("finance-news", description="a name from 'silotune tasks', 'custom', or 'mixture'")
    source: Literal["auto", "embedded", "local", "hub"] = Field(
        "auto", description="auto: local where files are given, else embedded, else hub"
    )
    root: Place | None = Field(None, description="folder that holds the task's own folder or files")
    train: Place | None = Field(None, description="training file instead of the task's own")
    validation: Place | None = Field(None, description="validation file; without one, 10 % of train are carved off")
    test: Place | None = Field(None, description="test file; without one, 20 % of train are carved off")
    num_train: Positive | None = Field(None, description="most training examples (all clients together)")
    num_validation: Positive | None = Field(None, description="most validation examples")
    num_test: Positive | None = Field(None, description="most test examples")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="pool all splits and draw this share as the test set, as datasets' train_test_split does"
    )
    holdout_seed: Annotated[int, Field(ge=0)] = Field(42, description="of that draw; it stays when the run's changes")
    prompt: str | None = Field(
        None,
        description="another template for a known task, over the same columns; at most 4,096 characters, 32 columns",
    )
    truncate: Truncate = Field("left", description="where a prompt that is too long for model.max_length is cut")
    shorten: tuple[str, ...] = Field(
        (), description="columns of the prompt, by their names in it, that alone are cut while anything is left of them"
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="with task = 'mixture': task -> its share of the examples"
    )
    definition: TaskSection | None = Field(None, description="a task of your own, used with task = 'custom'")
    partition: PartitionSection = PartitionSection()

    @field_validator("prompt")
    @classmethod
    def _is_no_flood(cls, text: str | None) -> str | None:
        if text is not None:
            _check_template(text, "data.prompt")
        return text


class TrainingSection(Section):
    """One local round at a client."""

    depends = {"epochs": Needs("max_steps", (None,))}

    objective: Objective = Field(Sft(), description="what is minimised")
    optimizer: Optimizer = Field(AdamW(), description="of the local steps")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="of the local steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the local steps")
    batch_size: Positive = Field(16, description="examples a batch")
    gradient_accumulation: Positive = Field(1, description="batches an optimiser step")
    max_steps: Positive | None = Field(None, description="optimiser steps a round; instead of epochs")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over a client's examples a round")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="bound on a step's gradient norm; 0 for none")
    schedule: Schedule = Field("constant", description="of the learning rate, over the rounds")
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="between rounds")
    threads: Positive | None = Field(
        None, description="CPU threads of the run; an operation on a small base takes one; default: as torch decides"
    )


class BudgetSection(Section):
    """What the federated mode may spend; it stops before a round that, costing what the last one did, would pass it."""

    bytes: Positive | None = Field(None, description="of all messages, both ways")
    joules: PositiveNumber | None = Field(None, description="of training and aggregation; needs a meter")


class FederationSection(Section):
    """Who takes part, and how updates become one model."""

    depends = {
        "ray_cpus": Needs("engine", ("ray",)),
        "ray_gpus": Needs("engine", ("ray",)),
        "workers": Needs("engine", ("in_process",)),
        "encode": Needs("engine", ("in_process",)),
    }

    engine: Engine = Field("in_process", description="where clients train: this process, or Flower's simulation on Ray")
    ray_cpus: Annotated[float, Field(gt=0)] = Field(1.0, description="ray: cores that one client's actor holds")
    ray_gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="ray: GPUs, or a share of one, of an actor")
    modes: tuple[Mode, ...] = Field(("federated",), description="what to run: federated, isolated, centralized")
    algorithm: Algorithm = Field(FedAvg(), description="server step and client correction; see docs/algorithms.md")
    weighting: Weighting = Field(ByExamples(), description="what an update counts in a weighted mean")
    aggregation: Aggregation = Field(Mean(), description="how the updates of a round become one")
    preset: Preset = Field(
        "none",
        description="auto: what is left open of algorithm, rounds, steps, batch and rate is set as measured to work",
    )
    rounds: Positive = Field(5, description="of every mode")
    budget_match: BudgetMatch = Field(
        "compute",
        description="what the modes have in common: the optimiser steps of all institutions together, or the time, "
        "where every institution trains at once on hardware of its own and takes the steps of pooled training",
    )
    clients_per_round: Positive | None = Field(None, description="sampled each round; default: all")
    lora: LoraRule = Field(Factors(), description="of lora and qlora: what of the factors travels and is averaged")
    ranks: dict[str, Positive] = Field(
        {}, description="of lora and qlora: client name -> its rank, adapter.rank at most, which is that of all others"
    )
    memory_mb: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="in place of ranks: client name -> megabytes for weights, gradients and moments of its adapter"
    )
    policies: dict[str, Path] = Field(
        {}, description="in place of ranks: client name -> its policy.toml, whose largest_adapter bounds its rank"
    )
    personalization: Personalization = Field(
        NoModels(), description="a model of each client's own: beside the global one, or from it after the last round"
    )
    min_replies: Positive = Field(1, description="fewest usable replies of a round")
    below_minimum: Shortfall = Field(
        "stop", description="with fewer: end the run, wait (the same round again, 20 times at most), or skip the round"
    )
    encode: bool = Field(True, description="pass messages through the real encoder even in one process")
    workers: Positive | None = Field(
        None, description="clients trained side by side in one process; default: a core each for small models"
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        3600.0, description="wait for a reply; unused in one process"
    )
    upload: CompressionSection = CompressionSection()
    download: DownloadSection = DownloadSection()
    clock: ClockSection | None = Field(None, description="simulated time; none without the section")
    split: SplitSection | None = Field(
        None, description="training split between clients and a compute server; none without the section"
    )
    budget: BudgetSection = BudgetSection()
    attack: Attack = Field(
        NoAttack(),
        description="for study in one process: clients that work against the others",
    )

    @property
    def has_ranks(self) -> bool:
        """Whether clients may have LoRA ranks of their own."""
        return bool(self.ranks or self.memory_mb or self.policies)


class PrivacySection(Section):
    """What is promised about single records or institutions (dp), and what the coordinator may see of one update."""

    protection: Protection = Field(NoProtection(), description="what the coordinator may see of one update")
    dp: DifferentialPrivacy = Field(NoGuarantee(), description="differential privacy: what is promised, and by whom")
    canaries: Annotated[int, Field(ge=0, le=10_000)] = Field(
        0,
        description="of each client's examples so many get an end that nobody would write and are trained on or left "
        "out by the throw of a coin, so that 'audit leakage' can prove a least epsilon",
    )

    def without_ledger(self) -> PrivacySection:
        """The section without the place of a ledger."""
        if self.ledger is None:
            return self
        return self.model_copy(update={"dp": self.dp.model_copy(update={"ledger": None})})

    @property
    def ledger(self) -> Path | None:
        """Folder in which sites keep what they spent over all runs."""
        return self.dp.ledger if isinstance(self.dp, Guarantee) else None

    @property
    def sums(self) -> SumSettings:
        """The settings of sums that hide single updates.

        Raises:
            ProtectionError: Nothing is hidden.
        """
        if not isinstance(self.protection, SumSettings):
            raise ProtectionError(f"privacy.protection = {self.protection.type!r} makes no sum")
        return self.protection

    @property
    def masks(self) -> SecureSum:
        """The settings of sums under masks.

        Raises:
            ProtectionError: There are no masks.
        """
        if not isinstance(self.protection, SecureSum):
            raise ProtectionError(f"privacy.protection = {self.protection.type!r} masks nothing")
        return self.protection

    @property
    def ciphertexts(self) -> EncryptedSum:
        """The settings of sums of ciphertexts.

        Raises:
            ProtectionError: Nothing is encrypted.
        """
        if not isinstance(self.protection, EncryptedSum):
            raise ProtectionError(f"privacy.protection = {self.protection.type!r} encrypts nothing")
        return self.protection

    @property
    def guarantee(self) -> Guarantee:
        """The settings of the promise.

        Raises:
            PrivacyError: There is none.
        """
        if not isinstance(self.dp, Guarantee):
            raise PrivacyError(f"privacy.dp = {self.dp.type!r} promises nothing")
        return self.dp


class EvaluationSection(Section):
    """On what, how and when models are scored."""

    depends = {
        "max_new_tokens": Needs("scoring", ("generation",)),
        "forgetting_tokens": Needs("forgetting"),
    }

    gold: str = Field("test", description="gold-standard set scored each round: a split, or a file")
    selection: str = Field("validation", description="set behind early stop and best round: a split, or a file")
    scoring: Scoring = Field("likelihood", description="of options; generation parses generated text")
    batch_size: Positive = Field(64, description="examples a forward pass")
    max_examples: Positive | None = Field(None, description="most examples of a scored set")
    every: Positive = Field(1, description="rounds between two scorings of the global model")
    per_client: bool = Field(False, description="score the global model on each client's own examples at the end")
    select_every: Positive = Field(1, description="rounds between two scorings on the selection set")
    patience: Positive | None = Field(None, description="stop after so many rounds without a better selection metric")
    target: float | None = Field(None, description="stop once the selection metric is as good as this")
    keep: Literal["last", "best"] = Field("last", description="which round's adapter is the result")
    forgetting: str = Field(
        "",
        description="general text whose perplexity is taken before and after: a .txt or .jsonl file (key text), "
        "'embedded' (everyday chats), or nothing",
    )
    forgetting_tokens: Annotated[int, Field(ge=2)] = Field(8192, description="most tokens of that text")
    max_new_tokens: Positive = Field(16, description="of a generated answer")
    bootstrap_samples: Annotated[int, Field(ge=0)] = Field(1000, description="behind the 95 % intervals; 0 for none")

    @property
    def selects(self) -> bool:
        """Whether anything is decided by the selection set."""
        return self.patience is not None or self.target is not None or self.keep == "best"


class RecordSection(Section):
    """Where results go."""

    depends = {
        "audit_key": Needs("audit", (True,)),
        "keep_updates": Needs("audit", (True,)),
        "country": Needs("energy", (True,)),
    }

    folder: Place = Field(Path("runs"), description="where run folders are made")
    name: FolderName | None = Field(None, description="name of the run folder; default: made from task, model, adapter")
    checkpoint_every: Positive = Field(1, description="rounds between checkpoints")
    audit: bool = Field(True, description="keep a signed audit trail of the federated mode")
    audit_key: Place | None = Field(
        None, description="Ed25519 key that signs the trail; default: made for the run, thrown away at its end"
    )
    keep_updates: bool = Field(False, description="keep every update, so that 'audit verify' can aggregate them again")
    energy: bool = Field(True, description="meter joules and CO2 with codecarbon, where silotune[energy] is installed")
    country: Annotated[str, Field(pattern="^[A-Z]{3}$")] = Field(
        "ESP", description="ISO 3166 code of three letters: whose electricity, for CO2"
    )


class AuditSection(Section):
    """Attacks on the run's own updates and models when it ends: what they give away of its examples."""

    depends = {name: Needs("leakage", (True,)) for name in ("reserve", "shadows", "max_examples")}

    leakage: bool = Field(False, description="attack the run at its end, and write the report to its folder")
    reserve: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.2, description="share of each client's examples that nothing is trained on: what members are compared with"
    )
    shadows: Annotated[int, Field(ge=0, le=64, multiple_of=2)] = Field(
        2, description="models that are trained on halves of the examples for LiRA, an even number; 0 for none"
    )
    max_examples: Positive = Field(
        400, description="most members, and most examples of the reserve, that are attacked at each client"
    )


class Sections(Section):
    """All sections of a run, which need not go together (`limits`)."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of data, partition, adapter and training")
    model: ModelSection = ModelSection()
    adapter: Adapter = Field(Lora(), description="the small part that is trained and sent")
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    record: RecordSection = RecordSection()
    audit: AuditSection = AuditSection()
