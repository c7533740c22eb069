"""silotune: federated fine-tuning of language models over institutions whose text may not leave.

The public names load what they need when they are first used: importing silotune imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from silotune.errors import SilotuneError

if TYPE_CHECKING:
    from silotune.config import load_config
    from silotune.experiment.run import run_experiment
    from silotune.experiment.tuned import evaluate, generate

__version__ = "0.1.0"
__all__ = ["SilotuneError", "__version__", "evaluate", "generate", "load_config", "run_experiment"]


def __getattr__(name: str) -> Any:
    where = {
        "load_config": "silotune.config",
        "run_experiment": "silotune.experiment.run",
        "evaluate": "silotune.experiment.tuned",
        "generate": "silotune.experiment.tuned",
    }
    if name not in where:
        raise AttributeError(f"module 'silotune' has no attribute {name!r}")
    return getattr(import_module(where[name]), name)
