"""silotune: federated fine-tuning of language models over institutions whose text may not leave.

The public names load what they need when they are first used: importing silotune imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from silotune.errors import SilotuneError
from silotune.quiet import hushed

if TYPE_CHECKING:
    from silotune.config import load_config
    from silotune.evaluation.generate import Sampling
    from silotune.experiment.public import evaluate, export, generate, resume, run

__version__ = "0.1.0"
__all__ = [
    "Sampling",
    "SilotuneError",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    where = {
        "Sampling": "silotune.evaluation.generate",
        "load_config": "silotune.config",
        **dict.fromkeys(("evaluate", "export", "generate", "resume", "run"), "silotune.experiment.public"),
    }
    if name not in where:
        raise AttributeError(f"module 'silotune' has no attribute {name!r}")
    with hushed():  # what these modules import has hints of its own
        return getattr(import_module(where[name]), name)
