"""What a run ran on: versions of the packages, cores, memory, GPU, and how much memory was used at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "silotune", "torch", "transformers", "peft", "safetensors", "tokenizers", "accelerate", "datasets",
    "numpy", "scikit-learn", "pydantic",
)  # fmt: skip
EXTRAS = {
    "int4": ("bitsandbytes",),
    "energy": ("codecarbon",),
    "dp": ("dp-accounting",),
    "he": ("tenseal",),
    "zstd": ("zstandard",),
    "xlsx": ("openpyxl",),
    "dashboard": ("starlette", "uvicorn"),
    "deploy": ("flwr",),
    "ray": ("ray",),
    "bench": ("trl", "flwr", "psutil"),
}


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that a run's numbers depend on, and the machine."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": cores(),
        "packages": {name: version_of(name) for name in (*PACKAGES, "bitsandbytes", "codecarbon", "dp-accounting")},
    }


def extras() -> dict[str, dict[str, str | None]]:
    """Each optional extra's packages with their installed versions."""
    return {extra: {name: version_of(name) for name in names} for extra, names in EXTRAS.items()}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Processes that ran or waited for a core in the last minute, on average; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def peak_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most resident memory that this process, or one child it waited for, ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = high_water_bytes(status) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)


def high_water_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """Linux's high-water mark of resident memory; None elsewhere.

    ``ru_maxrss`` begins with what the parent held when it started this process; the mark does not.
    """
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else None


def memory(source: Path = Path("/proc/meminfo")) -> dict[str, int | None]:
    """Bytes of main memory: ``total`` and ``available``; None where the system does not say."""
    try:
        lines = source.read_text(encoding="ascii").splitlines()
    except OSError:
        return {"total": None, "available": None}
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if rest}
    return {"total": sizes.get("MemTotal"), "available": sizes.get("MemAvailable")}


def disk_free_bytes(folder: Path) -> int:
    """Bytes free for the user where a folder is, or would be once it is made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def gpus() -> list[dict[str, Any]]:
    """Name and bytes of memory of each CUDA device, and ``mps`` where there is one; empty without a GPU."""
    try:
        import torch
    except ImportError:
        return []
    found: list[dict[str, Any]] = [
        {"name": torch.cuda.get_device_name(index), "memory_bytes": torch.cuda.mem_get_info(index)[1]}
        for index in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU (mps)", "memory_bytes": None})
    return found
