"""What all commands share at the edge: the console, one JSON object on stdout, and silence of the libraries."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the configuration; repeatable."),
]
ModeName = Annotated[str, typer.Option("--mode", help="federated, centralized, or isolated/CLIENT.")]

_QUIET_VARIABLES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}
_QUIET_LOGGERS = ("transformers", "datasets", "huggingface_hub", "httpx", "bitsandbytes", "kernels", "peft", "torch")


def quiet() -> None:
    """Silences progress bars, notices and warnings of libraries; variables the user has set stay as they are."""
    for name, value in _QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def stdout() -> Console:
    """A console on standard output as it is now; square brackets in texts are just that."""
    return Console(file=sys.stdout, markup=False, highlight=False)


@contextlib.contextmanager
def reserved_stdout(is_reserved: bool) -> Iterator[None]:
    """While it holds, what anybody prints goes to stderr, so that stdout gets the JSON object alone."""
    with contextlib.redirect_stdout(sys.stderr) if is_reserved else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Prints a value as JSON; NaN and infinities become null."""
    from silotune.record.files import plain

    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))
