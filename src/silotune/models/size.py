"""How much memory a base model's weights take, told from its files before anything is loaded."""

from __future__ import annotations

import math
from typing import Final

from silotune.errors import ModelError
from silotune.models.fingerprint import folder_of
from silotune.settings.sections import ModelSection

BYTES: Final = {"float32": 4.0, "bfloat16": 2.0, "int4": 0.5}
"""Of a value by ``model.precision``; of int4 the least: embedding, head and scales take more."""


def weights_bytes(section: ModelSection) -> int | None:
    """Bytes of the weights in memory, at least; None where the files are not on this machine, or not safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        paths = sorted(folder_of(section).glob("*.safetensors"))
        values = 0
        for path in paths:
            with safe_open(path, framework="pt") as file:
                values += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (ModelError, SafetensorError, OSError):  # loading says what is wrong with them
        return None
    return int(values * BYTES[section.precision]) if paths else None
