"""Measuring and judging: fresh processes with their time and memory, medians, ratios, verdicts, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

SAMPLE_SECONDS = 2.0
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "flwr", "ray")
QUIET: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Direction = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Child:
    """What a finished process cost: wall seconds from start to exit, and the peak of its whole process tree."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    Attributes:
        part: Which comparison it belongs to.
        what: What was measured, with its unit.
        peer: Every repetition of the other side (or of the reference).
        silotune: Every repetition of silotune.
        ratio: The figure that is judged.
        bound: What the ratio must reach or keep; None for lines that only inform.
        direction: Which side of the bound is good.
    """

    part: str
    what: str
    peer: tuple[float, ...]
    silotune: tuple[float, ...]
    ratio: float
    bound: float | None = None
    direction: Direction = "at least"

    @property
    def passed(self) -> bool:
        """Whether the bound holds; a figure that is not a number never passes."""
        if self.bound is None:
            return True
        return self.ratio >= self.bound if self.direction == "at least" else self.ratio <= self.bound


def speed_up(peer: Sequence[float], silotune: Sequence[float]) -> float:
    """How many times less silotune takes: the quotient of the medians.

    Raises:
        ValueError: A side has no repetitions, or silotune's median is not positive.
    """
    if not peer or not silotune:
        raise ValueError("both sides need at least one repetition")
    own = statistics.median(silotune)
    if not own > 0:
        raise ValueError(f"silotune's median is {own}, which is no time")
    return statistics.median(peer) / own


def relative_difference(first: float, second: float) -> float:
    """Distance of two losses as a share of the smaller one; 0 for equal ones."""
    return abs(first - second) / min(abs(first), abs(second))


def all_passed(results: Sequence[Result]) -> bool:
    """True when something was measured and every bound holds."""
    return bool(results) and all(result.passed for result in results)


def seconds_of(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def in_turn(
    theirs: Callable[[], object], own: Callable[[], object], *, repetitions: int, calls: int = 1
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Processor seconds of a call of either, taken in turn; ``calls`` are timed together where one is too short."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for side, work in zip(times, (theirs, own), strict=True):
            side.append(seconds_of(partial(_repeated, work, calls)) / calls)
    return tuple(times[0]), tuple(times[1])


def _repeated(work: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        work()


def of_shapes(description: str | None, measured: Callable[[], Sequence[Result]]) -> int:
    """The command of a benchmark of single operations: measures on one thread, prints; the exit code."""
    import torch

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measured()
    print(table(results, markdown=arguments.markdown))
    return 0 if all_passed(results) else 1


def run_child(command: Sequence[str], log: Path) -> Child:
    """Runs a command in a fresh process and waits for it.

    Args:
        command: Program and arguments.
        log: File that takes everything it prints.

    Raises:
        RuntimeError: It ended with an error; names the log and shows its last lines.
    """
    with log.open("wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **QUIET})
        watch = _Watch(process.pid)
        watch.start()
        code = process.wait()
        seconds = time.perf_counter() - began
    watch.stop()
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {code}; the log {log} ends:\n{tail}")
    return Child(seconds, watch.peak_bytes)


class _Watch(threading.Thread):
    """Samples the memory of a process and all its descendants until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._ended = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        """Keeps the largest sum seen."""
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))

    def stop(self) -> None:
        """Ends the sampling."""
        self._ended.set()
        self.join()


def tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants, shared pages counted once (PSS; RSS where there is no PSS)."""
    import psutil

    total = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            continue
    return total


def machine() -> dict[str, Any]:
    """Where and with what was measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "load_before": os.getloadavg()[0],
    }


def _processor() -> str:
    place = Path("/proc/cpuinfo")
    lines = place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def as_document(results: Sequence[Result], where: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as one JSON value."""
    rows = [{**asdict(result), "passed": result.passed} for result in results]
    return {"passed": all_passed(results), "machine": dict(where), "settings": dict(settings), "results": rows}


def from_document(document: Mapping[str, Any]) -> list[Result]:
    """The results in what `as_document` made."""
    rows = [{key: value for key, value in row.items() if key != "passed"} for row in document["results"]]
    return [Result(**{**row, "peer": tuple(row["peer"]), "silotune": tuple(row["silotune"])}) for row in rows]


def read_document(path: Path) -> dict[str, Any]:
    """Reads a JSON file written earlier."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


HEADINGS = ("part", "measured", "peer or reference", "silotune", "ratio", "bound", "holds")


def table(results: Sequence[Result], *, markdown: bool = False) -> str:
    """The results as a table of medians with the smallest and the largest repetition."""
    rows = [HEADINGS, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if markdown:
        rule = "|".join("-" * (width + 2) for width in widths)
        lines = ["| " + " | ".join(row) + " |" for row in padded]
        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _cells(result: Result) -> tuple[str, ...]:
    bound = "" if result.bound is None else f"{result.direction} {result.bound:g}"
    verdict = "" if result.bound is None else "yes" if result.passed else "NO"
    return (
        result.part,
        result.what,
        _spread(result.peer),
        _spread(result.silotune),
        f"{result.ratio:.3g}",
        bound,
        verdict,
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} to {max(values):.4g})"
