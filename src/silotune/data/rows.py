"""What a task is, and how one row of its data becomes an example.

A row that does not fit is named by its number and the column at fault, never by its content.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain, count
from os.path import commonprefix
from string import Formatter
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from silotune.data.chats import (
    Chat,
    conversation_of,
    ended,
    is_chat,
    only_read,
    opened,
    question_of,
    reply_of,
    said,
    system_of,
    tools_of,
    turns_of,
    without_answer,
)
from silotune.errors import DataError
from silotune.settings.base import composed
from silotune.settings.sections import AnswerFormat, Metric
from silotune.structs import Example, Row, more_of

UNKNOWN: Final = "unknown"
"""Value of a partition field that a row leaves empty."""
SPLITS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
)
"""Split -> names it may have on disk (stem of the file) and on the Hub, the first that is there is used."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which the rows of a data set are laid out.

    Attributes:
        columns: Placeholder of the prompt -> column.
        answer: Column of the answer.
        choices: Of a ``letter`` task: one column with all options, or one column for each.
        optional: Placeholders that may be empty or missing.
        fields: Partition field -> column; a column that is not there gives no field.
        cuts: The answer is a score; option i+1 starts at ``cuts[i]``.
        prompt: Template instead of the task's own.
        messages: Column with a chat, instead of prompt and answer.
        rejected: Of a ``preference`` task: column of the worse answer.
        wanted: Of a ``preference`` task: column that says whether a single answer is wanted (true or 1) or not.
        history: Of a ``preference`` task: column with the chat before the answers, instead of a prompt; an answer that
            it ends with is left out. The column ``answer`` itself where both answers begin with what they answer.
        unjudged: Column that may not say true or false, because an answer that was judged is not to be learnt as any.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    answer: str = ""
    choices: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    cuts: tuple[float, ...] = ()
    prompt: str = ""
    messages: str = ""
    rejected: str = ""
    history: str = ""
    wanted: str = ""
    unjudged: str = ""

    def required(self) -> list[str]:
        """Columns without which a row does not have this layout."""
        columns = [column for name, column in self.columns.items() if name not in self.optional]
        return [column for column in (*columns, *self.choices, self.answer, *self._others()) if column]

    def _others(self) -> tuple[str, ...]:
        return self.messages, self.rejected, self.history, self.wanted


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a data set lies on the Hugging Face Hub; ``splits`` as in ``SPLITS``."""

    id: str
    config: str | None = None
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLITS)


@dataclass(frozen=True, slots=True)
class Task:
    """A task: prompt, answer, metric and where its rows come from.

    Attributes:
        name: As in ``data.task``.
        summary: One line for people.
        prompt: Template over placeholders; ``{options}`` is the lettered list of a ``letter`` task.
        answer: ``label`` (one of ``options``), ``letter`` (the options differ by row and stand in the prompt),
            ``cloze`` (they differ by row, and the answer is an option's text), ``text`` (open), ``preference`` (a
            better and a worse one) ``document`` (plain text: there is no
            prompt), or ``mixture`` (of several tasks).
        metric: What selects and ranks models.
        layouts: The row layouts that are understood: local files first, then the Hub's.
        options: Closed set of answers; of a ``cloze`` task, the names of the options' places.
        labels: Raw value of the answer column -> option; the options themselves are always understood.
        system: System text; empty for none.
        unit: Placeholder whose text identifies a row: rows that share it stay together when a split is carved.
        folder: Name of the task's folder under ``data.root``.
        files: Local split -> file stems, as in ``SPLITS``.
        pooled: File stems that together hold all splits, told apart by the rows' ``split``.
        hub: The Hub's copy, if any.
        embedded: Whether silotune generates the rows itself.
        shorten: Placeholders whose texts alone are cut in a prompt that is too long.
        offered: Columns of a row that may be read, whatever a format has beside those of the layout; empty for all.
    """

    name: str
    summary: str
    prompt: str
    answer: AnswerFormat
    metric: Metric
    layouts: tuple[Layout, ...]
    options: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    system: str = ""
    unit: str = ""
    folder: str = ""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLITS)
    pooled: tuple[str, ...] = ("all",)
    hub: Hub | None = None
    embedded: bool = False
    shorten: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()

    @property
    def partition_fields(self) -> tuple[str, ...]:
        """Fields that a partition may use, if the rows have their columns."""
        own = dict.fromkeys(name for layout in self.layouts for name in layout.fields)
        return (("label",) if self.options else ()) + tuple(own)


def with_columns(task: Task, own: Mapping[str, str]) -> Task:
    """The task, read from a file that names columns in its own way: column of the task -> column of the file."""

    def named(column: str) -> str:
        return own.get(column, column)

    def renamed(names: Mapping[str, str]) -> dict[str, str]:
        return {name: named(column) for name, column in names.items()}

    layouts = (
        replace(
            layout,
            columns=renamed(layout.columns),
            fields=renamed(layout.fields),
            choices=tuple(map(named, layout.choices)),
            answer=named(layout.answer),
            messages=named(layout.messages),
            rejected=named(layout.rejected),
            history=named(layout.history),
            wanted=named(layout.wanted),
        )
        for layout in task.layouts
    )
    return replace(task, layouts=tuple(layouts))


def to_example(task: Task, row: Row, *, where: str, number: int) -> Example:
    """One row as an example.

    Args:
        task: The row's task.
        row: Column -> value.
        where: File or split, for errors.
        number: Number of the row, from 1, for errors.

    Raises:
        DataError: The row does not fit; says where and why without repeating what it holds.
    """
    spot = f"{where}: row {number}"
    row = _with_one_form_of_accents(row)
    if task.offered:
        row = {column: row[column] for column in task.offered if column in row}
    layout = _layout_of(task, row, spot)
    row = _without_bytes(row, layout, spot)
    kind = _kind(task, layout, row)
    read = _READERS[kind](task, layout, row, spot)
    messages = (*(system_of(row, read.messages, spot) if kind in _CHATS else ()), *read.messages)
    if task.system and messages and messages[0][0] != "system":
        messages = (("system", task.system), *messages)
    if kind in _CHATS:
        messages = (*tools_of(row, spot), *messages)
    turns = (text for turn in messages for text in (turn[1], more_of(turn)))
    if not all(map(is_unicode, (*turns, read.answer, read.rejected, read.calls))):
        raise DataError(f"{spot}: holds half a character, such as a cut emoji: text must be valid Unicode")
    fields = {
        name: composed(plain_text(row[column], f"{spot}: field {column!r}")) or UNKNOWN
        for name, column in layout.fields.items()
        if column in row
    }
    if not task.options:
        return Example(
            messages,
            read.answer,
            fields=fields,
            text=read.text,
            rejected=read.rejected,
            wanted=_wanted(layout, row, spot),
            calls=read.calls,
            shorten=read.shorten,
        )
    place, options = task.options.index(read.answer), task.options
    if task.answer == "cloze":
        options = tuple(_choices(task, layout, row, spot).values())
    fields["label"] = read.answer
    return Example(messages, options[place], options, place, fields, read.text, shorten=read.shorten)


def _with_one_form_of_accents(row: Row) -> Row:
    """The row with its columns' names in the form in which a task names them."""
    return row if all(map(str.isascii, row)) else {composed(column): value for column, value in row.items()}


def _without_bytes(row: Row, layout: Layout, spot: str) -> Row:
    """The row with text in place of the bytes that the layout reads, as some writers of Parquet leave them."""
    read = {*layout.columns.values(), *layout.required(), *layout.fields.values()}
    raw = [column for column in sorted(read) if isinstance(row.get(column), bytes)]
    return {**row, **{column: _decoded(row[column], f"{spot}: field {column!r}") for column in raw}} if raw else row


def _decoded(value: bytes, spot: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise DataError(f"{spot} holds bytes that are not UTF-8 text") from None


@dataclass(frozen=True, slots=True)
class _Read:
    """What a row gives: turns, the answer with its calls of tools, the worse one, and the prompt's columns."""

    messages: Chat
    answer: str
    text: tuple[str, ...] = ()
    calls: str = ""
    rejected: str = ""
    shorten: tuple[tuple[int, int], ...] = ()


_CHATS: Final = ("messages", "history", "completion")
"""Kinds of rows whose prompt is a chat."""


def _kind(task: Task, layout: Layout, row: Row) -> str:
    """Which of ``_READERS`` reads a row."""
    if task.answer == "document":
        return "document"
    if layout.history:
        is_text = layout.history == layout.answer and isinstance(opened(row[layout.answer]), str)
        return "beginning" if is_text else "history"
    return "messages" if layout.messages else "completion" if _chat_column(task, layout, row) else "prompt"


def _chat_column(task: Task, layout: Layout, row: Row) -> str:
    """The column that is all of the prompt and holds a chat; empty where there is none."""
    template = (layout.prompt or task.prompt).strip()
    column = next((column for name, column in layout.columns.items() if template == f"{{{name}}}"), "")
    return column if is_chat(row.get(column)) and not task.options else ""


def _read_prompt(task: Task, layout: Layout, row: Row, spot: str) -> _Read:
    values = _values(task, layout, row, spot)
    template = layout.prompt or task.prompt
    text = tuple(values[name] for name in placeholders(template) if values[name])
    prompt = render(template, values).strip()
    places = _places(template, values, task.shorten)
    if task.options:
        return _Read((("user", prompt),), _option(task, layout, row, spot), text, shorten=places)
    messages: Chat = (("user", prompt + _last_lines(template, values, layout, row, spot)),)
    return replace(_answered(messages, layout, row, spot, text=text), shorten=places)


def _last_lines(template: str, values: Mapping[str, str], layout: Layout, row: Row, spot: str) -> str:
    """The empty lines, or the next line's indentation, that the row's own text ends with where the prompt does."""
    for literal, name, _, _ in reversed(list(Formatter().parse(template))):
        if name and values[name]:
            whole = ended(_whole(row.get(layout.columns[name]), spot))
            return whole[len(whole.rstrip()) :]
        if literal.strip():
            break
    return ""


def _read_messages(task: Task, layout: Layout, row: Row, spot: str) -> _Read:
    place = f"{spot}: {layout.messages}"
    messages, answer = conversation_of(turns_of(row[layout.messages], place), place)
    return _Read(messages, answer[1], calls=more_of(answer))


def _read_history(task: Task, layout: Layout, row: Row, spot: str) -> _Read:
    place = f"{spot}: {layout.history}"
    before = without_answer(turns_of(row[layout.history], place))
    if not before and layout.history == layout.answer:
        raise DataError(f"{place}: holds an answer alone: give what it answers in a column 'prompt'")
    answers = {column: opened(row[column]) for column in (layout.answer, layout.rejected) if column}
    return _answered(question_of(before, place), layout, {**row, **answers}, spot)


def _read_completion(task: Task, layout: Layout, row: Row, spot: str) -> _Read:
    """A prompt that is a chat; of the chat that follows every answer is learnt, of the prompt none."""
    column, value = _chat_column(task, layout, row), row[layout.answer]
    before = turns_of(row[column], f"{spot}: {column}")
    if before[-1][0] == "assistant":
        raise DataError(
            f"{spot}: {column}: ends with an answer: put it before those of {layout.answer!r}, or leave it out"
        )
    before = question_of(before, f"{spot}: {column}")
    if layout.rejected or layout.wanted or not is_chat(value):
        return _answered(before, layout, row, spot)
    turns = (*only_read(before), *turns_of(value, f"{spot}: {layout.answer}"))
    messages, answer = conversation_of(turns, f"{spot}: {layout.answer}")
    return _Read(messages, answer[1], calls=more_of(answer))


def _read_beginning(task: Task, layout: Layout, row: Row, spot: str) -> _Read:
    """Two texts that begin alike: the words that both begin with are the prompt."""
    columns = (layout.answer, layout.rejected)
    better, worse = (_text(row[column], f"{spot}: field {column!r}") for column in columns)
    start = len(commonprefix((better, worse)))
    while start and not better[start - 1].isspace():
        start -= 1
    prompt = better[:start].strip()
    if not prompt:
        raise DataError(f"{spot}: fields {columns[0]!r} and {columns[1]!r} have no beginning in common: add a 'prompt'")
    answers = dict(zip(columns, (better[start:], worse[start:]), strict=True))
    return _answered((("user", prompt),), layout, {**row, **answers}, spot)


def _answered(messages: Chat, layout: Layout, row: Row, spot: str, text: tuple[str, ...] = ()) -> _Read:
    """The turns with the row's answer to them, and with the worse one of a pair."""
    histories = (messages, *((("user", each),) for each in text))
    answer = _reply(row[layout.answer], histories, f"{spot}: field {layout.answer!r}")
    if not layout.rejected:
        return _Read(messages, answer, text)
    rejected = _reply(row[layout.rejected], histories, f"{spot}: field {layout.rejected!r}")
    if rejected == answer:
        raise DataError(f"{spot}: fields {layout.answer!r} and {layout.rejected!r} hold the same answer")
    return _Read(messages, answer, text, rejected=rejected)


def _reply(value: Any, histories: Sequence[Chat], spot: str) -> str:
    """An answer as text, with the spaces that it begins with; of a chat, the answer that it ends with."""
    answer = reply_of(value, histories, spot) if is_chat(value) else _open_text(value, spot)
    if not answer:
        raise DataError(f"{spot} is empty")
    return answer


def _read_document(task: Task, layout: Layout, row: Row, spot: str) -> _Read:
    text = _open_text(row[layout.answer], f"{spot}: field {layout.answer!r}")
    if not text:
        raise DataError(f"{spot}: field {layout.answer!r} is empty")
    return _Read((), text)


def _open_text(value: Any, spot: str) -> str:
    """A text that is learnt, with the spaces that it begins with."""
    return said(_whole(value, spot))


_READERS: Final[Mapping[str, Callable[[Task, Layout, Row, str], _Read]]] = {
    "prompt": _read_prompt,
    "messages": _read_messages,
    "history": _read_history,
    "completion": _read_completion,
    "beginning": _read_beginning,
    "document": _read_document,
}


_WANTED: Final[Mapping[str, bool]] = {"true": True, "1": True, "false": False, "0": False}


def _wanted(layout: Layout, row: Row, spot: str) -> bool | None:
    """Whether a single answer is wanted; None where the layout has no such column."""
    if not layout.wanted:
        return None
    wanted = _WANTED.get(plain_text(row[layout.wanted], f"{spot}: field {layout.wanted!r}").casefold())
    if wanted is None:
        raise DataError(f"{spot}: field {layout.wanted!r} says neither true nor false")
    return wanted


def unit_of(task: Task, row: Row) -> str:
    """The text that rows share if they must stay on one side of a carved split; empty if the task names none."""
    for layout in task.layouts:
        column = layout.columns.get(task.unit)
        if column is not None and column in row:
            value, spot = row[column], f"field {column!r}"
            return _text(_decoded(value, spot) if isinstance(value, bytes) else value, spot)
    return ""


_MARK: Final = re.compile(r"[^\w\s]|_")


def folded(text: str) -> str:
    """What two texts share that differ in case, spaces, punctuation or the form of accents alone."""
    return " ".join(_MARK.sub(_spaced, composed(text)).casefold().split()) or text


def _spaced(mark: re.Match[str]) -> str:
    """A space for punctuation; signs such as + and <, and vowels that stand as signs, tell texts apart."""
    return " " if unicodedata.category(mark[0]).startswith("P") else mark[0]


def placeholders(template: str) -> tuple[str, ...]:
    """Names in the braces of a template.

    Raises:
        ValueError: The template is broken, or wants more than a name (``{a!r}``, ``{a:>9}``, ``{}``).
    """
    names = []
    for _, name, style, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name or style or conversion:
            raise ValueError("braces hold a column's name and nothing else; a literal brace is {{ or }}")
        names.append(name)
    return tuple(dict.fromkeys(names))


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders filled by plain look-up: no attributes, no indices, no format codes."""
    parts = Formatter().parse(template)
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)


def _places(template: str, values: Mapping[str, str], names: Collection[str]) -> tuple[tuple[int, int], ...]:
    """Where the values of some names stand in the rendered and stripped template, as (start, end); not empty ones."""
    whole = render(template, values)
    shift, length, end = len(whole) - len(whole.lstrip()), len(whole.strip()), 0
    found = []
    for literal, name, _, _ in Formatter().parse(template):
        start = end + len(literal)
        end = start + (len(values[name]) if name is not None else 0)
        if name in names:
            found.append((max(0, start - shift), min(end - shift, length)))
    return tuple((start, end) for start, end in found if start < end)


def _layout_of(task: Task, row: Row, spot: str) -> Layout:
    gaps = [[column for column in layout.required() if column not in row] for layout in task.layouts]
    missing = min(gaps, key=len)
    if not missing:
        layout = task.layouts[gaps.index(missing)]
        if str(row.get(layout.unjudged)).casefold() in ("true", "false"):
            raise DataError(
                f"{spot}: field {layout.unjudged!r} judges the answer: use data.task = 'preference' with "
                "training.objective = 'kto', or leave the column out"
            )
        return layout
    wanted = " or ".join(", ".join(layout.required()) for layout in task.layouts)
    raise DataError(f"{spot}: field {missing[0]!r} is missing; task {task.name!r} needs {wanted}")


def _values(task: Task, layout: Layout, row: Row, spot: str) -> dict[str, str]:
    """Placeholder of the prompt -> the row's text for it."""
    values = {}
    for name, column in layout.columns.items():
        if is_chat(row.get(column)):
            raise DataError(f"{spot}: field {column!r} holds a chat, which is read where it is all of the prompt")
        values[name] = _text(row.get(column), f"{spot}: field {column!r}")
        if not values[name] and name not in layout.optional:
            raise DataError(f"{spot}: field {column!r} is empty")
    if layout.choices:
        options = _choices(task, layout, row, spot)
        values["options"] = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return values


def _choices(task: Task, layout: Layout, row: Row, spot: str) -> dict[str, str]:
    """Name of an option's place -> the row's option, in the order of the task's names."""
    columns = layout.choices
    value: Any = row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]
    if isinstance(value, str):  # a CSV file holds them as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    names = task.options
    if isinstance(value, list):
        value = dict(zip(chain(names, map("{} too many".format, count(1))), value, strict=False))
    if not isinstance(value, Mapping):
        raise DataError(f"{spot}: field {columns[0]!r} is neither a list nor a mapping of options")
    texts = {composed(str(name)): _text(option, f"{spot}: options") for name, option in value.items()}
    texts = {name: text for name, text in texts.items() if text}
    if texts.keys() != set(names):
        raise DataError(f"{spot}: {', '.join(columns)}: options are not {_listed(task.options)}, none empty")
    return {name: texts[name] for name in names}


def _option(task: Task, layout: Layout, row: Row, spot: str) -> str:
    if layout.cuts:
        return _cut(row[layout.answer], task.options, layout, spot)
    raw = composed(plain_text(row[layout.answer], f"{spot}: field {layout.answer!r}"))
    if not raw:
        raise DataError(f"{spot}: field {layout.answer!r} is empty")
    named = {option.casefold(): option for option in task.options}
    option = task.labels.get(raw) or named.get(raw.casefold()) or _only(raw, (*task.labels.items(), *named.items()))
    if option is None and layout.choices and not may_count(raw, len(task.options)):
        option = _only(raw, [(text, name) for name, text in _choices(task, layout, row, spot).items()])
    if option is None:
        raise DataError(f"{spot}: {layout.answer} is not one of {_listed(task.options)}")
    return option


def _only(raw: str, known: Iterable[tuple[str, str]]) -> str | None:
    """The one option that a label stands for up to what ``as_label`` leaves out; None where there is none, or more."""
    found = {option for text, option in known if as_label(text) == as_label(raw)}
    return found.pop() if len(found) == 1 else None


_UNSEEN: Final = r"[\s\u00ad\u200b-\u200f\u2060\ufeff]+"
_AROUND: Final = re.compile(rf"\A{_UNSEEN}|{_UNSEEN}\Z")
_WHOLE: Final = re.compile(r"\A(-?\d+)\.0+\Z")


def as_label(text: str) -> str:
    """A label as it compares: in small letters, without what nobody sees around it, a whole number without ``.0``."""
    return whole_number(_AROUND.sub("", composed(text))).casefold()


def may_count(text: str, options: int) -> bool:
    """Whether a text is a number that may say the place of one of so many options, from 0 or from 1 on."""
    return re.fullmatch(r"[0-9]{1,9}", text) is not None and int(text) <= options


def whole_number(text: str) -> str:
    """A text; without ``.0`` if it is a whole number, as programs write one that was a decimal number before."""
    return _WHOLE.sub(r"\1", text)


_MOST_LISTED: Final = 40


def _listed(options: Sequence[str]) -> str:
    """The options for an error, which may be one of thousands."""
    more = f" and {len(options) - _MOST_LISTED} more" if len(options) > _MOST_LISTED else ""
    return ", ".join(options[:_MOST_LISTED]) + more


def _cut(value: Any, options: tuple[str, ...], layout: Layout, spot: str) -> str:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise DataError(f"{spot}: {layout.answer} is not a number")
    return options[sum(score >= cut for cut in layout.cuts)]


def _text(value: Any, spot: str) -> str:
    """Text for a prompt, without the white space around it."""
    return _whole(value, spot).strip()


def _whole(value: Any, spot: str) -> str:
    """A text as it stands; a list of passages, or a mapping that holds one as ``contexts``, is joined by lines."""
    if isinstance(value, Mapping):
        value = value.get("contexts", value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return _scalar(value, spot)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may hold halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_SCALARS: Final = (str, int, float, Decimal, date, time, timedelta, UUID)
"""What is written as a text that a reader of the file would see, too."""


def plain_text(value: Any, spot: str) -> str:
    """A scalar as text, without the white space around it."""
    return _scalar(value, spot).strip()


def _scalar(value: Any, spot: str) -> str:
    """A scalar as text: nothing for None and NaN, ``true`` and ``false``, no ``.0`` after a whole number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, _SCALARS):
        kinds = {list: "a list", Mapping: "a mapping", bytes: "bytes"}
        kind = next((name for kind, name in kinds.items() if isinstance(value, kind)), "an object")
        raise DataError(f"{spot} is not text: it holds {kind}; write the text itself into this column")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
