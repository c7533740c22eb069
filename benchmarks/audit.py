"""How long an audit trail takes to write and to verify, and what the trail adds to a run.

``python benchmarks/audit.py`` prints one JSON object; seconds are of CPU. The trail has the shape of a real one: nearly
half of its entries are replies that their sites signed, so that verifying checks a signature for each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from silotune.federation.coordinator.course import verify_trail
from silotune.federation.wire.signing import signed, statement
from silotune.record.audit import FILE, Trail
from silotune.record.signatures import new_key
from silotune.structs import Reply
from silotune.tensors import digest

LIMIT_SECONDS = 2.0
REPORT = {"num_examples": 500, "loss": 0.25, "steps": 32, "tokens": 90000, "seconds": 12.5}
UPDATE = {"lora_A": torch.zeros(8, 64), "lora_B": torch.zeros(64, 8)}
SITES = 4


def write(folder: Path, entries: int) -> float:
    """Writes a trail of so many entries; the CPU seconds it took, without those of the sites."""
    keys = {f"site-{number}": new_key() for number in range(SITES)}
    trail = Trail(folder / FILE, new_key(), actor="coordinator")
    tensors, number, seconds = digest(UPDATE), 0, 0.0

    def add(event: str, fields: dict[str, object]) -> None:
        nonlocal seconds
        began = time.process_time()
        trail.add(event, fields)
        seconds += time.process_time() - began

    add("started", {"round": 0, "weights": tensors})
    while trail.entries < entries - 2 * SITES - 4:
        number += 1
        for name in keys:
            place = {"kind": "train", "round": number, "client": name}
            add("request", {**place, "tensors": tensors, "body": "0" * 64, "request": "1" * 64})
        head = trail.head().text()
        for name, key in keys.items():
            reply = signed(Reply("train", number, name, UPDATE, REPORT), request="1" * 64, head=head, key=key)
            place = {"kind": "train", "round": number, "client": name}
            proof = {"key": key.public, "signature": reply.signature}
            said = statement(reply, request="1" * 64, head=head)
            add(
                "reply", {**place, **proof, "statement": said, "tensors": reply.digest, "report": REPORT, "bytes": 9000}
            )
        add("aggregation", {"round": number, "clients": list(keys), "weights": tensors})
        add("checkpoint", {"round": number, "sha256": "3" * 64})
    while trail.entries < entries - 2:
        add("evaluation", {"round": number, "metrics": "2" * 64, "num_examples": 100})
    add("result", {"round": number, "weights": tensors, "adapter": tensors, "result": "4" * 64})
    add("closed", {"round": number, "manifest": "5" * 64, "files": 20, "trail": FILE})
    trail.flush()
    return seconds


def main() -> None:
    """Measures, prints, and ends with code 1 when verifying takes longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder), arguments.entries)
        times = []
        for _ in range(arguments.repeats):
            began = time.process_time()  # one thread, no waiting: a machine that does other things measures the same
            found = verify_trail(Path(folder) / FILE)
            times.append(time.process_time() - began)
        size = (Path(folder) / FILE).stat().st_size
    middle = statistics.median(times)
    figures = {
        "entries": len(found.entries),
        "site_signatures": sum(entry.event == "reply" for entry in found.entries),
        "bytes": size,
        "write_seconds": round(written, 3),
        "verify_seconds": [round(seconds, 3) for seconds in times],
        "verify_seconds_median": round(middle, 3),
        "limit_seconds": LIMIT_SECONDS,
    }
    print(json.dumps(figures, indent=2))
    sys.exit(0 if middle < LIMIT_SECONDS else 1)


if __name__ == "__main__":
    main()
