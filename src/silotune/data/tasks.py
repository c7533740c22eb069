"""Tasks as data: prompt, answers, metric, column maps and sources of every task that silotune knows by name.

One table, ``TASKS``, holds everything that is special to a task; ``resolve`` looks a configuration's task up. Columns
that give an answer away (``exp``, ``long_answer``) stand in no layout, so they cannot reach a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from silotune.data.rows import SPLITS, Hub, Layout, Task, placeholders, to_example
from silotune.errors import ConfigError, PluginError, unknown_choice
from silotune.settings import plugins
from silotune.settings.base import composed
from silotune.settings.sections import AnswerFormat, DataSection, Metric, TaskSection

__all__ = ["TASKS", "Task", "resolve", "to_example"]

SENTIMENTS: Final = ("negative", "neutral", "positive")
LETTERS: Final = ("A", "B", "C", "D")
OPTIONS: Final = "options"
"""What a prompt calls the lettered options of its row."""

_VALIDATION_IS_TEST: Final = {**SPLITS, "test": ("test", "validation")}
_LETTERED: Final = "{question}\n{options}\nAnswer:"
_NOTE: Final = "{text}\nWrite a note on this to a client."
_INDEX_TO_LETTER: Final = {str(index): letter for index, letter in enumerate(LETTERS)}

_TASKS: Final = (
    Task(
        name="fpb",
        summary="Financial PhraseBank: sentiment of news sentences (Malo et al. 2014)",
        prompt="Is this financial news negative, neutral or positive for the company?\n{text}\nAnswer:",
        answer="label",
        metric="accuracy",
        options=SENTIMENTS,
        labels={"0": "negative", "1": "neutral", "2": "positive"},
        layouts=(
            Layout({"text": "text"}, answer="label", fields={"agreement": "agreement"}),
            Layout({"text": "sentence"}, answer="label"),
        ),
        unit="text",
        folder="fpb",
        # The original takala/financial_phrasebank is a loading script, which datasets 4 refuses; this is its
        # sentences_50agree as Parquet, split 64/16/20 as in the FinBERT paper.
        hub=Hub("atrost/financial_phrasebank"),
    ),
    Task(
        name="fiqa-sa",
        summary="FiQA 2018 task 1: sentiment towards a target in headlines and posts",
        prompt="Is this financial text negative, neutral or positive for {target}?\n{text}\nAnswer:",
        answer="label",
        metric="macro_f1",
        options=SENTIMENTS,
        layouts=(
            Layout(
                {"text": "text", "target": "target"},
                answer="label",
                fields={"source": "source", "aspect": "aspect_l1"},
            ),
            # Scores in [-1, 1], cut as FinGPT does.
            Layout(
                {"text": "sentence", "target": "target"}, answer="score", fields={"source": "type"}, cuts=(-0.1, 0.1)
            ),
        ),
        unit="text",
        folder="fiqa_sa",
        hub=Hub("TheFinAI/fiqa-sentiment-classification"),
    ),
    Task(
        name="tfns",
        summary="Twitter financial news sentiment; its official validation part is the test set",
        prompt="Is this tweet negative, neutral or positive for the stock?\n{text}\nAnswer:",
        answer="label",
        metric="macro_f1",
        options=SENTIMENTS,
        labels={"0": "negative", "1": "positive", "2": "neutral"},
        layouts=(Layout({"text": "text"}, answer="label"),),
        unit="text",
        folder="tfns",
        files=_VALIDATION_IS_TEST,
        hub=Hub("zeroshot/twitter-financial-news-sentiment", splits=_VALIDATION_IS_TEST),
    ),
    Task(
        name="medqa",
        summary="MedQA (USMLE): medical exam questions with four options (Jin et al. 2021)",
        prompt=_LETTERED,
        answer="letter",
        metric="accuracy",
        options=LETTERS,
        layouts=(
            Layout(
                {"question": "question"},
                answer="answer_idx",
                choices=("options",),
                fields={"specialty": "specialty", "step": "meta_info"},
            ),
        ),
        unit="question",
        folder="medqa",
        files={**SPLITS, "test": ("test", "dev")},
        hub=Hub("GBaker/MedQA-USMLE-4-options"),
    ),
    Task(
        name="medmcqa",
        summary="MedMCQA: medical entrance exam questions by subject (Pal et al. 2022)",
        prompt=_LETTERED,
        answer="letter",
        metric="accuracy",
        options=LETTERS,
        labels=_INDEX_TO_LETTER,
        layouts=(
            Layout(
                {"question": "question"}, answer="answer_idx", choices=("options",), fields={"subject": "subject_name"}
            ),
            Layout(
                {"question": "question"},
                answer="cop",
                choices=("opa", "opb", "opc", "opd"),
                fields={"subject": "subject_name"},
            ),
        ),
        unit="question",
        folder="medmcqa",
        # The Hub's test part has no public answers (cop = -1).
        hub=Hub("openlifescienceai/medmcqa", splits={**SPLITS, "test": ("validation",)}),
    ),
    Task(
        name="pubmedqa",
        summary="PubMedQA: yes, no or maybe from an abstract without its conclusion (Jin et al. 2019)",
        prompt="{context}\n\nQuestion: {question} Answer yes, no or maybe.\nAnswer:",
        answer="label",
        metric="accuracy",
        options=("yes", "no", "maybe"),
        layouts=(
            Layout({"context": "context", "question": "question"}, answer="final_decision", fields={"year": "year"}),
        ),
        unit="question",
        folder="pubmedqa",
        hub=Hub("qiaojin/PubMedQA", "pqa_labeled"),
    ),
    Task(
        name="instruct",
        summary="instructions with open answers: alpaca rows, prompt and response (or completion), or chats",
        prompt="{instruction}\n\n{input}",
        answer="text",
        metric="perplexity",
        layouts=(
            Layout(
                {"instruction": "instruction", "input": "input"},
                answer="output",
                optional=("input",),
                fields={"domain": "domain"},
            ),
            Layout({"prompt": "prompt"}, answer="response", fields={"domain": "domain"}, prompt="{prompt}"),
            Layout(
                {"prompt": "prompt"},
                answer="completion",
                fields={"domain": "domain"},
                prompt="{prompt}",
                unjudged="label",
            ),
            Layout(messages="messages", fields={"domain": "domain"}),
            Layout(messages="conversations", fields={"domain": "domain"}),
        ),
        folder="instruct",
        pooled=("all", "alpaca_1k", "chatdoctor_5k"),
        hub=Hub("vicgalle/alpaca-gpt4"),
    ),
    Task(
        name="preference",
        summary="pairs of a preferred and a rejected answer: prompt, chosen and rejected as text or chats",
        prompt="{prompt}",
        answer="preference",
        metric="preference_accuracy",
        layouts=(
            Layout(history="messages", answer="chosen", rejected="rejected", fields={"source": "source"}),
            Layout({"prompt": "prompt"}, answer="chosen", rejected="rejected", fields={"source": "source"}),
            Layout(history="conversations", answer="chosen", rejected="rejected", fields={"source": "source"}),
            Layout(history="chosen", answer="chosen", rejected="rejected", fields={"source": "source"}),
            Layout(history="messages", answer="completion", wanted="label", fields={"source": "source"}),
            Layout({"prompt": "prompt"}, answer="completion", wanted="label", fields={"source": "source"}),
        ),
        folder="preference",
        pooled=("all", "dpo_demo"),
        hub=Hub(
            "HuggingFaceH4/ultrafeedback_binarized",
            splits={"train": ("train_prefs",), "validation": (), "test": ("test_prefs",)},
        ),
    ),
    Task(
        name="text",
        summary="plain text without prompts or labels, for the objective pretrain: a .txt file, or rows with text",
        prompt="",
        answer="document",
        metric="perplexity",
        layouts=(Layout(answer="text", fields={"source": "source"}),),
        folder="text",
    ),
    Task(
        name="finance-news",
        summary="embedded: generated financial news with its sentiment, by sector",
        prompt="Is this news negative, neutral or positive for the company?\n{text}\nAnswer:",
        answer="label",
        metric="accuracy",
        options=SENTIMENTS,
        layouts=(Layout({"text": "text"}, answer="label", fields={"sector": "sector"}),),
        unit="text",
        folder="finance_news",
        embedded=True,
    ),
    Task(
        name="medical-choice",
        summary="embedded: generated medical questions with four options, by specialty",
        # A cloze, as evaluations of small models do it: they score the options' texts well before they can tie a
        # letter to the text beside it.
        prompt="{question}\nAnswer:",
        answer="cloze",
        metric="accuracy",
        options=LETTERS,
        layouts=(
            Layout(
                {"question": "question"}, answer="answer_idx", choices=("options",), fields={"specialty": "specialty"}
            ),
        ),
        unit="question",
        folder="medical_choice",
        embedded=True,
    ),
    Task(
        name="client-notes",
        summary="embedded: notes to clients about generated news, as they were written, in a good and a bad style",
        prompt=_NOTE,
        answer="text",
        metric="perplexity",
        layouts=(Layout({"text": "text"}, answer="written", fields={"sector": "sector", "principle": "principle"}),),
        unit="text",
        folder="client_notes",
        embedded=True,
    ),
    Task(
        name="note-preference",
        summary="embedded: pairs of such notes that differ in one principle of good style, by principle and sector",
        prompt=_NOTE,
        answer="preference",
        metric="preference_accuracy",
        layouts=(
            Layout(
                {"text": "text"},
                answer="chosen",
                rejected="rejected",
                fields={"sector": "sector", "principle": "principle"},
            ),
        ),
        unit="text",
        folder="note_preference",
        embedded=True,
    ),
)
TASKS: Final[Mapping[str, Task]] = MappingProxyType({task.name: task for task in _TASKS})


def resolve(section: DataSection) -> Task:
    """The task that ``data.task`` names; ``custom`` is built from ``[data.definition]``.

    ``data.prompt`` takes the place of a known task's template.

    Raises:
        ConfigError: The name is unknown, the definition does not hold together, or ``data.shorten`` names a column
            that stands in no prompt of the task.
    """
    task = _named(section)
    known = {name for layout in task.layouts for name in layout.columns}
    strangers = [name for name in section.shorten if name not in known]
    if strangers and not known:
        raise ConfigError(f"data.shorten: task {task.name!r} has no prompt with columns; leave it out")
    if strangers:
        raise ConfigError(f"data.shorten: {unknown_choice('column', strangers[0], known)}")
    return replace(task, shorten=section.shorten) if section.shorten else task


def _named(section: DataSection) -> Task:
    if section.task == "mixture":
        return _mixture(section)
    if section.task == "custom":
        if section.definition is None:
            raise ConfigError("data.task = 'custom' needs a section [data.definition]")
        return _custom(section.definition)
    task = task_named(section.task)
    if task is None:
        names = plugins.offered("tasks", (*TASKS, "custom", "mixture"))
        raise ConfigError(f"data.task: {unknown_choice('task', section.task, names)}")
    return task if section.prompt is None else replace(task, prompt=_other_prompt(task, section.prompt))


def task_named(name: str) -> Task | None:
    """The task of a name, from this table or from a plug-in; None where there is none.

    Raises:
        PluginError: Two define the name, or the plug-in brings something else than a task of its own name.
    """
    plugin = plugins.named("tasks", name, is_own=name in TASKS)
    if plugin is None:
        return TASKS.get(name)
    brought = plugin.load()
    if not isinstance(brought, Task) or brought.name != name:
        raise PluginError(f"the plug-in {name!r} of {plugin.origin} is not a Task of that name")
    return brought


def _other_prompt(task: Task, prompt: str) -> str:
    """Another template for a task's prompt, after a look at what it may name."""
    try:
        names = placeholders(prompt)
    except ValueError as error:
        raise ConfigError(f"data.prompt: {error}") from None
    known = set.intersection(*({*layout.columns, *(("options",) if layout.choices else ())} for layout in task.layouts))
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ConfigError(f"data.prompt: {unknown_choice('column', strangers[0], known)}")
    if not names or any(layout.prompt for layout in task.layouts):
        raise ConfigError(f"data.prompt: task {task.name!r} cannot be asked with {prompt!r}; use task = 'custom'")
    return prompt


def _mixture(section: DataSection) -> Task:
    """What a mixture is scored by: the metric of the task that is named first."""
    parts = {name: task_named(name) for name in section.mixture}
    strangers = [name for name, task in parts.items() if task is None]
    if strangers:
        raise ConfigError(f"data.mixture: {unknown_choice('task', strangers[0], TASKS)}")
    if len(section.mixture) < 2:
        raise ConfigError("data.task = 'mixture' needs two or more tasks in [data.mixture]: name = share")
    return Task(
        name="mixture",
        summary=f"a mixture of {', '.join(section.mixture)}",
        prompt="",
        answer="mixture",
        metric=next(task.metric for task in parts.values() if task is not None),
        layouts=(Layout(fields={"task": "task"}),),
    )


def _custom(definition: TaskSection) -> Task:
    try:
        names = placeholders(definition.prompt)
    except ValueError as error:
        raise ConfigError(f"data.definition.prompt: {error}") from None
    faults = _faults(definition, names)
    if faults:
        summary = faults[0] if len(faults) == 1 else f"{len(faults)} faults: " + "; ".join(faults)
        raise ConfigError(summary, faults)
    closed: AnswerFormat = "letter" if definition.choices else "label"
    answer: AnswerFormat = closed if definition.options else "preference" if definition.rejected else "text"
    shown = [name for name in names if not (definition.choices and name == OPTIONS)]
    columns = {name: definition.columns.get(composed(name), composed(name)) for name in shown}
    return Task(
        name="custom",
        summary="a task of your own, from [data.definition]",
        prompt=definition.prompt,
        answer=answer,
        metric=definition.metric or _metrics(definition)[0],
        layouts=(
            Layout(
                columns,
                answer=definition.answer,
                choices=definition.choices,
                rejected=definition.rejected,
                fields={name: name for name in definition.fields},
            ),
        ),
        options=definition.options,
        labels=dict(definition.label_names),
        system=definition.system,
        hub=Hub(definition.hub_id, definition.hub_config) if definition.hub_id else None,
    )


def _column_faults(definition: TaskSection, names: tuple[str, ...], place: str) -> list[str]:
    """What is wrong with columns under other names, and with options of the rows' own."""
    faults, strange = [], sorted(set(definition.columns) - set(names))
    if strange:
        faults.append(f"{place}.columns: {unknown_choice('name in the prompt', strange[0], names)}")
    if definition.choices and not (definition.options and OPTIONS in names):
        faults.append(f"{place}.choices needs {place}.options, the letters, and {{{OPTIONS}}} in {place}.prompt")
    return faults


def _metrics(definition: TaskSection) -> tuple[Metric, ...]:
    """The metrics that can rank models in a task of the user's own; the first one does unless another is asked for."""
    if definition.rejected:
        return ("preference_accuracy",)
    return ("accuracy", "macro_f1") if definition.options else ("perplexity",)


def _faults(definition: TaskSection, names: tuple[str, ...]) -> list[str]:
    place, options = "data.definition", definition.options
    names = tuple(map(composed, names))
    faults = _column_faults(definition, names, place)
    if not names:
        faults.append(f"{place}.prompt names no column; write one in braces, such as {{text}}")
    if definition.answer in names:
        faults.append(f"{place}.prompt shows the answer's column {definition.answer!r}")
    if definition.rejected in names or definition.rejected == definition.answer:
        faults.append(f"{place}.rejected = {definition.rejected!r} is a column of the prompt or of the better answer")
    if definition.rejected and options:
        faults.append(f"{place}.rejected makes a task of pairs, which has no options")
    if len(options) == 1 or len({option.casefold() for option in options}) != len(options):
        faults.append(f"{place}.options needs at least two different answers")
    if any(not option.strip() for option in options):
        faults.append(f"{place}.options holds an empty answer")
    strangers = sorted(set(definition.label_names.values()) - set(options))
    if strangers:
        faults.append(f"{place}.label_names leads to {strangers[0]!r}, which is not among the options")
    if "label" in definition.fields:
        faults.append(f"{place}.fields: 'label' is there already and stands for the answer")
    fitting = _metrics(definition)
    if definition.metric is not None and definition.metric not in fitting:
        kind = "pairs" if definition.rejected else f"a task {'with' if options else 'without'} options"
        faults.append(
            f"{place}.metric = {definition.metric!r} is not for {kind}: use {' or '.join(map(repr, fitting))}"
        )
    return faults
