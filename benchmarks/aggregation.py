"""Averages many large updates one by one, beside flwr's FedAvg on the same arrays: bytes a second, and peak memory.

    python benchmarks/aggregation.py                        # 1,000 updates of 10 million values: a few minutes
    python benchmarks/aggregation.py --updates 50 --peer-updates 10

Each side is a process of its own. silotune reads a stream; flwr's ``aggregate_arrayrecords`` (what its FedAvg calls)
takes a list, so it gets as many updates as ``--peer-updates`` says and its memory grows with them. Only aggregation is
timed: what arrives is the same arrays each time. A plain copy of as many values is timed before each update of
silotune's, so that both see the same machine; of both the median over the updates counts, not what other processes took
between. Memory is the peak above that of the process before the first array was made, counted in updates; the arriving
update itself is counted in. The bounds: no less than 30 % of the bytes a second that this machine copies, in memory of
3 updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LEAST_SHARE_OF_COPY = 0.30
MOST_UPDATES_IN_MEMORY = 3.0
_TOLERANCE = 0.1
"""Of an update: the allocator's and the interpreter's own."""
_TENSORS = 160
"""An adapter of rank 8 on 80 linear layers has as many."""


@dataclass(frozen=True)
class Side:
    """What one side took: seconds an update, peak memory, and seconds of a plain copy of as many values."""

    updates: int
    seconds: float
    peak_bytes: int
    copy_seconds: float = 0.0


def _peak_bytes() -> int:
    return 1024 * next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )


def _restart_peak() -> int:
    """Sets the peak to what is held now, and gives that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def silotune_side(updates: int, values: int) -> Side:
    """``weighted_mean`` over a stream."""
    import torch

    from silotune.methods.aggregate import weighted_mean
    from silotune.structs import ClientUpdate

    source, target = torch.ones(values), torch.ones(values)
    warm = {"w": torch.randn(1000)}
    assert torch.allclose(weighted_mean([ClientUpdate("warm-up", warm, 1)])["w"], warm["w"])  # loads what the sum runs
    before = _restart_peak()
    delta = {f"tensor-{number}": torch.randn(values // _TENSORS) for number in range(_TENSORS)}
    copies, aggregations = [], []

    def arriving() -> Iterator[ClientUpdate]:
        for number in range(updates):
            began = time.perf_counter()
            target.copy_(source)
            copied = time.perf_counter()
            yield ClientUpdate(str(number), delta, number % 7 + 1)
            copies.append(copied - began)
            aggregations.append(time.perf_counter() - copied)

    mean = weighted_mean(arriving())
    assert torch.allclose(mean["tensor-0"], delta["tensor-0"])
    peak = _peak_bytes() - before
    return Side(updates, statistics.median(aggregations), peak, statistics.median(copies))


def flower_side(updates: int, values: int) -> Side:
    """flwr's FedAvg on a list of records."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    def record(arrays: dict[str, np.ndarray], weight: float) -> RecordDict:
        parts = {"arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()})}
        return RecordDict({**parts, "metrics": MetricRecord({"num-examples": weight})})

    aggregate_arrayrecords([record({"w": np.ones(1000, np.float32)}, 1.0)], "num-examples")
    before = _restart_peak()
    numbers = np.random.default_rng(0)
    size = values // _TENSORS
    arrays = {f"tensor-{number}": numbers.standard_normal(size, np.float32) for number in range(_TENSORS)}
    records = [record(arrays, float(number % 7 + 1)) for number in range(updates)]
    began = time.perf_counter()
    aggregate_arrayrecords(records, "num-examples")
    return Side(updates, (time.perf_counter() - began) / updates, _peak_bytes() - before)


SIDES = {"silotune": silotune_side, "flwr": flower_side}


def _measured(name: str, updates: int, values: int) -> Side:
    """A side in a process of its own."""
    command = [sys.executable, __file__, "--side", name, "--updates", str(updates), "--values", str(values)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Side(**json.loads(done.stdout.splitlines()[-1]))


def report(found: dict[str, Side], values: int) -> tuple[str, bool]:
    """The table, and whether both bounds hold."""
    update_bytes = 4 * (values // _TENSORS) * _TENSORS
    own = found["silotune"]
    copied = update_bytes / own.copy_seconds
    lines = [
        "| side | updates | ms an update | GB/s | of a plain copy | peak memory, in updates |",
        "|---|---|---|---|---|---|",
        f"| plain copy | {own.updates} | {1e3 * own.copy_seconds:.1f} | {copied / 1e9:.2f} | 100% | |",
    ]
    for name, side in found.items():
        rate, held = update_bytes / side.seconds, side.peak_bytes / update_bytes
        lines.append(
            f"| {name} | {side.updates} | {1e3 * side.seconds:.1f} | {rate / 1e9:.2f} | {rate / copied:.0%} "
            f"| {held:.2f} |"
        )
    share, held = own.copy_seconds / own.seconds, own.peak_bytes / update_bytes
    holds = share >= LEAST_SHARE_OF_COPY and held <= MOST_UPDATES_IN_MEMORY + _TOLERANCE
    lines.append(
        f"\nsilotune: {share:.0%} of a plain copy (at least {LEAST_SHARE_OF_COPY:.0%}), {held:.2f} updates in memory "
        f"(at most {MOST_UPDATES_IN_MEMORY:g}): {'holds' if holds else 'DOES NOT HOLD'}"
    )
    return "\n".join(lines), holds


def main(arguments: list[str] | None = None) -> int:
    """Measures all sides and prints the table; 1 when a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--peer-updates", type=int, default=50, help="flwr holds them all in memory")
    parser.add_argument("--values", type=int, default=10_000_000, help="of an update")
    parser.add_argument("--side", choices=SIDES, help="one side alone, in this process")
    given = parser.parse_args(arguments)
    if given.side:
        side = SIDES[given.side](given.updates, given.values)
        print(json.dumps(asdict(side)))
        return 0
    counts = {"silotune": given.updates, "flwr": given.peer_updates}
    text, holds = report({name: _measured(name, counts[name], given.values) for name in SIDES}, given.values)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
