"""Writes sections of a configuration as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def written(document: Mapping[str, Any], where: str = "") -> str:
    """The sections of a document as TOML: a mapping within a section becomes a section below it.

    Values are texts, numbers, truth values, lists of these and mappings; a key without a value is left out.
    """
    tables = {key: value for key, value in document.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in document.items() if value is not None and key not in tables}
    lines = [f"[{where}]"] if where and (plain or not document) else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    text = "\n".join(lines) + "\n" if lines else ""
    below = [written(value, f"{where}.{_key(key)}".lstrip(".")) for key, value in tables.items()]
    return "\n".join(filter(None, [text, *below]))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
