"""One text for one value: the JSON whose bytes are hashed and signed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from silotune.record.files import plain
from silotune.structs import JSON


def canonical(value: Any) -> bytes:
    """The value as JSON with sorted keys, no blanks, UTF-8, no NaN: equal values give equal bytes.

    Numbers are written as Python writes them, which gives the same double back (close to RFC 8785, but for the
    exponents of very large and very small ones).
    """
    return canonical_json(plain(value))


def canonical_json(value: JSON) -> bytes:
    """The same for what is plain JSON already, such as a line that was read."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(value: Any) -> str:
    """SHA-256 of the value's canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()
