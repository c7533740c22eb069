"""The Hugging Face model card that goes with a trained adapter, or with the model it was merged into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.config import Config
from silotune.data.rows import Task
from silotune.evaluation.metrics import answers_one_class, majority
from silotune.experiment.privacy import spent_text
from silotune.experiment.results import COMPARED, round_text
from silotune.federation.coordinator.protection import SEES
from silotune.methods.algorithms import title_of
from silotune.record.printable import counted
from silotune.settings.adapters import AdapterSettings, Lora
from silotune.settings.sections import FederationSection


def model_card(config: Config, mode: str, task: Task, result: Mapping[str, Any], *, is_merged: bool = False) -> str:
    """The card's text: base, data, method, metrics, privacy.

    Args:
        config: Of the run.
        mode: ``federated``, ``centralized`` or ``isolated``.
        task: What was learnt.
        result: The part's ``result.json``.
        is_merged: It is for a whole model that plain transformers loads, not for an adapter beside its base.
    """
    partition, federation, training = config.data.partition, config.federation, config.training
    is_whole = is_merged or config.adapter.is_whole
    figures = "\n".join(
        f"- {name}: {result['metrics'][name]:.4f}" for name in COMPARED[task.metric] if name in result["metrics"]
    )
    rule = f" (federation.lora: {federation.lora.type}{_split_text(federation)})" if mode == "federated" else ""
    classes = task.options if training.objective.has_head else ()
    trained = title_of(federation) if mode == "federated" else "plain training"
    title = (
        f"{config.model.name.rstrip('/').split('/')[-1]} for {config.data.task}"
        if is_whole
        else (f"{config.adapter.type} adapter for {config.data.task}")
    )
    return f"""---
{_front_matter(config, is_whole=is_whole, has_classes=bool(classes))}
---

# {title}

Trained with silotune ({mode}).{_head_text(classes, is_whole=is_whole)}

## Base model

`{config.model.name}`{" (shipped with silotune)" if config.model.name == "nano" else ""}, precision \
{_precision(config, is_merged=is_merged)}.{_nano_text(config, is_whole=is_whole)}

## Data

{task.summary}. Partition: {partition.scheme} over {result["num_clients"]} clients, seed {config.seed}. The data are not
included.

## Method

{mode}; {trained}{rule}, {_rounds(result, federation.rounds)}; {_adapter_text(config.adapter)}\
{", merged into the weights" if is_merged and not config.adapter.is_whole else ""}; objective
{training.objective.type}; {training.optimizer.type}, learning rate {training.learning_rate:g}, \
batch {training.batch_size}.

## Metrics

On {result["num_examples"]} examples of `{result["split"]}`, model of round {round_text(result)}:

{figures}
{_constant(result)}
## Privacy

{_privacy(config, mode, result)}
"""


def _split_text(federation: FederationSection) -> str:
    """How the model was cut between clients and a compute server; empty where it was not."""
    split = federation.split
    if split is None:
        return ""
    return f"; split training, {split.schedule}: {split.first} first and {split.last} last blocks at the clients"


def _constant(result: Mapping[str, Any]) -> str:
    """What one answer to all would reach, and whether the model does no more; empty where there are no classes."""
    known = majority(result["metrics"])
    if known is None:
        return ""
    said = "The model itself gives one answer to all examples. " if answers_one_class(result["metrics"]) else ""
    return (
        f"\n{said}Always answering `{known['answer']}` has an accuracy of {known['accuracy']:.4f} and a macro-F1 of "
        f"{known['macro_f1']:.4f}.\n"
    )


def _precision(config: Config, *, is_merged: bool) -> str:
    """The precision of the weights; an int4 base cannot hold the sum with an adapter, so it is merged in float32."""
    if is_merged and config.model.precision == "int4":
        return "float32. The adapter was trained, and the metrics below were measured, on the base in int4"
    return config.model.precision


def _nano_text(config: Config, *, is_whole: bool) -> str:
    """Where the shipped base is, which no hub has."""
    if config.model.name != "nano" or is_whole:
        return ""
    return """ It is on no model hub: `pip install silotune`,
load it from the folder `silotune.models.load.nano_folder()`, and put the adapter on it with
`PeftModel.from_pretrained`."""


def _front_matter(config: Config, *, is_whole: bool, has_classes: bool) -> str:
    """The metadata that a model hub reads; it leaves out ``nano``, which is not the id of a model on a hub."""
    lines = [
        *([] if config.model.name == "nano" else [f"base_model: {config.model.name}"]),
        f"library_name: {'transformers' if is_whole else 'peft'}",
        f"pipeline_tag: {'text-classification' if has_classes else 'text-generation'}",
        "tags:",
        "- silotune",
        "- federated-learning",
        *([] if config.adapter.is_whole else [f"- {config.adapter.type}"]),
    ]
    return "\n".join(lines)


def _rounds(result: Mapping[str, Any], planned: int) -> str:
    done = result["rounds"]
    return counted(done, "round") if done == planned else f"{done} of {counted(planned, 'round')} ({result['stopped']})"


def _adapter_text(adapter: AdapterSettings) -> str:
    """The adapter with the settings that it has."""
    if adapter.is_whole:
        return "all weights trained"
    if not isinstance(adapter, Lora):
        return adapter.type
    more = "".join(f", {name}" for name, is_on in (("rsLoRA", adapter.rslora), ("DoRA", adapter.dora)) if is_on)
    return f"{adapter.type} (rank {adapter.rank}, alpha {adapter.alpha:g}{more})"


def _privacy(config: Config, mode: str, result: Mapping[str, Any]) -> str:
    if mode == "centralized":
        return "All examples were pooled in one place."
    if mode == "isolated":
        return "One institution's examples alone; nothing travelled."
    return f"{_federated_privacy(result.get('privacy'))} In a round {SEES[type(config.privacy.protection)]}."


def _federated_privacy(spent: Mapping[str, Any] | None) -> str:
    """What the card of a federated model says of privacy."""
    start = "Examples stayed with their institutions; adapter updates travelled"
    if spent is None:
        return f"{start}, without differential privacy or encryption, and can leak parts of what they were trained on."
    whom = _PROTECTED[spent["dp"]]
    cost = f"{spent_text(spent)} at delta {spent['delta']:g}"
    return f"{start} under differential privacy of {whom}: epsilon is {cost}."


_PROTECTED: Mapping[str, str] = {
    "example": "a single record, noise added by its institution",
    "client": "a whole institution, noise added by the server",
    "local": "a whole institution, noise added by itself",
    "distributed": "a whole institution, noise added in shares by all",
}


def _head_text(classes: Sequence[str], *, is_whole: bool) -> str:
    """How to load what carries a classification head; empty where there are no classes."""
    if not classes:
        return ""
    said = f"""

It carries a classification head for {len(classes)} classes: {", ".join(classes)} (0 to {len(classes) - 1})."""
    if is_whole:
        return said
    return f"""{said} Load the
base with `AutoModelForSequenceClassification.from_pretrained(base, id2label={dict(enumerate(classes))})`
and put the adapter on it with `PeftModel.from_pretrained`; a base without a padding token also needs
`config.pad_token_id` for batches."""
