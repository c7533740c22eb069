"""Silences the progress bars, hints and warnings of the libraries that silotune uses."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

VARIABLES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}
LOGGERS = ("transformers", "datasets", "huggingface_hub", "httpx", "bitsandbytes", "kernels", "peft", "torch")


def hush() -> None:
    """Silences the libraries until the process ends; variables that the user has set stay as they are."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silences the libraries inside the block, for a program whose variables, loggers and warnings are its own."""
    unset = [name for name in VARIABLES if name not in os.environ]
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings(), _without_bars():
        hush()
        try:
            yield
        finally:
            for name in unset:
                os.environ.pop(name, None)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Turns off the bars of transformers where the program has imported it already: it read the variables then."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging as bars

    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            bars.enable_progress_bar()
