"""Imports bitsandbytes without what it compiles, which peft imports wherever it is installed.

At its import bitsandbytes hands some of its functions to ``torch.compile``, which imports torch's compiler at once: two
seconds of every process, for functions that only a base in int4 ever calls. Here each is compiled when it is called.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch


def import_bitsandbytes() -> None:
    """Imports it where it is installed; elsewhere nothing is done."""
    if find_spec("bitsandbytes") is None:
        return
    at_once, shown = torch.compile, logging.root.manager.disable
    torch.compile = _later(at_once)
    logging.disable(logging.WARNING)  # a notice about an optional package
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = at_once
        logging.disable(shown)


def _later(at_once: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile``, called on a function or with settings for one, put off to that function's first call."""

    def compile_later(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
        if function is None:
            return lambda given: compile_later(given, **settings)
        compiled = cache(lambda: at_once(function, **settings))

        @wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            return compiled()(*values, **named)

        return call

    return compile_later
