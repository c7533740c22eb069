"""Reads chats as people have them: role and content or ShareGPT's from and value, contents in parts, calls of tools.

A chat becomes turns, (role, content); what a message says beside that stands in its ``Turn``. A message that does not
fit is named by its number, never by its content.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from silotune.errors import DataError
from silotune.structs import TOOLS, Pair, Row, Turn, is_learnt, more_of

Chat = tuple[Pair, ...]

ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "human": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "model": "assistant",
        "function_call": "assistant",
        "tool": "tool",
        "function": "tool",
        "observation": "tool",
    }
)
"""What a message may call the one who speaks -> role of its turn."""
_SHARED: Final = "conversations"
_CHATS: Final = ("messages", _SHARED)
_NEEDED: Final = "needs a role (system, user or human, assistant or gpt, tool) and a content"


def is_chat(value: Any) -> bool:
    """Whether a value is one message, or a list of messages."""
    if isinstance(value, Mapping):
        return "role" in value or "from" in value
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) and is_chat(each) for each in value)
    )


def turns_of(value: Any, spot: str) -> Chat:
    """A chat's turns; a text is read as the JSON of a list of messages.

    Raises:
        DataError: It is no list of messages, or a message does not fit; ``spot`` says where.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping):
        value = [value] if is_chat(value) else None
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise DataError(f"{spot}: is not a list of messages with role and content")
    return tuple(_turn(message, f"{spot}: message {place}") for place, message in enumerate(value, start=1))


def opened(value: Any) -> Any:
    """The chat that a text holds as JSON, as in a CSV file; any other value as it is."""
    found = _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    return found if is_chat(found) else value


def conversation_of(turns: Chat, spot: str) -> tuple[Chat, Pair]:
    """The turns before the last answer that is learnt, and that answer: what is only read behind it teaches nothing.

    Raises:
        DataError: The chat does not end with an answer, or none of its answers is learnt.
    """
    if len(turns) < 2 or turns[-1][0] != "assistant" or turns[-2][0] == "system":
        raise DataError(f"{spot}: must end with a user's message and an assistant's answer")
    learnt = [place for place, turn in enumerate(turns) if place and is_learnt(turn)]
    if not learnt:
        raise DataError(f"{spot}: has no answer to learn: each has a weight of 0, or train = false")
    return turns[: learnt[-1]], turns[learnt[-1]]


def reply_of(value: Any, histories: Sequence[Chat], spot: str) -> str:
    """The answer that a chat ends with, whose turns before it are one of ``histories``, or left out.

    Raises:
        DataError: It ends with something else, or begins with other turns.
    """
    turns = turns_of(value, spot)
    if not turns or turns[-1][0] != "assistant":
        raise DataError(f"{spot} must end with an assistant's answer: leave out the turns behind it, or the row")
    if more_of(turns[-1]):
        raise DataError(f"{spot} ends with a call of a tool: answers that are compared are text")
    if turns[:-1] and turns[:-1] not in histories:
        raise DataError(
            f"{spot} begins with other turns than those that it answers: answers are compared after the same turns; "
            "give these once, in a column 'prompt', and the answers alone"
        )
    return turns[-1][1]


def question_of(turns: Chat, spot: str) -> Chat:
    """The turns, if they ask for an answer.

    Raises:
        DataError: There are none, or the last is neither a user's nor a tool's.
    """
    if not turns or turns[-1][0] not in ("user", "tool"):
        raise DataError(f"{spot}: must end with a user's message, or one and an answer to it")
    return turns


def without_answer(turns: Chat) -> Chat:
    """The turns without the answer that they end with, if they do."""
    return turns[:-1] if turns and turns[-1][0] == "assistant" else turns


def asked_in(row: Row, spot: str) -> Chat:
    """What a row asks: its ``prompt``, as text or as a chat, or its chat without the answer at its end.

    Raises:
        DataError: It has none of these columns, or a message does not fit.
    """
    column = next((name for name in ("prompt", *_CHATS) if row.get(name) is not None), None)
    if column is None:
        raise DataError(f"{spot} has no 'prompt', 'messages' (role, content) or 'conversations' (from, value)")
    if column == "prompt" and isinstance(row["prompt"], str):
        return (("user", row["prompt"]),)
    place = f"{spot}: {column}"
    asked = question_of(without_answer(turns_of(row[column], place)), place)
    return (*tools_of(row, spot), *system_of(row, asked, spot), *asked)


def tools_of(row: Row, spot: str) -> Chat:
    """The tools that a row's column ``tools`` lets the assistant call, as a turn; none where there is no such column.

    Raises:
        DataError: It is no list of functions with a name.
    """
    given = row.get(TOOLS)
    if given is None or given == "" or given == []:
        return ()
    given = _parsed(given) if isinstance(given, str) else given
    functions = [_function(tool) for tool in given] if isinstance(given, list) else [None]
    if not all(functions):
        raise DataError(f"{spot}: field {TOOLS!r} is not a list of functions with a name")
    _check_depth(given, f"{spot}: field {TOOLS!r}")
    described = [{"type": "function", "function": _without_nothing(function)} for function in functions]
    return ((TOOLS, _json(described, f"{spot}: field {TOOLS!r}")),)


def system_of(row: Row, turns: Chat, spot: str) -> Chat:
    """The system's turn that ShareGPT's rows may have in a column of its own; none where the chat has one itself.

    Raises:
        DataError: The column holds no text.
    """
    given = row.get("system")
    if row.get(_SHARED) is None or given is None or given == "":
        return ()
    if not isinstance(given, str):
        raise DataError(f"{spot}: field 'system' is not text")
    return (("system", given.strip()),) if given.strip() and turns[0][0] != "system" else ()


def only_read(turns: Chat) -> Chat:
    """The turns, none of which is learnt."""
    return tuple(Turn(turn, more_of(turn), is_learnt=False) if turn[0] == "assistant" else turn for turn in turns)


def _turn(message: Any, spot: str) -> Pair:
    said_by = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
    said_by = said_by.strip().casefold() if isinstance(said_by, str) else None
    role = ROLES.get(said_by or "")
    if role is None:
        raise DataError(f"{spot} {_NEEDED}")
    value = message["value"] if message.get("content") is None and "value" in message else message.get("content")
    called = message.get("tool_calls") or message.get("function_call")
    if said_by == "function_call":
        value, called = None, _parsed(value) if isinstance(value, str) else value
        if not called:
            raise DataError(f"{spot} {_CALL}")
    content = _content(value, role, spot)
    if not (content.strip() or called or role == "tool"):
        raise DataError(f"{spot} {_NEEDED}")
    more: dict[str, Any] = {}
    if called:
        if role != "assistant":
            raise DataError(f"{spot} calls a tool, which an assistant's message alone may do")
        more["tool_calls"] = [_call(call, spot) for call in (called if isinstance(called, list) else [called])]
    if role == "tool":
        more = {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    learns = role != "assistant" or _learns(message, spot)
    return Turn((role, content), _json(more, spot) if more else "", is_learnt=learns) if more or not learns else (
        role, content,
    )  # fmt: skip


def _content(value: Any, role: str, spot: str) -> str:
    """A content as text: its parts one after the other, with the white space that says something."""
    parts = value if isinstance(value, list) else [value]
    text = "".join(_part(part, f"{spot}: part {place}") for place, part in enumerate(parts, start=1))
    return said(text) if role == "assistant" else ended(text)


def said(text: str) -> str:
    """An answer without empty lines before it and white space behind it; its first line stays indented."""
    return re.sub(r"\A\s*\n", "", text).rstrip()


def ended(text: str) -> str:
    """A text without the spaces at its end; from a new line on they are kept, since an answer may go on from there."""
    return text if "\n" in text[len(text.rstrip()) :] else text.rstrip()


def _part(part: Any, spot: str) -> str:
    if isinstance(part, Mapping):
        kind, part = part.get("type"), part.get("text")
        if kind not in (None, "text", "input_text", "output_text") or part is None:
            part = b""
    if part is None or (isinstance(part, float) and math.isnan(part)):
        return ""
    if not isinstance(part, (str, int, float)):
        raise DataError(f"{spot} of its content is not text, such as an image: only text can be learnt from")
    return str(part)


_CALL: Final = "calls a tool without a function's name and arguments, which are a JSON object"


def _call(call: Any, spot: str) -> dict[str, Any]:
    """A call of a tool as chat templates take it: the arguments are a mapping."""
    function = _function(call)
    arguments = function.get("arguments", {}) if function else None
    arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
    if not function or not isinstance(arguments, Mapping):
        raise DataError(f"{spot} {_CALL}")
    _check_depth(arguments, spot)
    made = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _function(tool: Any) -> Mapping[str, Any] | None:
    """What describes a function, within ``function`` or by itself; None where it has no name."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return inner if isinstance(inner, Mapping) and isinstance(inner.get("name"), str) and inner["name"] else None


_WEIGHTS: Final[Mapping[str, bool]] = {"none": True, "1": True, "1.0": True, "0": False, "0.0": False}
_TRAINS: Final[Mapping[str, bool]] = {"none": True, "true": True, "1": True, "false": False, "0": False}


def _learns(message: Mapping[str, Any], spot: str) -> bool:
    """Whether a message is learnt: ``weight`` 0 or ``train`` false says that it is read and not learnt."""
    weight = _WEIGHTS.get(str(message.get("weight")).casefold())
    train = _TRAINS.get(str(message.get("train")).casefold())
    if weight is None or train is None:
        raise DataError(f"{spot}: its weight must be 0 or 1, and its train true or false")
    return weight and train


def _parsed(text: str) -> Any:
    """What a text says as JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_MOST_DEPTH: Final = 64
"""Lists and mappings within one another that describe a tool or a call of it."""


def _check_depth(value: Any, spot: str) -> None:
    """Refuses what nests deeper than a chat template can write."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        nested = [each.values() if isinstance(each, Mapping) else each for each in level if isinstance(each, _NESTS)]
        level = [inner for each in nested for inner in each]
    if level:
        raise DataError(f"{spot} holds a tool, or a call of one, that nests more than {_MOST_DEPTH} deep")


_NESTS: Final = (Mapping, list)


def _json(value: Any, spot: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{spot} holds something that cannot be written as JSON") from None


def _without_nothing(value: Any) -> Any:
    """A value without keys that hold None, with which Parquet fills what other rows have."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(each) for key, each in value.items() if each is not None}
    return [_without_nothing(each) for each in value] if isinstance(value, list) else value
